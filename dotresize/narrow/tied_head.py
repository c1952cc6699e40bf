"""One table for the embeddings and the head of a narrowed model, chosen for the head.

An untied head is a reader of the final norm like any other and is refitted: it becomes E A', with
A = argmin |u A - v|^2 + lam |A - A0|^2 (refit.py). A tied model has one table E B for both
ends and the final norm's weight w' between stream and head, so that its logits are
u diag(w') B' E'. With B = A' diag(1 / w') they are those of the refitted head. What is left free,
w', brings the table as near to the projected embeddings as it goes:

    w'_j = |E a_j|^2 / <E a_j, s E q_j>        (least squares, a_j and q_j columns of A' and Q)

On SmolLM2-135M the table is then 1 % (squared) away from s E Q. The first layer's readers are
refitted on it, and later ones see little of it, as the stream has grown: better than giving the
head weights of its own, and without their parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.least_squares import FLOAT, gram, solve
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import matmul_in_blocks, product_type
from dotresize.offload.memory_plan import TABLE_ROWS


@torch.no_grad()
def choose_table(
    dense: CausalLM, narrow: CausalLM, q: Tensor, moment: Tensor, *, ridge: float
) -> None:
    """Set table and final norm of a tied ``narrow = absorb(dense, q)`` in place.

    Args:
        q: (D, k) float64, orthonormal columns.
        moment: (D, D) second moment of the RMS-normalised stream that the final norm reads.
        ridge: relative to the diagonal of Q' moment Q.
    """
    architecture = dense.architecture
    names = architecture.embedding, architecture.final_norm
    goal = architecture.table_scale(q.shape[0], q.shape[1], True) * q
    with (
        dense.resident(*names) as (embedding, dense_norm),
        narrow.resident(*names) as (table, norm),
    ):
        kind = product_type(narrow)
        scale, inner = architecture.gain(dense_norm), _gram(embedding.weight, kind)
        basis, weights, between = head_basis(q, goal, moment.to(FLOAT), scale, inner, ridge)
        # Ill-conditioned columns (a norm weight near zero) keep what absorption gave them.
        kept = architecture.gain(norm)
        sound = (weights / kept - 1).abs() < 0.5
        weights = torch.where(sound, weights, kept)
        basis = torch.where(sound, between / weights, goal)
        matmul_in_blocks(embedding.weight, basis.to(kind), out=table.weight)
        norm.weight.copy_(weights - architecture.norm_offset)


def head_basis(
    q: Tensor, goal: Tensor, moment: Tensor, scale: Tensor, inner: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return B (D, k), w' (k,) and A' (D, k) of the module's header.

    goal: what the table is brought near to, E goal, s Q unless the model scales its embeddings;
    scale: the norm's w; inner: E'E.
    """
    s = (q.shape[1] / q.shape[0]) ** 0.5
    refitted = solve(q.mT @ moment @ q, q.mT @ moment, q.mT, ridge, proportional=True)
    between = (refitted * scale / s).mT
    seen = inner @ between
    weights = (between * seen).sum(0) / (goal * seen).sum(0)
    return between / weights, weights, between


def _gram(embedding: Tensor, kind: torch.dtype) -> Tensor:
    """Return E'E, float64, of products in a type (``product_type``)."""
    width = embedding.shape[1]
    total = torch.zeros(width, width, dtype=FLOAT, device=embedding.device)
    for rows in embedding.split(TABLE_ROWS):
        total += gram(rows) if kind == torch.float32 else rows.to(FLOAT).mT @ rows.to(FLOAT)
    return total
