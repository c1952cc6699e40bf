"""Scales of columns, moved from the readers of a norm back into its weight.

Absorption leaves every norm's weight at 1, so that the sizes of the channels lie in the columns of
the readers. Quantisation takes a row in blocks of 32 numbers with one scale: a large column in a
block costs its neighbours their precision. With w the norm's weight and the rows of all its
readers on top of each other in W (rows, D),

    r_j = |W e_j w_j|,    W e_j <- W e_j w_j / r_j,    w_j <- r_j,

up to a common factor, for which the mean square of w stays what it was. The function is the same.
In half precision r is a power of two, so that no number is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dotresize.least_squares import FLOAT
from dotresize.models import Architecture
from dotresize.models.causal_lm import CausalLM


def scale_norms(
    model: CausalLM, body: Callable[[nn.Module], nn.Module] = lambda layer: layer
) -> None:
    """Move scales into all norms of a model, in place: its layers' and that of an untied head.

    body: of a layer, which may have something around it, the decoder layer itself.
    """
    for name in model.layers:
        with model.resident(name) as layer:
            scale_layer(model.architecture, body(layer))
    scale_final_norm(model)


@torch.no_grad()
def scale_layer(architecture: Architecture, layer: nn.Module) -> None:
    """Move scales into the norms of one layer, in place."""
    for part in architecture.sublayers:
        readers = [layer.get_parameter(name) for name in part.readers]
        _move(architecture, layer.get_submodule(part.norm), readers)


@torch.no_grad()
def scale_final_norm(model: CausalLM) -> None:
    """Move the head's scales into the final norm; nothing where the head is the embedding."""
    if model.tied:
        return
    names = model.architecture.final_norm, model.architecture.head
    with model.resident(*names) as (norm, head):
        _move(model.architecture, norm, [head.weight])


def _move(architecture: Architecture, norm: nn.Module, readers: Sequence[Tensor]) -> None:
    if architecture.layer_norm:  # which has no weights
        return
    gain = architecture.gain(norm)
    total = torch.zeros_like(gain)
    for reader in readers:
        for rows in reader.flatten(0, -2).split(8192):  # no copy of all of a head
            total += rows.to(FLOAT).square().sum(0).to(total)
    size = total.sqrt() * gain.abs()
    # A channel that nothing reads, or that the norm silences, keeps what it has.
    sound = (size > 0) & torch.isfinite(size)
    if not sound.any():
        return
    size = size * (gain[sound].square().mean() / size[sound].square().mean()).sqrt()
    exact = readers[0].dtype.itemsize < 4
    if exact:
        power = (size / gain.abs()).log2().round()
        if architecture.norm_offset:  # 2^p - 1 fits into eight bits
            power = power.clamp(-7, 7)
        size = gain.abs() * torch.exp2(power)
    size = torch.where(sound, size * gain.sign(), gain)
    new = (size - architecture.norm_offset).to(norm.weight)  # type: ignore[arg-type]
    # What the weight really holds from now on, rounded as it is.
    held = new.to(FLOAT) + architecture.norm_offset
    sound &= (held == size) if exact else (held != 0)
    new = torch.where(sound, new, norm.weight)  # type: ignore[arg-type]
    factor = torch.where(sound, gain / held, torch.ones_like(gain))
    for reader in readers:
        reader.mul_(factor.to(reader.device, torch.promote_types(reader.dtype, torch.float32)))
    norm.weight.copy_(new)  # type: ignore[operator]
