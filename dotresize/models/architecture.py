"""What the rest of the package knows about a model: which weight has which axis on the residual."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sublayer:
    """A norm of the residual, the weights that read its output, the weight that writes back.

    Names are relative to the decoder layer. Readers are of shape (..., outputs, inputs) with the
    residual on the last axis, the writer has it on the last but one; what it writes is added to
    the residual. Leading axes are experts. Of a feed-forward with a gate the last reader is the
    half that is not gated; one without has one reader. Biases are found beside the weights.

    Attributes:
        stacked: equal parts that a feed-forward's readers hold one above the other, each with a
            row for every inner neuron.
        experts: whether there is a feed-forward for every expert, so that no single inner width
            exists and the writer is not refitted.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    stacked: int = 1
    experts: bool = False

    @property
    def block(self) -> str:
        """The module that holds readers and writer: attention, or the feed-forward."""
        return self.writer.partition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """Axis table of a family of decoder-only models, most with RMSNorm before each sublayer.

    Attributes:
        model_types: ``config.model_type`` values it serves.
        sublayers: of every layer, in order of execution.
        width_divisors: config entries that the loader requires to divide the width.
        width_multiple: what its kernels require to divide the width.
        norm_offset: what a norm adds to its weight.
        layer_norm: whether norms are LayerNorm without weights. They take off the mean over the
            channels, so the narrowed channels must have the mean of the old ones (maps.level).
        root_scaled: whether embeddings are multiplied by the root of the width.
        residual_multiplier: config entry that every writer's output is multiplied by.
        inner: config entry that holds the feed-forward width.
        fixed_residual: why no map passes the residual, which then keeps its width; of the
            sublayers only the feed-forward, the last, is named.
        stored: weights of a layer that files hold otherwise, by the names there, relative to the
            layer: one other name; or for what all experts have in one tensor, with {} for the
            number of an expert, the pieces that lie one above the other along its outputs.
        embedding, layers, final_norm, head: module names.
        positions: of the table of learned positions, where there is one.
    """

    model_types: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]
    width_divisors: tuple[str, ...] = ()
    width_multiple: int = 1
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    positions: str = ""
    norm_offset: float = 0.0
    layer_norm: bool = False
    root_scaled: bool = False
    residual_multiplier: str | None = None
    inner: str = "intermediate_size"
    fixed_residual: str = ""
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[str, ...]:
        """What the stream in front of the first layer is read from."""
        return (self.embedding, self.positions) if self.positions else (self.embedding,)

    def inner_width(self, config: Any) -> int:
        """Return the feed-forward width that a config asks for."""
        width = getattr(config, self.inner)
        return 4 * config.hidden_size if width is None else width  # GPT-2's way to say so

    def multiplier(self, config: Any) -> float:
        """Return what a writer's output is multiplied by before it is added to the residual."""
        return (
            1.0 if self.residual_multiplier is None else getattr(config, self.residual_multiplier)
        )

    def gain(self, norm: nn.Module) -> Tensor:
        """Return what a norm multiplies by, channel for channel, in float64."""
        if self.layer_norm:
            return torch.ones(
                cast(tuple[int], norm.normalized_shape), dtype=torch.float64, device="cpu"
            )
        return cast(Tensor, norm.weight).double() + self.norm_offset

    def stream_scale(self, width: int, narrow: int, tied: bool) -> float:
        """Return what the narrowed stream is multiplied by, against the projected dense one.

        sqrt(narrow / width) lets the norms see the same variance beside their eps. A tied head
        behind a norm without weights wants its inverse: nothing else there could undo it.
        """
        s = (narrow / width) ** 0.5
        return 1 / s if tied and self.layer_norm else s

    def table_scale(self, width: int, narrow: int, tied: bool) -> float:
        """Return what embeddings E Q are multiplied by for that, before the model's own factor."""
        own = (narrow / width) ** 0.5 if self.root_scaled else 1.0
        return self.stream_scale(width, narrow, tied) / own

    @property
    def has_inner_width(self) -> bool:
        """Whether the feed-forward blocks have one inner width that can be narrowed."""
        return not any(sublayer.experts for sublayer in self.sublayers)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where a layer has not the weights that this table names."""
        for layer, sublayer in self.each(model):
            for name in (*sublayer.readers, sublayer.writer):
                try:
                    model.get_parameter(f"{layer}.{name}")
                except AttributeError:
                    raise ValueError(
                        f"{layer} has no {name}: its layers are not all of one kind"
                    ) from None

    def each(self, model: nn.Module) -> Iterator[tuple[str, Sublayer]]:
        """Yield every sublayer in order of execution, with the name of its layer."""
        for i in range(len(model.get_submodule(self.layers))):  # type: ignore[arg-type]
            for sublayer in self.sublayers:
                yield f"{self.layers}.{i}", sublayer

    def norms(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield every norm of the residual with its name: the residual locations, in order."""
        for layer, sublayer in self.each(model):
            name = f"{layer}.{sublayer.norm}"
            yield name, model.get_submodule(name)
        yield self.final_norm, model.get_submodule(self.final_norm)

    def divisor(self, config: Any) -> int:
        """Return what the residual width of a loadable checkpoint is a multiple of."""
        entries = (int(getattr(config, name)) for name in self.width_divisors)
        return math.lcm(*entries, self.width_multiple)
