"""Gluon, or its stand-in for the interpreter.

Gluon is Triton with explicit layouts and shared memory: it says which thread holds which entry of a
block, and what a program keeps beside its registers. Triton's interpreter does not know it. There,
``gl`` is Triton itself with every layout dropped, so that one kernel text runs in both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


class _Chunk:
    """A part of shared memory: a block as it was stored, or some entries of a row."""

    def __init__(self, rows: list[Any], row: int, start: int, length: int | None) -> None:
        self._rows, self._row, self._start, self._length = rows, row, start, length

    def slice(self, start: int, length: int) -> _Chunk:
        return _Chunk(self._rows, self._row, self._start + start, length)

    def store(self, value: Any) -> None:
        self._rows[self._row] = value

    def load(self, layout: None) -> Any:
        if self._length is None:
            return self._rows[self._row]
        return tl.gather(self._rows[self._row], self._start + tl.arange(0, self._length), 0)


class _Shared:
    """Rows of shared memory, or whole blocks of it."""

    def __init__(self, shape: list[int]) -> None:
        self._rows = [None] * shape[0]
        self._length = shape[1] if len(shape) == 2 else None

    def index(self, row: Any) -> _Chunk:
        return _Chunk(self._rows, operator.index(row), 0, self._length)


class _WithoutLayouts:
    """``triton.language`` under the names and arguments of Gluon."""

    def BlockedLayout(self, *_: Any) -> None:
        return None

    SliceLayout = SwizzledSharedLayout = BlockedLayout

    def allocate_shared_memory(self, kind: Any, shape: list[int], layout: None) -> _Shared:
        return _Shared(shape)

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(tl, name), tl.dtype):
            return getattr(tl, name)
        # Looked up at each call: the interpreter puts its own functions into the module.
        return lambda *args, layout=None, **kwargs: getattr(tl, name)(*args, **kwargs)


if triton.knobs.runtime.interpret:
    gl: Any = _WithoutLayouts()
    jit, async_copy, async_load = triton.jit, None, None

    def barrier() -> None:
        """Do nothing: an interpreted program has no threads."""

    # What a program does while it waits for others: none of them runs, unless a test has them take
    # turns.
    waiting: list[Callable[[], None]] = []

    def wait_for_others() -> None:
        for turn in waiting:
            turn()
else:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    # Renamed after triton 3.6.
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier

    @jit
    def wait_for_others():
        pass


__all__ = ["async_copy", "async_load", "barrier", "gl", "jit", "wait_for_others"]
