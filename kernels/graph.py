"""Iterations of two alternating kinds, launched as CUDA graphs and watched without waiting."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

CHECK_EVERY = 16  # iterations in a graph; even, as the two kinds take turns


def iterate(step: Callable[[int], None], total: int, watch: Watch) -> None:
    """``step(0)``, ``step(1)``, ``step(0)``, ... in all ``total`` times, or until nothing runs."""
    graph = None
    done = 0
    while done < total and not watch.stopped():
        # The first steps run by themselves: they compile the kernels.
        if watch.status.is_cuda and done and total - done >= CHECK_EVERY:
            # What the first steps have finished is not worth a graph.
            if graph is None and watch.stopped(latest=True):
                break
            graph = graph or _captured(step, watch.status.device)
            graph.replay()
        else:
            for i in range(min(CHECK_EVERY, total - done)):
                step(i % 2)
        done += CHECK_EVERY


def _captured(step: Callable[[int], None], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # memory that is freed during the capture could end it
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(CHECK_EVERY):
                step(i % 2)
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


class Watch:
    """Whether no status was ``running`` at the time of the call before, without a wait for now."""

    def __init__(self, status: Tensor, running: int) -> None:
        self.status, self.running = status, running
        self._seen: list[tuple[Tensor, torch.cuda.Event]] = []

    def stopped(self, latest: bool = False) -> bool:
        """``latest`` waits for all that was launched, and looks at the status after it."""
        if not self.status.is_cuda:
            return not bool((self.status == self.running).any())
        copy = torch.empty(
            self.status.shape, dtype=self.status.dtype, device="cpu", pin_memory=True
        )
        copy.copy_(self.status, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.status.device))
        self._seen.append((copy, event))
        if len(self._seen) == 1 and not latest:
            return False
        status, ready = self._seen[-1 if latest else -2]
        ready.synchronize()
        self._seen = self._seen[-1:]
        return not bool((status == self.running).any())
