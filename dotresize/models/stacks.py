"""Stacks of layers with a feed-forward each, of every family, as their merging sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        stride: how many numbers of the mask there are for a token, whose first counts.
        items: how many a layer returns as a tuple, the stream first; 0 for the stream alone.
    """

    name: str
    layers: str
    readers: tuple[str, ...]
    writer: str
    stacked: int = 1
    mask: str | None = "attention_mask"
    stride: int = 1
    items: int = 0

    @property
    def weights(self) -> tuple[str, ...]:
        """Readers, writer, and the biases beside them; not every layer has these."""
        names = (*self.readers, self.writer)
        return (*names, *(name.removesuffix("weight") + "bias" for name in names))


_READERS, _WRITER = ("fc1.weight",), "fc2.weight"
_DECODER = Stack(
    "decoder", "model.decoder.layers", _READERS, _WRITER, mask="decoder_attention_mask"
)
_TRANSLATOR = Stack("encoder", "model.encoder.layers", _READERS, _WRITER), _DECODER


def _of_images(layers: str) -> tuple[Stack]:
    return (Stack("encoder", layers, ("mlp.fc1.weight",), "mlp.fc2.weight", mask=None),)


def _of_text(prefix: str, items: int = 0) -> tuple[Stack]:
    reader, writer = "intermediate.dense.weight", "output.dense.weight"
    return (Stack("encoder", f"{prefix}.encoder.layer", (reader,), writer, items=items),)


STACKS: dict[str, tuple[Stack, ...]] = {
    "beit": _of_images("beit.layers"),
    "deit": _of_images("deit.layers"),
    "dinov2": _of_images("dinov2.encoder.layer"),
    "vit": _of_images("vit.layers"),
    **dict.fromkeys(("bart", "m2m_100", "marian", "mbart"), _TRANSLATOR),
    # A convolution makes one token of two frames.
    "whisper": (replace(_TRANSLATOR[0], stride=2), _DECODER),
    "bert": _of_text("bert"),
    "camembert": _of_text("roberta"),
    "deberta-v2": _of_text("deberta", items=2),
    "distilbert": (
        Stack("encoder", "distilbert.transformer.layer", ("ffn.lin1.weight",), "ffn.lin2.weight"),
    ),
    "electra": _of_text("electra"),
    "modernbert": (Stack("encoder", "model.layers", ("mlp.Wi.weight",), "mlp.Wo.weight", 2),),
    "mpnet": _of_text("mpnet", items=1),
    "roberta": _of_text("roberta"),
    "xlm-roberta": _of_text("roberta"),
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
