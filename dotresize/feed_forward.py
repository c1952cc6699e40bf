"""Which inner neurons of a feed-forward block stay, and what the block then writes.

An inner neuron sits behind a non-linearity: its input weights cannot be merged without changing
the function, so kept neurons keep theirs, and only the output side is recombined. With h (tokens,
n) the inner activations, W (n, out) the writer, G = h'h and S the kept neurons:

magnitude   S = top by |h_j| |w_j|                     W_S as it is
nystrom     the same S                                 W_S = (G_SS + lam)^-1 (G_S W + lam W_S)
transport   the same S                                 W_S = R' W, R the transport plan's rows
eliminate   backward elimination (below)               the same

Backward elimination drops the neurons whose loss hurts least once the others have made up for it:
with V = (G + lam)^-1 and B = V h'y, dropping j costs |b_j|^2 / V_jj (the optimal brain surgeon of
Hassibi and Stork, 1993, for a least-squares problem), after which V and B are updated.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dotresize.least_squares import FLOAT, solve
from dotresize.maps import largest, transport_map
from dotresize.ops.sinkhorn import sinkhorn

METHODS = ("eliminate", "nystrom", "magnitude", "transport")

# Of the mean diagonal of G. Elimination inverts all of G, whose smallest directions few tokens fix.
RIDGE = {"eliminate": 1e-2, "nystrom": 1e-4}
# Neurons dropped between two updates, of those that are left. Each update costs as much as one
# that drops a single neuron.
BLOCK_SHARE = 1 / 64
# In units of the mean cost. Small: what a neuron wrote goes to those most alike, not to all.
TRANSPORT_REG = 0.03


def choose_neurons(
    method: str, gram: Tensor, cross: Tensor, writer: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Kept neurons and their recombined writer.

    Args:
        method: one of ``METHODS``.
        gram: (n, n) float64, h'h summed over tokens.
        cross: (n, out) float64, h'y, y what the writer should write ("eliminate"); with y = h W
            it is ``gram @ writer``.
        writer: (n, out) float64, W in row convention.
        count: how many stay.

    Returns:
        kept: int64 (count,), ascending; and (count, out) float64.
    """
    if method == "eliminate":
        kept = eliminate(gram, cross, count, ridge=RIDGE[method])
    else:
        kept = largest(gram.diagonal().sqrt() * writer.norm(dim=1), count)
    if method == "magnitude":
        return kept, writer[kept]
    if method == "transport":
        return kept, _handed_on(gram, kept).mT @ writer
    # Ridge towards the weights that the kept neurons had.
    return kept, solve(gram[kept][:, kept], gram[kept] @ writer, writer[kept], RIDGE[method])


def eliminate(
    gram: Tensor, cross: Tensor, count: int, *, ridge: float = RIDGE["eliminate"]
) -> Tensor:
    """Backward elimination to ``count`` inputs: int64 (count,), ascending. See the header."""
    lam = ridge * gram.diagonal().mean()
    inverse = gram.clone()
    inverse.diagonal().add_(lam)
    inverse = torch.linalg.inv(inverse)
    solution = inverse @ cross
    kept = torch.arange(len(gram), device=gram.device)
    while len(kept) > count:
        loss = solution.square().sum(1) / inverse.diagonal()
        block = max(1, int(BLOCK_SHARE * len(kept)))
        drop = loss.topk(min(block, len(kept) - count), largest=False).indices
        stays = torch.ones(len(kept), dtype=torch.bool, device=gram.device)
        stays[drop] = False
        column = inverse[stays][:, drop]
        step = column @ torch.linalg.inv(inverse[drop][:, drop])
        solution = solution[stays] - step @ solution[drop]
        inverse = inverse[stays][:, stays] - step @ column.mT
        kept = kept[stays]
    return kept


def _handed_on(gram: Tensor, kept: Tensor) -> Tensor:
    """R (n, count): the share of each neuron's signal that each kept one stands for.

    Transport between neurons of unit length, at the cost 1 - |correlation|; the sign and the ratio
    of lengths go into R, and a kept neuron stands for itself alone.
    """
    length = gram.diagonal().sqrt().clamp_min(torch.finfo(FLOAT).tiny)
    correlation = (gram / length[:, None] / length)[:, kept]
    cost = 1.0 - correlation.abs()
    plan = sinkhorn(cost.float(), TRANSPORT_REG * max(float(cost.mean()), 1e-6)).plan
    shares = transport_map(cast(Tensor, plan).to(gram).mT).mT
    # Times the projection of the one neuron onto the other.
    shares = shares * correlation * length[:, None] / length[kept]
    shares[kept] = torch.eye(len(kept)).to(gram)
    return shares
