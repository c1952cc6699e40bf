"""Feed-forwards made one: averaged after alignment, with one storage for all of them.

With P_i the alignment of layer i to the anchor (a permutation, or doubly stochastic):

    W_in* = mean P_i W_in_i    b_in* = mean P_i b_in_i    W_out* = mean W_out_i P_i'
    b_out* = mean b_out_i
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dotresize.least_squares import FLOAT
from dotresize.models.stacks import Stack, layers_of, stacks_of


def merged(
    model: Any, stack: Stack, window: list[int], alignments: list[Tensor | None]
) -> dict[str, nn.Parameter]:
    """Return the average of a window's feed-forwards, by the names of their weights in a layer.

    alignments: of each layer of the window to the anchor, as ``Aligner`` gives them; None
    leaves a layer as it is.
    """
    layers = [layers_of(model, stack)[i] for i in window]
    found: dict[str, nn.Parameter] = {}
    for name in stack.weights:
        first = _parameter(layers[0], name)
        if first is None:
            continue
        pairs = zip(layers, alignments, strict=True)
        mean = torch.stack([_aligned(layer, name, stack, p) for layer, p in pairs]).mean(0)
        found[name] = nn.Parameter(mean.to(first.dtype), requires_grad=first.requires_grad)
    return found


def tie(
    model: Any, stack: Stack, window: list[int], shared: dict[str, nn.Parameter]
) -> list[list[str]]:
    """Put the same parameters into every layer of the window; the names that each now has."""
    for i in window:
        for name, parameter in shared.items():
            owner, last = _owner(layers_of(model, stack)[i], name)
            setattr(owner, last, parameter)
    return [[f"{stack.layers}.{i}.{name}" for i in window] for name in shared]


@contextmanager
def tied(
    model: Any, stack: Stack, window: list[int], shared: dict[str, nn.Parameter]
) -> Iterator[None]:
    """Tie a window, as ``tie`` does, for the length of a block."""
    layers = layers_of(model, stack)
    before = [{name: _parameter(layers[i], name) for name in shared} for i in window]
    tie(model, stack, window, shared)
    try:
        yield
    finally:
        for i, parameters in zip(window, before, strict=True):
            for name, parameter in parameters.items():
                owner, last = _owner(layers[i], name)
                setattr(owner, last, parameter)


@contextmanager
def dropped(model: Any, gone: dict[str, list[int]]) -> Iterator[int]:
    """Let the stream pass layers by for the length of a block; yields the parameters they have.

    gone: numbers of layers, by the name of their stack. Without layer 0, in which a cache counts
    its tokens, text is generated without a cache.
    """
    parameters = 0
    changed: list[nn.Module] = []
    generation = getattr(model, "generation_config", None)
    cached = None if generation is None else generation.use_cache
    for stack in stacks_of(model):
        layers = layers_of(model, stack)
        for i in gone.get(stack.name, []):
            parameters += sum(p.numel() for p in layers[i].parameters())
            layers[i].forward = partial(_pass_by, stack.items)  # in front of the method
            changed.append(layers[i])
    if generation is not None and any(0 in numbers for numbers in gone.values()):
        generation.use_cache = False
    try:
        yield parameters
    finally:
        for layer in changed:
            del layer.forward
        if generation is not None:
            generation.use_cache = cached


def gone_of(stacks: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Return the layers of each window but its anchor, which ``dropped`` takes.

    stacks: of the report of ``merge_feed_forward``.
    """
    return {
        name: [i for i in found["window"] if i != found["anchor"]] for name, found in stacks.items()
    }


def _pass_by(items: int, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    return (hidden_states, *([None] * (items - 1))) if items else hidden_states


def _owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, last = name.rpartition(".")
    return layer.get_submodule(module), last


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    owner, last = _owner(layer, name)
    return getattr(owner, last, None)


def _aligned(layer: nn.Module, name: str, stack: Stack, alignment: Tensor | None) -> Tensor:
    """Return a weight or bias, float64, its inner neurons in the anchor's order."""
    owner, last = _owner(layer, name)
    value = getattr(owner, last).detach().to(FLOAT)
    writes = name.startswith(stack.writer.removesuffix("weight"))
    if alignment is None or (writes and last == "bias"):
        return value
    # nn.Linear has its outputs first, Conv1D its inputs.
    outputs_first = isinstance(owner, nn.Linear) or last == "bias"
    axis = int(outputs_first == writes)
    stacked = 1 if writes else stack.stacked
    parts = value.chunk(stacked, axis)
    return torch.cat([_in_order(part, alignment, axis) for part in parts], axis)


def _in_order(value: Tensor, alignment: Tensor, axis: int) -> Tensor:
    if alignment.dtype == torch.int64:
        return value.index_select(axis, alignment)
    return torch.tensordot(alignment.to(value), value, ([1], [axis])).movedim(0, axis)
