"""Stacks of layers with a feed-forward each, of every family, as their merging sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dotresize.models import FAMILIES


@dataclass(frozen=True)
class Stack:
    """Layers of one kind; names of weights are relative to a layer.

    Attributes:
        name: what it is called beside others of the same model.
        layers: name of the module list.
        readers: weights from the layer's stream to the inner neurons, with a bias beside each or
            none. The last one's outputs are what a neuron is known by: in front of the
            non-linearity, and of a gated pair the half that is not gated.
        writer: weight from the inner neurons back.
        stacked: equal parts that readers hold one above the other.
        mask: the model input that says which of its tokens count; None where all do.
    """

    name: str
    layers: str
    readers: tuple[str, ...]
    writer: str
    stacked: int = 1
    mask: str | None = "attention_mask"

    @property
    def weights(self) -> tuple[str, ...]:
        """Readers, writer, and the biases beside them; not every layer has these."""
        names = (*self.readers, self.writer)
        return (*names, *(name.removesuffix("weight") + "bias" for name in names))


_READERS, _WRITER = ("fc1.weight",), "fc2.weight"

STACKS: dict[str, tuple[Stack, ...]] = {
    "vit": (Stack("encoder", "vit.layers", ("mlp.fc1.weight",), "mlp.fc2.weight", mask=None),),
    "marian": (
        Stack("encoder", "model.encoder.layers", _READERS, _WRITER),
        Stack("decoder", "model.decoder.layers", _READERS, _WRITER, mask="decoder_attention_mask"),
    ),
}
for _family in FAMILIES:
    _part = _family.sublayers[-1]
    if _family.has_inner_width:
        _stack = Stack("decoder", _family.layers, _part.readers, _part.writer, _part.stacked)
        STACKS |= dict.fromkeys(_family.model_types, (_stack,))


def stacks_of(model: Any) -> tuple[Stack, ...]:
    """Return the stacks of a model.

    Raises ValueError naming its type and what is supported, or what it lacks.
    """
    kind = model.config.model_type
    if kind not in STACKS:
        raise ValueError(
            f"architecture {kind!r} has no feed-forwards known here; known: "
            f"{', '.join(sorted(STACKS))}"
        )
    for stack in STACKS[kind]:
        for i in range(len(layers_of(model, stack))):
            for name in (*stack.readers, stack.writer):
                _check(model, f"{stack.layers}.{i}.{name}")
    return STACKS[kind]


def layers_of(model: Any, stack: Stack) -> nn.ModuleList:
    """Return the stack's layers; ValueError where this class of model has none by that name."""
    try:
        return model.get_submodule(stack.layers)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no {stack.layers}") from None


def _check(model: Any, name: str) -> None:
    try:
        model.get_parameter(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no {name}") from None
