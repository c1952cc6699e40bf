"""Models whose weights lie in safetensors files, and are in memory a part at a time.

Code that walks through a model takes each part (a decoder layer, the embeddings, the final norm,
the head) by ``with resident(model, name) as part``. For a model in memory that is the module as it
is. For one on a shelf the module's weights are there during the block only, so that a model of any
size passes through the memory of one layer.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dotresize.models import architecture_of


class Shelf(Protocol):
    """Where the weights of a model are while they are not in it.

    Attributes:
        device: where they are put.
    """

    device: torch.device

    def take(self, name: str, part: nn.Module) -> None:
        """Fill the parameters of a part."""

    def give_back(self, name: str, part: nn.Module) -> None:
        """The part will be emptied."""


_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 2**20

# By model; the count is of blocks that hold a part.
_SHELVES: weakref.WeakKeyDictionary[nn.Module, tuple[Shelf, Counter[str]]]
_SHELVES = weakref.WeakKeyDictionary()


def put_on(shelf: Shelf, model: nn.Module) -> None:
    """From now on the model's weights are those of the shelf.

    And large blocks of memory go back to the system when they are freed: the C library would keep
    those below 32 MB, layer upon layer.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
    _SHELVES[model] = shelf, Counter()


def shelf_of(model: nn.Module) -> Shelf | None:
    """The model's shelf; None for a model in memory."""
    return _SHELVES[model][0] if model in _SHELVES else None


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes."""
    shelf = shelf_of(model)
    return next(model.parameters()).device if shelf is None else shelf.device


def layers(model: Any) -> list[str]:
    """Names of the decoder layers, in order of execution."""
    name = architecture_of(model.config).layers
    return [f"{name}.{i}" for i in range(len(model.get_submodule(name)))]


def parts(model: Any) -> list[str]:
    """Names of the parts, in order of execution; a tied head is one that shares its weight."""
    architecture = architecture_of(model.config)
    return [*architecture.tables, *layers(model), architecture.final_norm, architecture.head]


@contextmanager
def resident(model: Any, *names: str) -> Iterator[Any]:
    """Modules of a model (one alone, or a list) with their weights in memory."""
    found: Any = [model.get_submodule(name) for name in names]
    if model not in _SHELVES:
        yield found[0] if len(names) == 1 else found
        return
    shelf, held = _SHELVES[model]
    taken = []
    try:
        for name, part in zip(names, found, strict=True):
            if not held[name]:
                shelf.take(name, part)
            held[name] += 1
            taken.append((name, part))
        yield found[0] if len(names) == 1 else found
    finally:
        for name, part in taken:
            held[name] -= 1
            if not held[name]:
                shelf.give_back(name, part)
                empty(part)
        if not held.total():
            model.tie_weights()  # a tied head has its own weight only while it is used


def fill(part: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a part its parameters, by the names that it has for them."""
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(part.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))


def empty(part: nn.Module) -> None:
    """Leave the shapes of a part's parameters, without their memory."""
    fill(part, {name: weight.to("meta") for name, weight in part.named_parameters()})


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(kind: Any, config: Any, device: torch.device) -> Any:
    """A model of class ``kind`` whose parameters have no memory; its buffers are real.

    kind: a transformers model class, or an Auto class.
    """
    make = getattr(kind, "from_config", kind)
    with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
        model = make(config)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()
