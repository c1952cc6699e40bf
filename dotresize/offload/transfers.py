"""Parts on their way between files and a GPU, in threads beside the computation.

A GPU computes a layer in about the time that its files take. So the part that will be asked for
next is read while this one is used, and what is finished is written while the next one is computed.
Both go through pinned memory, which the device reads and writes by itself. On a CPU the computation
takes tens of times as long as the files, and has the cores to itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def threaded(device: torch.device) -> bool:
    """Return whether parts for this device are moved by threads."""
    return device.type == "cuda"


class ReadAhead:
    """Reads the part that comes next in order while another one is used.

    Args:
        read: returns the weights of a part, by their names in it.
        parts: names of the parts, in order of execution; they may also be asked for backwards.
        device: where they go.
    """

    def __init__(
        self, read: Callable[[str], dict[str, Tensor]], parts: Sequence[str], device: torch.device
    ) -> None:
        self._read, self._device = read, device
        self._numbers = {name: i for i, name in enumerate(parts)}
        self._parts = parts
        self._pool = ThreadPoolExecutor(1, "dotresize-read")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None

    def take(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a part; what ``read`` raised for it is raised here."""
        if name not in self._numbers:
            return self._read(name)
        ready, self._next = self._next, None
        if ready is not None and ready[0] == name:
            weights = ready[1].result()
        else:  # what was read instead is let go
            weights = self._pool.submit(self._read_beside, name).result()
        if self._stream is not None:
            for weight in weights.values():
                weight.record_stream(torch.cuda.current_stream(self._device))
        here = self._numbers[name]
        following = here + (-1 if here == self._last - 1 else 1)
        self._last = here
        if 0 <= following < len(self._parts):
            following_name = self._parts[following]
            reading = self._pool.submit(self._read_beside, following_name)
            self._next = following_name, reading
        return weights

    @torch.no_grad()
    def _read_beside(self, name: str) -> dict[str, Tensor]:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            weights = self._read(name)
            if self._stream is not None:
                self._stream.synchronize()
        return weights


class WriteBehind:
    """Writes files of tensors one after the other; those of a GPU while it computes others."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, "dotresize-write")
        self._device = device
        self._writing: tuple[Future[None], Callable[[], None]] | None = None

    def write(self, tensors: dict[str, Tensor], path: Path, written: Callable[[], None]) -> None:
        """Begin to write a file; ``written`` is called by ``wait`` once it is whole.

        Only one is on its way: the one before is waited for.
        """
        self.wait()
        moved, arrived = {}, None
        for name, value in tensors.items():
            moved[name] = _pinned(value) if value.is_cuda else value
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        self._writing = self._pool.submit(_save, moved, path, arrived), written
        if not threaded(self._device):
            self.wait()

    def wait(self) -> None:
        """Wait for what is on its way; what went wrong with it is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing[0].result()
            writing[1]()


def to_device(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the host on a device, in another type, without a wait where possible."""
    if device.type != "cuda":
        return value.to(device, dtype)
    return value.pin_memory().to(device, non_blocking=True).to(dtype)


def _pinned(value: Tensor) -> Tensor:
    """Return a copy of a GPU's tensor in pinned memory, which is still on its way."""
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _save(tensors: dict[str, Tensor], path: Path, arrived: Any) -> None:
    if arrived is not None:
        arrived.synchronize()
    save_file(tensors, path, metadata={"format": "pt"})
    if arrived is not None:  # the directory will wait for the disk, and has less to wait for then
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
