"""Programs of one launch that wait for each other, in Triton's interpreter.

The interpreter runs one program after the other, so that a program which waits for a later one
would wait for ever. Here each has a thread, one of them runs at a time, and whoever waits lets
another one go on, in an order that a seed decides: a program that reads what another has not yet
written gives wrong results under some order.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime import interpreter

from dotresize.kernels import gluon_compat


class Turns:
    """Takes the place of a kernel; ``absent`` programs never run."""

    def __init__(self, kernel: Any, seed: int, absent: tuple[int, ...] = ()) -> None:
        self.kernel, self.order, self.absent = kernel, random.Random(seed), absent
        self.grid: int = 0  # of the last launch
        self._main = threading.Semaphore(0)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        self.grid = grid[0]
        return self._launch

    def _launch(self, **given: Any) -> None:
        function = self.kernel.rewrite()
        wanted = inspect.getfullargspec(function)
        names = {n for n, kind in wanted.annotations.items() if "constexpr" in str(kind)}
        arguments = {
            name: value if name in names else interpreter._implicit_cvt(value)
            for name, value in given.items()
            if name in wanted.args
        }
        builder = interpreter.interpreter_builder
        scope = interpreter._patch_lang(function)
        builder.set_grid_dim(self.grid, 1, 1)
        programs = {
            i: _Program(self._main, function, arguments)
            for i in range(self.grid)
            if i not in self.absent
        }
        try:
            with _waiting(lambda: programs[builder.grid_idx[0]].pause()):
                while running := [i for i, program in programs.items() if not program.done]:
                    i = self.order.choice(running)
                    builder.set_grid_idx(i, 0, 0)
                    programs[i].go_on()
                    self._main.acquire()
        finally:
            scope.restore()
        for program in programs.values():
            if program.failed is not None:
                raise program.failed


class _Program:
    def __init__(self, main: threading.Semaphore, function: Any, arguments: dict[str, Any]) -> None:
        self._main, self._mine = main, threading.Semaphore(0)
        self.done, self.failed = False, None
        threading.Thread(target=self._run, args=(function, arguments), daemon=True).start()

    def _run(self, function: Any, arguments: dict[str, Any]) -> None:
        self._mine.acquire()
        try:
            function(**arguments)
        except BaseException as error:  # the launch raises it
            self.failed = error
        self.done = True
        self._main.release()

    def go_on(self) -> None:
        self._mine.release()

    def pause(self) -> None:
        self._main.release()
        self._mine.acquire()


@contextmanager
def _waiting(turn: Callable[[], None]) -> Iterator[None]:
    gluon_compat.waiting.append(turn)
    try:
        yield
    finally:
        gluon_compat.waiting.remove(turn)
