"""Activations of many tokens, kept where there is room for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor


class ActivationCache:
    """A list of tensors, one for each batch; entries come back as they were.

    place: "device" keeps them where they are, "host" in main memory, "disk" in a temporary file
    (see TMPDIR). The file has no name: however the process ends, nothing is left of it. Who made
    the cache closes it.
    """

    def __init__(self, count: int, place: str = "disk") -> None:
        self._place = place
        self._entries: list[Tensor | None] = [None] * count
        self._file = _File(count) if place == "disk" else None
        self._device = torch.device("cpu")

    def close(self) -> None:
        """Let all entries go."""
        self._entries = []
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, i: int, value: Tensor) -> None:
        self._device = value.device
        if self._file is not None:
            self._file.write(i, value)
        else:
            where = value.device if self._place == "device" else torch.device("cpu")
            self._entries[i] = value.to(where, copy=True)

    def __getitem__(self, i: int) -> Tensor:
        entry = self._entries[i] if self._file is None else self._file.read(i)
        if entry is None:
            raise IndexError(f"batch {i} was never written")
        return entry.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


class _File:
    """Tensors in a temporary file. Read and written, not mapped: no page of it counts as used."""

    def __init__(self, count: int) -> None:
        self._file = tempfile.TemporaryFile(prefix="dotresize-", buffering=0)  # noqa: SIM115
        # Each entry's offset, the bytes reserved for it, its shape and its type.
        self._slots: list[tuple[int, int, torch.Size, torch.dtype] | None] = [None] * count
        self._end = 0

    def close(self) -> None:
        self._file.close()

    def write(self, i: int, value: Tensor) -> None:
        begin, room, *_ = self._slots[i] or (0, -1)
        if value.nbytes > room:
            begin, room = self._end, value.nbytes
            self._end += room
        self._slots[i] = begin, room, value.shape, value.dtype
        self._file.seek(begin)
        left = _bytes(value.detach().cpu().contiguous())
        while left:
            left = left[self._file.write(left) :]

    def read(self, i: int) -> Tensor | None:
        slot = self._slots[i]
        if slot is None:
            return None
        begin, _, shape, dtype = slot
        value = torch.empty(shape, dtype=dtype, device="cpu")
        self._file.seek(begin)
        left = _bytes(value)
        while left:
            left = left[self._file.readinto(left) :]
        return value


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
