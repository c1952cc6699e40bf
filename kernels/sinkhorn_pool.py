"""Solvers that wait for the next problems of their shapes.

Tables, buffers and captured graphs take longer to make than a small problem takes to solve. So a
solver goes back into the pool when it is done, and serves the next batch of the same shapes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

MOST = 8  # solvers that wait


class Sized(Protocol):
    @property
    def bytes(self) -> int: ...


_S = TypeVar("_S", bound=Sized)


class Pool(Generic[_S]):
    """Holds the last few solvers by what they are for; each serves one thread at a time."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Hashable, _S] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], _S], most_bytes: int) -> Iterator[_S]:
        """Lend a solver that waits, or a new one; one that fails does not come back.

        most_bytes: what all that wait may hold of memory; the oldest leave first.
        """
        with self._lock:
            solver = self._idle.pop(key, None)
        if solver is None:
            try:
                solver = make()
            except torch.OutOfMemoryError:  # of which those that wait may have the rest
                self.clear()
                solver = make()
        yield solver
        with self._lock:
            self._idle[key] = solver
            while len(self._idle) > MOST or self._held() > most_bytes:
                self._idle.popitem(last=False)

    def _held(self) -> int:
        return sum(solver.bytes for solver in self._idle.values())

    def clear(self) -> None:
        with self._lock:
            self._idle.clear()
