"""What the rest of the package knows about a model: which weight has which axis on the residual."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sublayer:
    """A norm of the residual, the linears that read its output, the linear that writes back.

    Names are relative to the decoder layer. Readers are ``nn.Linear`` with the residual on their
    input axis, the writer has it on its output axis; what it writes is added to the residual.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str

    @property
    def block(self) -> str:
        """The module that holds readers and writer: attention, or the feed-forward."""
        return self.writer.rpartition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """Axis table of a family of decoder-only models with RMSNorm before each sublayer.

    Attributes:
        model_types: ``config.model_type`` values it serves.
        sublayers: of every layer, in order of execution.
        width_divisors: config entries that the loader requires to divide the width.
        embedding, layers, final_norm, head: module names.
    """

    model_types: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]
    width_divisors: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def each(self, model: nn.Module) -> Iterator[tuple[str, Sublayer]]:
        """Every sublayer in order of execution, with the name of its layer."""
        for i in range(len(model.get_submodule(self.layers))):  # type: ignore[arg-type]
            for sublayer in self.sublayers:
                yield f"{self.layers}.{i}", sublayer

    def norms(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Every norm of the residual stream with its name: the residual locations, in order."""
        for layer, sublayer in self.each(model):
            name = f"{layer}.{sublayer.norm}"
            yield name, model.get_submodule(name)
        yield self.final_norm, model.get_submodule(self.final_norm)

    def divisor(self, config: Any) -> int:
        """The residual width of a loadable checkpoint is a multiple of this."""
        return math.lcm(*(int(getattr(config, name)) for name in self.width_divisors), 1)
