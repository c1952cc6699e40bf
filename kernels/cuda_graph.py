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


def iterate(step: Callable[[int], None], total: int, watch: Watch) -> None:
    """Call ``step(0)``, ``step(1)``, ``step(0)``, ... ``total`` times, or until nothing runs."""
    graph = None
    done = 0
    while done < total and not watch.stopped():
        end = min(total, done + CHECK_EVERY)
        while done < end:
            if watch.status.is_cuda and done >= FIRST and total - done >= IN_GRAPH:
                graph = graph or _captured(step, watch.status.device)
                graph.replay()
                done += IN_GRAPH
            else:
                step(done % 2)
                done += 1


def _captured(step: Callable[[int], None], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    # Memory that is freed during the capture could end it; to collect it first would take longer
    # than many a solve.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(IN_GRAPH):
                    step(i % 2)
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


class Watch:
    """Whether no status was ``running`` at the time of the call before, without a wait for now."""

    def __init__(self, status: Tensor, running: int) -> None:
        self.status, self.running = status, running
        self._seen: list[tuple[Tensor, torch.cuda.Event]] = []

    def stopped(self) -> bool:
        if not self.status.is_cuda:
            return not bool((self.status == self.running).any())
        copy = torch.empty(
            self.status.shape, dtype=self.status.dtype, device="cpu", pin_memory=True
        )
        copy.copy_(self.status, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.status.device))
        self._seen.append((copy, event))
        if len(self._seen) == 1:
            return False
        status, ready = self._seen[-2]
        ready.synchronize()
        self._seen = self._seen[-1:]
        return not bool((status == self.running).any())
