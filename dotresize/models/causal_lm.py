"""One handle for a causal language model: its modules, its architecture, where its weights live.

Code that walks through a model takes each part (a decoder layer, the embeddings, the final norm,
the head) by ``with model.resident(name) as part``. For a model in memory that is the module as it
is. For an offloaded one (dotresize.offload) the module's weights are there during the block only,
so that a model of any size passes through the memory of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.models import Architecture, architecture_of
from dotresize.models.layer_widths import inner_widths, written_config
from dotresize.models.resized import class_for
from dotresize.models.skeleton import skeleton


class PartMaker(Protocol):
    """What another model's weights are computed by, a part at a time.

    Attributes:
        config: of the model that is made.
        tied: whether that keeps one table for embedding and head, so that the head has no part.
        inner_widths: of its feed-forwards, by layer; an empty list where layers have experts.
    """

    config: Any
    tied: bool
    inner_widths: list[int]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a part, by their names in it."""


class Store(Protocol):
    """Where the weights of a model live.

    Attributes:
        whole: whether all of them are in memory at once, so that the model can simply be called.
        activations: where activations between layers are kept (``calibration.ActivationCache``);
            None where that depends on the room there is.
    """

    whole: bool
    activations: str | None

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""

    @property
    def computed_bytes(self) -> int:
        """The bytes of a number in the model's computations."""

    @property
    def written_bytes(self) -> int:
        """The bytes of a number in the files that the model, or what is made of it, becomes."""

    def resident(self, names: tuple[str, ...]) -> AbstractContextManager[list[Any]]:
        """Hold the weights of some parts in memory for a block."""

    def derived(self, maker: PartMaker) -> CausalLM:
        """Return a model made of other weights, which lives in a like store."""

    def copied(self) -> CausalLM:
        """Return a copy of the model, which lives in a like store."""

    def finish(self) -> None:
        """Write what is still to be written of a derived model."""

    def save(self, folder: Path) -> None:
        """Write config and weights into a directory."""


class CausalLM:
    """A causal language model.

    Attributes:
        module: the transformers model.
        store: where its weights live.
    """

    def __init__(self, module: Any, store: Store) -> None:
        self.module = module
        self.store = store

    @classmethod
    def in_memory(cls, module: Any) -> CausalLM:
        """Return the handle of a transformers model."""
        return cls(module, InMemory(module))

    @cached_property
    def architecture(self) -> Architecture:
        """The axis table of the model's family; ValueError for a family that has none."""
        return architecture_of(self.module.config)

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.store.device

    @property
    def width(self) -> int:
        """The residual width."""
        return self.config.hidden_size

    @property
    def inner_width(self) -> int:
        """The feed-forward width; of layers of different widths the largest."""
        return self.architecture.inner_width(self.config)

    @property
    def inner_widths(self) -> list[int]:
        """The feed-forward width of every layer; an empty list where layers have experts."""
        return inner_widths(self.architecture, self.module)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return is_tied(self.config)

    @property
    def layers(self) -> list[str]:
        """Names of the decoder layers, in order of execution."""
        name = self.architecture.layers
        return [f"{name}.{i}" for i in range(len(self.module.get_submodule(name)))]

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in order of execution; a tied head is one that shares its weight."""
        architecture = self.architecture
        return [*architecture.tables, *self.layers, architecture.final_norm, architecture.head]

    @contextmanager
    def resident(self, *names: str) -> Iterator[Any]:
        """Yield parts (one alone, or a list) whose weights are in memory during the block."""
        with self.store.resident(names) as modules:
            yield modules[0] if len(names) == 1 else modules

    def derived(self, maker: PartMaker) -> CausalLM:
        """Return a model made of other weights; this one is untouched."""
        return self.store.derived(maker)

    def copied(self) -> CausalLM:
        """Return a copy of the model."""
        return self.store.copied()

    def finish(self) -> None:
        """Write what is still to be written of a derived model."""
        self.store.finish()

    def save(self, folder: Path) -> None:
        """Write config and weights into a directory."""
        self.store.save(folder)


class InMemory:
    """All weights are in the model."""

    whole = True
    activations: str | None = None

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def computed_bytes(self) -> int:
        return next(self._module.parameters()).element_size()

    @property
    def written_bytes(self) -> int:
        return self.computed_bytes

    @contextmanager
    def resident(self, names: tuple[str, ...]) -> Iterator[list[Any]]:
        yield [self._module.get_submodule(name) for name in names]

    def derived(self, maker: PartMaker) -> CausalLM:
        module = self._module
        architecture = architecture_of(module.config)
        kind = class_for(module, maker.config)
        new = skeleton(kind, maker.config, self.device, maker.inner_widths)
        weights: dict[str, Tensor] = {}
        parts = CausalLM.in_memory(new).parts
        for name in tqdm(parts, desc="absorb", unit="part", disable=None):
            weights |= {f"{name}.{key}": value for key, value in maker.part(name).items()}
        if maker.tied:
            head, table = (f"{name}.weight" for name in (architecture.head, architecture.embedding))
            weights[head] = weights[table]
        # Assigned, not copied: every weight keeps the dtype it has in the given model.
        new.load_state_dict(weights, assign=True)
        new.tie_weights()
        new.to(self.device).requires_grad_()
        new.generation_config = copy.deepcopy(module.generation_config)
        return CausalLM.in_memory(new)

    def copied(self) -> CausalLM:
        return CausalLM.in_memory(copy.deepcopy(self._module))

    def finish(self) -> None:
        """Nothing: a model in memory is written by ``save`` alone."""

    def save(self, folder: Path) -> None:
        self._module.save_pretrained(folder)
        save_config(self._module, folder)


def save_config(module: Any, folder: Path) -> None:
    """Write the config of a directory, which may name the width of every layer."""
    architecture = architecture_of(module.config)
    widths = inner_widths(architecture, module)
    written_config(architecture, module.config, widths).save_pretrained(folder)


def is_tied(config: Any) -> bool:
    """Return whether embedding and head are one tensor."""
    return bool(getattr(config, "tie_word_embeddings", False))


def fill(part: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a part its parameters, by the names that it has for them."""
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(part.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
