"""One thread at a time works through a model in memory, whatever the caller's threads do."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from dotresize.models.causal_lm import CausalLM

P = ParamSpec("P")
T = TypeVar("T")


class _Locks:
    """A lock for each model that is in use."""

    def __init__(self) -> None:
        self._registry = threading.Lock()
        self._locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

    def of(self, module: Any) -> Any:
        """Return the lock of a model: one with shallow copies of it, and with its base model."""
        # The first module with a weight is the same in all of these.
        key = next((part for part in module.modules() if part._parameters), module)
        with self._registry:
            return self._locks.setdefault(key, threading.RLock())


_locks = _Locks()
if hasattr(os, "register_at_fork"):
    # A child has none of the threads that may hold a lock.
    os.register_at_fork(after_in_child=_locks.__init__)  # type: ignore[misc]


@contextmanager
def alone_with(module: Any) -> Iterator[None]:
    """Wait until no other thread is in such a block with this model, or a shallow copy of it.

    Calibration hooks into the model's own layers, stops them early and turns their training off:
    a second thread's would meet the first one's hooks. Its own thread may enter again. Plain calls
    of the model, a user's or those of a training, do not wait.
    """
    with _locks.of(module):
        yield


def alone(
    function: Callable[Concatenate[CausalLM, P], T],
) -> Callable[Concatenate[CausalLM, P], T]:
    """Return a function of a model that runs in ``alone_with`` it."""

    @functools.wraps(function)
    def run(model: CausalLM, *args: P.args, **kwargs: P.kwargs) -> T:
        with alone_with(model.module):
            return function(model, *args, **kwargs)

    return run
