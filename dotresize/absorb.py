"""Apply a width map to a model's weights, by its architecture's axis table.

With an orthonormal Q (D, k) and s = sqrt(k / D), weights in ``nn.Linear`` layout (out, in):

    embedding  E <- s E Q            writer  W <- s Q' W,  bias <- s bias Q
    reader     W <- W diag(w) Q / s  norm    w <- 1

An RMSNorm divides by the root of the mean over its width. Scaling what is written by s makes the
mean over k channels what the mean over D was, so the new model's own norms, eps included, equal
the projected dense model's, up to the factor s that the readers undo. Embeddings that the model
itself multiplies by the root of its width (Gemma) are E Q instead.

With a map for every residual location, a reader takes the map of the location that it reads, a
writer that of the next location, and the residual connection between them an adapter (k, k):
Q_r' Q_(r+1), which no plain checkpoint can hold (see dotresize.sliced).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.models import architecture_of


def is_tied(model: nn.Module) -> bool:
    """Whether embedding and head are one tensor."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def absorb(model: Any, q: Tensor | Sequence[Tensor], *, untie: bool = False) -> Any:
    """A new model of residual width ``q.shape[1]``; the given one is untouched.

    Args:
        model: a transformers causal language model of a supported architecture.
        q: (D, k) float64 with orthonormal columns, or one for each residual location, whose
            adapters are then still to be added.
        untie: give a tied head its own weights, which makes the final norm's fusion exact. A head
            kept tied stays ``E Q`` and the norm keeps ``diag(Q' diag(w) Q)``; what that loses is
            small only if q is close to a selection of axes.

    Returns:
        a model of the same class and dtype whose plain checkpoint holds the result.
    """
    architecture = architecture_of(model.config)
    sublayers = list(architecture.each(model))
    qs = [q] * (len(sublayers) + 1) if isinstance(q, Tensor) else list(q)
    width, narrow = qs[0].shape
    s = (narrow / width) ** 0.5
    tied = is_tied(model) and not untie
    old = model.state_dict()
    new: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor) -> None:
        new[name] = weight.to(old[name].dtype).contiguous()

    def wide(name: str) -> Tensor:
        return old[name].to(qs[0])

    def put_norm(name: str, gain: Tensor) -> None:
        if not architecture.layer_norm:
            put(f"{name}.weight", gain - architecture.norm_offset)

    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    table = architecture.table_scale(width, narrow, tied)
    stream = architecture.stream_scale(width, narrow, tied)
    put(embedding, table * wide(embedding) @ qs[0])
    steps = zip(sublayers, qs, qs[1:], strict=False)
    progress = tqdm(steps, desc="absorb", unit="sublayer", total=len(sublayers), disable=None)
    for (prefix, sublayer), read, written in progress:
        norm = f"{prefix}.{sublayer.norm}"
        gain = architecture.gain(model.get_submodule(norm)).to(qs[0])
        for reader in sublayer.readers:
            name = f"{prefix}.{reader}"
            put(name, (wide(name) * gain) @ read / s)
        writer = f"{prefix}.{sublayer.writer}"
        put(writer, stream * written.mT @ wide(writer))
        bias = writer.removesuffix("weight") + "bias"
        if bias in old:
            put(bias, stream * wide(bias) @ written)
        put_norm(norm, torch.ones(narrow))
    final = architecture.final_norm
    scale = architecture.gain(model.get_submodule(final)).to(qs[0])
    last = qs[-1]
    if tied:
        put_norm(final, (last * last * scale[:, None]).sum(0) / (s * table))
        new[head] = new[embedding]
    else:
        source = head if head in old else embedding
        new[head] = ((wide(source) * scale) @ last / s).to(old[source].dtype).contiguous()
        put_norm(final, torch.ones(narrow))
    for name in old.keys() - new.keys():
        new[name] = old[name].clone()  # off the residual; the models share no memory
    return _build(model, narrow, tied, new)


def resized(config: Any, width: int) -> Any:
    """A copy of a config with another residual width, its heads as large as before."""
    config = copy.deepcopy(config)
    # Explicit from now on: no longer what the width divided by the heads would give.
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.hidden_size = width
    return config


def _build(model: Any, width: int, tied: bool, weights: dict[str, Tensor]) -> Any:
    config = resized(model.config, width)
    config.tie_word_embeddings = tied
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):  # its random start weights are nobody's business
        narrow = type(model)(config)
    # Assigned, not copied: every weight keeps the dtype it has in the given model.
    narrow.load_state_dict(weights, assign=True)
    narrow.tie_weights()
    narrow = narrow.to(device)
    narrow.generation_config = copy.deepcopy(model.generation_config)
    return narrow.eval()
