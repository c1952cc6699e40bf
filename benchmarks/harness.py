"""Timing of competitors that take turns, each result checked against float64 first.

The work is done in two processes that live through all rounds: one with the allocator as it is, and
one in which large arrays come from the heap (no mmap, nothing trimmed), so that a peer that frees
and takes large temporaries does not pay for page faults anew. Only one of them works at a time.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from .workload import Case, Workload, one_line

# Between two timings: a neighbour's thread pool spins for a few milliseconds after its work.
PAUSE_S = 0.02

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "heap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
}


class Worker:
    """A process that holds one workload and does what it is told, one call at a time."""

    def __init__(self, build: Callable[..., Workload], arguments: dict, threads: int, heap: str):
        self._arguments = (build, arguments, threads)
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._environment = ALLOCATORS[heap] | counts | {"JAX_PLATFORMS": "cpu"}
        self.competitors: dict[str, bool] = {}
        self.missing: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with _environment(self._environment):  # read when the process starts
            self._process = context.Process(target=_serve, args=(theirs, *self._arguments))
            self._process.start()
        theirs.close()
        try:
            self.competitors, self.missing = self._receive()
        except BaseException:
            self.close()
            raise

    def check(self, name: str) -> tuple[float, float | None, float]:
        """Return seconds of a call, its relative error (None for a bound), and what is accepted."""
        return self._ask("check", name)

    def seconds(self, name: str) -> float:
        time.sleep(PAUSE_S)
        return self._ask("time", name)

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _ask(self, what: str, name: str) -> Any:
        if not self._process.is_alive():
            self.close()
            self._start()
        self._pipe.send((what, name))
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"its process died, code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, build: Callable[..., Workload], arguments: dict, threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.environ.pop("TRITON_INTERPRET", None)  # a kernel in the interpreter is not worth timing
    torch.set_num_threads(threads)
    workload = build(**arguments)
    pipe.send(({n: c.temporaries for n, c in workload.competitors.items()}, workload.missing))
    with contextlib.suppress(EOFError):
        while True:
            what, name = pipe.recv()
            try:
                competitor = workload.competitors[name]
                start = time.perf_counter()
                result = competitor.call()
                seconds = time.perf_counter() - start
                if what == "check":
                    error = workload.error(result) if competitor.checked else None
                    pipe.send((seconds, error, competitor.accepted))
                else:
                    pipe.send(seconds)
                del result
            except Exception as error:  # a peer that fails is a row, not the end
                pipe.send(RuntimeError(one_line(error)))


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Pin this process and its children to the first so many processors, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    case: Case,
    build: Callable[..., Workload],
    *,
    rounds: int,
    threads: int,
    limit_s: float,
    peers: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time every competitor in every allocator that matters to it, in one interleaved run.

    A competitor that is wrong, fails, or needs more than ``limit_s`` for its first call gets a row
    that says so and is not timed further.
    """
    arguments = {"case": case, "peers": peers}
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(threads))
        workers = {
            heap: stack.enter_context(contextlib.closing(Worker(build, arguments, threads, heap)))
            for heap in ALLOCATORS
        }
        first = workers["default"]
        rows += [{"name": name, "missing": why} for name, why in first.missing.items()]
        runs: dict[tuple[str, str], dict[str, Any]] = {}
        for name, temporaries in first.competitors.items():
            for heap, worker in workers.items():
                if heap == "default" or temporaries:
                    say(f"checking {name} ({heap})")
                    row = {"name": name, "allocator": heap} | _checked(worker, name, limit_s)
                    rows.append(row)
                    if "failed" not in row:
                        runs[name, heap] = row
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for round_ in range(rounds):
            order = list(runs)
            start = round_ % max(1, len(order))  # not always behind the same neighbour
            for name, heap in order[start:] + order[:start]:
                say(f"round {round_ + 1} of {rounds}: {name} ({heap})")
                try:
                    times[name, heap].append(workers[heap].seconds(name))
                except RuntimeError as failure:
                    runs.pop((name, heap))["failed"] = str(failure)
    for key, row in runs.items():
        low, median, high = statistics.quantiles(times[key], n=4, method="inclusive")
        row |= {"rounds": rounds, "median_s": median, "quartiles_s": [low, high]}
        row |= {"best_s": min(times[key])}
    return [{"case": case.label, "operator": case.operator} | case.sizes | row for row in rows]


def _checked(worker: Worker, name: str, limit_s: float) -> dict[str, Any]:
    """Return the error of a first call, or why the competitor is not timed."""
    try:
        seconds, error, accepted = worker.check(name)
        if seconds < 4 * limit_s:  # the first call may have compiled
            seconds, error, accepted = worker.check(name)
    except RuntimeError as failure:
        return {"failed": str(failure)}
    if error is not None and not error <= accepted:
        shown = error if math.isfinite(error) else None
        return {"error": shown, "failed": f"relative error {error:.1e}, accepted {accepted:.0e}"}
    if seconds > limit_s:
        return {"error": error, "once_s": seconds, "failed": f"{seconds:.0f} s a call, not timed"}
    return {"error": error}
