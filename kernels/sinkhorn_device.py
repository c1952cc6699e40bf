"""What the device that a Sinkhorn problem lies on can hold and do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Device:
    """Holds a device's resources; the interpreter is one multiprocessor for small problems."""

    torch: torch.device
    processors: int = 1
    lanes: int = 32
    # A multiprocessor has so many bytes of shared memory, one program of it at most so many; then
    # come a multiprocessor's registers and threads.
    shared: int = 228 << 10
    shared_program: int = 227 << 10
    registers: int = 1 << 16
    threads: int = 2048
    # Whether all programs of a launch can be asked to run at once, and wait for each other.
    cooperative: bool = True
    memory: int = 1 << 32

    @property
    def to_keep(self) -> int:
        """Bytes that solvers may hold while they wait for the next problems."""
        return self.memory // 64

    def together(self, warps: int, registers: int, shared: int) -> int:
        """Return how many programs of this kind a multiprocessor runs at once.

        registers: of a thread, given out by 256 to a warp; shared: bytes, beside the driver's own.
        """
        by_registers = self.registers // (warps * -(-registers * self.lanes // 256) * 256)
        by_shared = self.shared // (shared + 1024)
        return min(by_registers, by_shared, self.threads // (warps * self.lanes))


@functools.cache
def device_of(place: torch.device) -> Device:
    """Return what a tensor's device can do."""
    if place.type != "cuda":
        return Device(place)
    found = torch.cuda.get_device_properties(place)
    limits = triton.runtime.driver.active.utils.get_device_properties(place.index)
    nvidia = torch.version.hip is None
    return Device(
        place,
        processors=found.multi_processor_count,
        lanes=found.warp_size,
        shared=found.shared_memory_per_multiprocessor,
        shared_program=limits["max_shared_mem"],
        registers=getattr(found, "regs_per_multiprocessor", 1 << 16),
        threads=found.max_threads_per_multi_processor,
        cooperative=nvidia and found.major >= 8,
        memory=found.total_memory,
    )
