"""LLM-Pruner's block-wise recipe with its Taylor rule (Ma et al., arXiv 2305.11627).

A unit's importance is the sum over its weights of |w g|, g the gradient of the loss on the
calibration text: of an inner neuron its rows of gate and up and its column of down, of a key-value
head the rows of query, key and value and the columns of the output projection that belong to it.
Units go within each layer, the same share in all layers but the first four and the last two (4 to
30 of a Llama's 32). No training follows, as for all that is compared here.

The attention's share is rounded down to whole heads, as by its code; the feed-forwards make up for
the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotresize.models.causal_lm import CausalLM

from .layers import Layer, Pruned, layers_of, least, to_remove

SKIPPED_FIRST, SKIPPED_LAST = 4, 2


def prune(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model without the units of least importance in each of the inner layers."""
    new = model.copied()
    layers = layers_of(new)
    inside = layers[SKIPPED_FIRST : len(layers) - SKIPPED_LAST]
    groups, neurons = counts(inside[0], len(inside), to_remove(new, share))
    take_gradients(new, tokens)
    removed = 0
    for layer in inside:
        gone = least(importance_of_groups(layer), groups)
        removed += layer.remove_neurons(least(importance_of_neurons(layer), neurons))
        removed += layer.remove_groups(gone)
    new.module.zero_grad(set_to_none=True)
    return Pruned(new, removed, {"layers": len(inside), "groups": groups, "neurons": neurons})


def counts(layer: Layer, layers: int, wanted: int) -> tuple[int, int]:
    """Return how many groups and neurons go in each of so many layers, so many parameters."""
    each = wanted / layers
    part = each / (layer.of_attention + layer.of_feed_forward)
    if part >= 1:
        raise ValueError(f"LLM-Pruner: {layers} layers have not {wanted} parameters to remove")
    groups = int(part * layer.groups + 1e-3)  # a whole number of them stays whole
    neurons = round((each - groups * layer.of_group) / layer.of_neuron)
    if neurons >= layer.inner:
        raise ValueError(f"LLM-Pruner: {layers} feed-forwards have not so many neurons to remove")
    return groups, neurons


def take_gradients(model: CausalLM, tokens: Tensor) -> None:
    """Leave the gradients of the mean loss on the tokens at the layers' weights."""
    model.module.requires_grad_(False)
    for name in model.layers:
        model.module.get_submodule(name).requires_grad_(True)
    with torch.enable_grad():
        for window in tokens.split(1):
            found = model.module(input_ids=window, labels=window, use_cache=False)
            (found.loss / len(tokens)).backward()


def importance_of_neurons(layer: Layer) -> Tensor:
    return _salience(layer.gate).sum(1) + _salience(layer.up).sum(1) + _salience(layer.down).sum(0)


def importance_of_groups(layer: Layer) -> Tensor:
    return sum(
        (one.view(layer.groups, -1).sum(1) for one in _of_rows(layer)), torch.zeros(layer.groups)
    )


def _of_rows(layer: Layer) -> list[Tensor]:
    readers = [_salience(linear).sum(1) for linear in (layer.q, layer.k, layer.v)]
    return [*readers, _salience(layer.o).sum(0)]


def _salience(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight.detach() * linear.weight.grad).abs()
