"""The residual stream of many tokens, moved through a model one layer at a time.

What a layer reads and writes for all calibration tokens lies in memory-mapped temporary files, so
that resident memory is that of one batch, however many tokens there are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dotresize.linear import linear_of
from dotresize.models import Architecture, Sublayer, architecture_of


class StopForward(Exception):
    """Raised in a hook to leave a forward pass whose rest is not needed."""


class Spill:
    """A list of tensors, one per batch, each in a memory-mapped temporary file (see TMPDIR).

    Entries come back on the device they came from. The files have no names: however the process
    ends, nothing is left of them.
    """

    def __init__(self, count: int) -> None:
        self._entries: list[Tensor | None] = [None] * count
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, i: int, value: Tensor) -> None:
        self._device = value.device
        entry = self._entries[i]
        if entry is None or entry.shape != value.shape or entry.dtype != value.dtype:
            entry = _mapped(value.numel(), value.dtype).view(value.shape)
            self._entries[i] = entry
        entry.copy_(value)

    def __getitem__(self, i: int) -> Tensor:
        entry = self._entries[i]
        if entry is None:
            raise IndexError(f"batch {i} was never written")
        return entry.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def _mapped(count: int, dtype: torch.dtype) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="dotresize-") as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; found out while writing to the map, it is a crash.
            os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype)


class Streams:
    """The stream in front of a layer for every batch, and what the model passes to its layers.

    The arguments (positions, masks, rotary tables) are those that the model's own forward pass
    gives to each of its layers; they are replayed, so that no forward code is copied from any
    release, and layers with masks of their own (sliding windows) get them.

    Attributes:
        stream: (windows, length, width) per batch, in front of the next layer.
    """

    def __init__(self, model: Any, tokens: Tensor, batch_windows: int) -> None:
        """tokens: int64 (windows, length)."""
        architecture = architecture_of(model.config)
        self._layers = list(model.get_submodule(architecture.layers))
        batches = tokens.split(batch_windows)
        self.stream = Spill(len(batches))
        self._arguments: dict[nn.Module, list[tuple[tuple, dict]]] = {
            layer: [] for layer in self._layers
        }
        device = next(model.parameters()).device
        for layer in self._layers:
            layer.forward = self._catcher(layer)  # on the instance, in front of the method
        try:
            for ids in batches:
                try:
                    model(input_ids=ids.to(device), use_cache=False)
                except StopForward:
                    continue
        finally:
            for layer in self._layers:
                del layer.forward

    def _catcher(self, layer: nn.Module) -> Callable:
        def catch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            i = len(self._arguments[layer])
            self._arguments[layer].append((args, kwargs))
            if layer is self._layers[0]:
                self.stream[i] = hidden_states
            if layer is self._layers[-1]:
                raise StopForward
            return hidden_states

        return catch

    def __len__(self) -> int:
        return len(self.stream)

    def run(self, layer: nn.Module, i: int) -> Tensor:
        """The layer's output for batch i."""
        args, kwargs = self._arguments[layer][i]
        out = layer(self.stream[i], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def until(self, layer: nn.Module, module: nn.Module, i: int) -> Tensor:
        """What a module inside the layer reads for batch i; nothing after it is run."""
        return _input_of(module, lambda: self.run(layer, i))


def inner_neurons(layer: nn.Module, part: Sublayer, stream: Tensor) -> Tensor:
    """What a feed-forward's writer reads when ``stream`` is what its norm reads."""
    block = layer.get_submodule(part.block)
    norm = layer.get_submodule(part.norm)
    writer = linear_of(layer, part.writer)
    return _input_of(writer, lambda: block(norm(stream)))


def _input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise StopForward

    handle = module.register_forward_pre_hook(keep)
    try:
        run()
    except StopForward:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def captured(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What each of the modules delivers, in order of execution, during the block."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def norms_of(architecture: Architecture, layer: nn.Module) -> list[nn.Module]:
    """The norms of the residual inside a layer, in order of execution."""
    return [layer.get_submodule(part.norm) for part in architecture.sublayers]
