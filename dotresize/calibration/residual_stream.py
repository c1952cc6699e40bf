"""The residual stream of many tokens, moved through a model one layer at a time.

What a layer reads and writes for all calibration tokens lies where there is room for it
(offload/memory_plan.py), by default in temporary files, so that resident memory is that of one
batch, however many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.models import Architecture, Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.linear import linear_of
from dotresize.offload.memory_plan import activation_place


class StopForward(Exception):
    """An exception that leaves a forward pass whose rest is not needed."""


class Streams:
    """The stream in front of a layer for every batch, and what the model passes to its layers.

    The arguments (positions, masks, rotary tables) are those that the model's own forward pass
    gives to each of its layers; they are replayed, so that no forward code is copied from any
    release, and layers with masks of their own (sliding windows) get them.

    Attributes:
        batches: int64 (windows, length) each.
        stream: (windows, length, width) per batch, in front of the next layer.
        place: where that is kept.
    """

    def __init__(
        self, model: CausalLM, tokens: Tensor, batch_windows: int, place: str | None = None
    ) -> None:
        """Run the model up to its first layer.

        Args:
            tokens: int64 (windows, length) of all processes.
            place: where the stream is kept between layers (``ActivationCache``); by default where
                the model's are.
        """
        self._architecture = model.architecture
        self._module = model.module
        self._layers = [model.module.get_submodule(name) for name in model.layers]
        self._device = model.device
        self.place = activation_place(model, tokens) if place is None else place
        mine = distributed.share(tokens)
        self.batches = mine.split(batch_windows) if len(mine) else ()
        self.stream = ActivationCache(len(self.batches), self.place)
        self._arguments: dict[nn.Module, list[tuple[tuple, dict]]] = {
            layer: [] for layer in self._layers
        }
        self._shared = _Shared()
        with (
            model.resident(*self._architecture.tables),
            _replaced({layer: self._catcher(layer) for layer in self._layers}),
        ):
            for ids in self.batches:
                try:
                    self._module(input_ids=ids.to(self._device), use_cache=False)
                except StopForward:
                    continue

    def close(self) -> None:
        """Let the streams go."""
        self.stream.close()

    def logits(
        self, i: int, stream: Tensor | None = None, windows: slice = slice(None), every: int = 1
    ) -> Tensor:
        """Return the logits of batch i, from a stream that has passed all layers.

        The final norm and the head must be resident.

        stream: another one than the batch's, of some of its windows; every: one token of so many.
        """
        tables = [self._module.get_submodule(name) for name in self._architecture.tables]
        stream = (self.stream[i] if stream is None else stream)[:, ::every]

        def as_found(*_: Any, **__: Any) -> Tensor:
            return stream

        with _replaced(dict.fromkeys([*tables, *self._layers], as_found)):
            ids = self.batches[i][windows, ::every].to(self._device)
            return self._module(input_ids=ids, use_cache=False).logits

    def _catcher(self, layer: nn.Module) -> Callable:
        def catch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            i = len(self._arguments[layer])
            self._arguments[layer].append(self._shared((args, kwargs)))
            if layer is self._layers[0]:
                self.stream[i] = hidden_states
            if layer is self._layers[-1]:
                raise StopForward
            return hidden_states

        return catch

    def __len__(self) -> int:
        return len(self.stream)

    def pass_layer(self, layer: nn.Module) -> None:
        """Move the stream past a layer."""
        for i in range(len(self)):
            self.stream[i] = self.run(layer, i)

    def run(self, layer: nn.Module, i: int, stream: Tensor | None = None) -> Tensor:
        """Return the layer's output for batch i, or for another stream of these tokens."""
        args, kwargs = self._arguments[layer][i]
        out = layer(self.stream[i] if stream is None else stream, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def until(self, layer: nn.Module, module: nn.Module, i: int) -> Tensor:
        """Return what a module inside the layer reads for batch i; nothing after it is run."""
        return _input_of(module, lambda: self.run(layer, i))


class _Shared:
    """A map from equal tensors to one: masks are made anew for every batch, all the same."""

    def __init__(self) -> None:
        self._kept: dict[tuple, list[Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._one(value)
        if isinstance(value, dict):
            return {name: self(one) for name, one in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(one) for one in value)
        return value

    def _one(self, value: Tensor) -> Tensor:
        kept = self._kept.setdefault((value.shape, value.dtype), [])
        for other in kept:
            if other is value or torch.equal(other, value):
                return other
        kept.append(value)
        return value


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replace the forward functions of some modules during the block, on the instances."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def inner_neurons(layer: nn.Module, part: Sublayer, stream: Tensor) -> Tensor:
    """Return what a feed-forward's writer reads when ``stream`` is what its norm reads."""
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
    """Yield a list of what the modules deliver during the block, in order of execution."""
    seen: list[Tensor] = []
    with _hooked([module.register_forward_hook(_keeping(seen, 2)) for module in modules]):
        yield seen


@contextmanager
def captured_inputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list of what the modules read during the block, in order of execution."""
    seen: list[Tensor] = []
    with _hooked([module.register_forward_pre_hook(_keeping(seen, 1)) for module in modules]):
        yield seen


def _keeping(seen: list[Tensor], which: int) -> Callable:
    """Return a hook that keeps one of its arguments: 1 what a module reads, 2 what it delivers."""

    def keep(*given: Any) -> None:
        value = given[which]
        seen.append(value[0] if isinstance(value, tuple) else value)

    return keep


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_of(architecture: Architecture, layer: nn.Module) -> list[nn.Module]:
    """Return the norms of the residual inside a layer, in order of execution."""
    return [layer.get_submodule(part.norm) for part in architecture.sublayers]
