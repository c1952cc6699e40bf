"""One thread at a time works through a model in memory, whatever the caller's threads do."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from dotresize.models.causal_lm import CausalLM

P = ParamSpec("P")
T = TypeVar("T")

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_registry = threading.Lock()


@contextmanager
def alone_with(module: Any) -> Iterator[None]:
    """Wait until no other thread is in such a block with this model, or a shallow copy of it.

    Calibration hooks into the model's own layers, stops them early and turns their training off:
    a second thread's would meet the first one's hooks. Its own thread may enter again.
    """
    # A shallow copy, as of a model that is not tied after all, has the same modules in it.
    key = next(iter(module.children()), module)
    with _registry:
        lock = _locks.setdefault(key, threading.RLock())
    with lock:
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
