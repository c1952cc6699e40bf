"""Iterations of two alternating kinds, launched as CUDA graphs and watched without waiting."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

CHECK_EVERY = 16  # iterations between two looks at the status
# Iterations in a graph; even, as two kinds take turns. To capture one takes the host longer than it
# takes the device; one of 4096 x 3072 took 37 us in graphs of two, 30 us in graphs of eight (H200).
IN_GRAPH = 8
FIRST = 2  # iterations before that, even too: they compile the kernels


class Steps:
    """``step(0)``, ``step(1)``, ``step(0)``, ... on the same memory, for one run after another.

    What is captured in one run serves the next ones: steps must not depend on anything else.
    """

    def __init__(self, step: Callable[[int], None], status: Tensor) -> None:
        self._step, self._status = step, status
        self._graph: torch.cuda.CUDAGraph | None = None
        self._looks: list[tuple[Tensor, torch.cuda.Event]] = []

    def run(self, total: int, running: int) -> None:
        """Do ``total`` steps, or fewer once no status is ``running``."""
        done = looks = 0
        next_look = CHECK_EVERY
        while done < total:
            if done >= next_look:
                if self._stopped(looks, running):
                    return
                looks, next_look = looks + 1, done + CHECK_EVERY
            ready = self._graph is not None or done >= FIRST
            if self._status.is_cuda and ready and total - done >= IN_GRAPH and done % 2 == 0:
                self._graph = self._graph or self._captured()
                self._graph.replay()
                done += IN_GRAPH
            else:
                self._step(done % 2)
                done += 1

    def _stopped(self, looks: int, running: int) -> bool:
        """Return whether nothing ran at the look before, without a wait for now."""
        if not self._status.is_cuda:
            return not bool((self._status == running).any())
        if looks == len(self._looks) < 2:
            seen = torch.empty(self._status.shape, dtype=torch.int32, device="cpu", pin_memory=True)
            self._looks.append((seen, torch.cuda.Event()))
        seen, ready = self._looks[looks % 2]
        seen.copy_(self._status, non_blocking=True)
        ready.record(torch.cuda.current_stream(self._status.device))
        if looks == 0:
            return False
        seen, ready = self._looks[(looks - 1) % 2]
        ready.synchronize()
        return not bool((seen == running).any())

    def _captured(self) -> torch.cuda.CUDAGraph:
        device = self._status.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        # Memory that is freed during the capture could end it; to collect it first would take
        # longer than many a solve.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for i in range(IN_GRAPH):
                        self._step(i % 2)
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph
