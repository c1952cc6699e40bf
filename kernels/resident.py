"""Launches the resident Sinkhorn: how problems are divided over the device's multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dotresize.kernels.resident_columns import KINDS
from dotresize.kernels.resident_kernel import resident_kernel
from dotresize.kernels.resident_phases import EXACT_COST, KEPT_PLAN, LEVELS
from dotresize.kernels.sinkhorn_device import Device
from dotresize.kernels.sinkhorn_sheet import (
    COARSEST,
    LARGEST_LEVEL,
    O_STATUS,
    TOO_COARSE,
    Sheet,
    refuse,
)
from dotresize.kernels.sinkhorn_tables import Tables, aligned, lies_aligned, parts_of
from dotresize.ops.constants import (
    CONVERGED,
    INFEASIBLE,
    INVALID,
    MAX_ITER,
    SinkhornBatch,
    far_potential,
)

# Bytes of an entry that stays in shared memory, and entries of a program that keep an iteration
# short: an exponential takes twice the instructions of a sum.
_SIZES = {EXACT_COST.value: 4, LEVELS.value: 2, KEPT_PLAN.value: 2}
_ENTRIES = {EXACT_COST.value: 1 << 14, LEVELS.value: 1 << 14, KEPT_PLAN.value: 1 << 15}
# Entries of a block in a thread, columns of a row at most, and programs of a multiprocessor.
_THREAD_ENTRIES = 32
_WIDEST = 12288
_TOGETHER = 3
# Bytes of shared memory beside the entries: what sums across threads need, usually and at most, and
# the driver's own.
_SCRATCH, _MOST_SCRATCH, _RESERVED = 9 << 10, 20 << 10, 1 << 10


@dataclass(frozen=True)
class Division:
    """Says how the problems of a batch are divided over programs, and those over the device."""

    store: int
    programs: int  # of a group, which holds one problem at a time
    groups: int
    blocks: int  # of a program
    rows: int  # of a block
    parts: int
    block: int  # columns of a part
    warps: int
    together: int  # programs of a multiprocessor

    @property
    def width(self) -> int:
        return self.parts * self.block

    @property
    def own(self) -> int:
        """Columns that a program updates."""
        return max(32, triton.next_power_of_2(-(-self.width // self.programs)))

    def constants(self) -> dict[str, int]:
        vector = 16 // _SIZES[self.store]
        lanes = min(32, self.block // vector)
        # Warps along the rows where there are rows enough: a row's sum then stays within one.
        along_rows = min(self.warps, max(1, self.rows * lanes // 32))
        # Sums over programs are read by blocks of so many, as long as registers allow.
        at_once = min(triton.next_power_of_2(self.programs), max(1, (1 << 13) // self.own))
        return {
            "STORE": self.store,
            "G": self.programs,
            "GP": max(32, triton.next_power_of_2(self.programs)),
            "BLOCKS": self.blocks,
            "PARTS": self.parts,
            "BR": self.rows,
            "BC": self.block,
            "BP": at_once,
            "OWN": self.own,
            "VECTOR": vector,
            "LANES": lanes,
            "WARPS_ROWS": along_rows,
            "WARPS_COLUMNS": self.warps // along_rows,
            "OWN_LANES": min(32, self.own // 4),
        }

    def options(self) -> dict[str, Any]:
        registers = min(255, (1 << 16) // (32 * self.warps * self.together) // 8 * 8)
        return {
            "num_warps": self.warps,
            "maxnreg": registers,
            "launch_cooperative_grid": True,
        }


def divide(
    shapes: Sequence[tuple[int, int]], store: int, device: Device, *, warps: int = 8
) -> Division | None:
    """Return how to hold as many of the problems at once as fit; None if not even one does."""
    n, m = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    parts, block = parts_of(m)
    width, size = parts * block, _SIZES[store]
    if not device.cooperative or width > _WIDEST:
        return None
    # A block has as many rows as keep all threads busy, and no more than their registers hold.
    rows = triton.next_power_of_2(max(1, 32 * warps * _THREAD_ENTRIES // width // 2 + 1))
    rows = min(rows, max(8, triton.next_power_of_2(n)))
    most = (device.shared_program - _MOST_SCRATCH) // (rows * width * size)
    while most == 0 and rows > 1:
        rows //= 2
        most = (device.shared_program - _MOST_SCRATCH) // (rows * width * size)
    fewest = -(-n // (rows * device.processors))
    blocks = min(most, max(fewest, _ENTRIES[store] // (rows * width), 1), -(-n // rows))
    if blocks < fewest:
        return None
    programs = -(-n // (rows * blocks))
    bytes_each = rows * blocks * width * size + _SCRATCH + _RESERVED
    together = min(_TOGETHER, max(1, device.shared // bytes_each))
    wanted = -(-len(shapes) * programs // device.processors)
    together = max(1, min(together, wanted))
    if together > 1 and warps > 4:
        return divide(shapes, store, device, warps=4)
    groups = min(len(shapes), device.processors * together // programs)
    if groups == 0:
        return None
    return Division(store, programs, groups, blocks, rows, parts, block, warps, together)


def choose(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, storage: str, device: Device
) -> Division | None:
    """Return how problems stay on the device's multiprocessors; None if they do not.

    A cost with every digit is as good as a kept plan where memory is not what limits how many
    problems are solved at once.
    """
    if dtype != torch.float32:
        return None
    if storage == "u16":
        return divide(shapes, LEVELS.value, device)
    exact = divide(shapes, EXACT_COST.value, device)
    kept = divide(shapes, KEPT_PLAN.value, device)
    if exact is not None and (kept is None or exact.groups >= kept.groups):
        return exact
    return kept


class Resident:
    """Solves problems of certain shapes by one launch, and has what that needs for the next."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: Device,
        division: Division,
        *,
        momentum: bool,
    ) -> None:
        self.device, self.division, self.momentum = device, division, momentum
        self.constants = division.constants()
        t = Tables(shapes, max(n for n, _ in shapes), device.torch)
        self.sheet = Sheet(len(shapes), 1 + 2 * division.groups, device.torch)
        self.sheet.host_lines[:] = t.lines
        # All begin at multiples of 64 bytes: else they were more kernels to the compiler.
        self.row_vectors = self._empty(4, -(-t.rows_total // 16) * 16)
        self.column_vectors = self._empty(4, -(-t.columns_total // 16) * 16)
        sums = division.groups * division.programs * division.width
        kept = division.store == KEPT_PLAN.value
        self.partial = self._empty(sums)
        self.rounded = self._empty(sums) if kept else self.partial
        self.lines = self._empty(division.groups, KINDS.value, self.constants["GP"])
        self.base = self.partial  # costs are found from here
        self._groups: int | None = None  # of a launch; known once the kernel is compiled

    @property
    def bytes(self) -> int:
        """How much memory the buffers take."""
        held = (self.row_vectors, self.column_vectors, self.partial, self.rounded, self.lines)
        return sum(4 * v.numel() for v in held)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device.torch)

    def _fitting(self, arguments: dict[str, Any]) -> int:
        """Return how many groups run at once, by what the compiled kernel takes."""
        division, device = self.division, self.device
        if device.torch.type != "cuda":
            return division.groups
        try:
            compiled = resident_kernel.warmup(grid=(1,), **arguments)
            compiled._init_handles()
        except OutOfResources:
            return 0
        together = device.together(division.warps, compiled.n_regs, compiled.metadata.shared)
        return min(division.groups, device.processors * together // division.programs)

    def solve(self, batch: SinkhornBatch, potentials: tuple[Tensor, Tensor]) -> np.ndarray | None:
        """Write f and g, and return the problems' outcomes (sinkhorn_sheet); None if none fits."""
        division, columns = self.division, self.column_vectors
        costs = batch.costs
        if division.store == KEPT_PLAN.value:  # the others are read once or twice
            costs = aligned(costs)
        align = 4 if all(lies_aligned(cost) for cost in costs) or costs is not batch.costs else 1
        arguments = dict(
            p_cost=self.base,
            p_problem=self.sheet.lines,
            p_numbers=self.sheet.numbers,
            p_outcome=self.sheet.outcome,
            p_counters=self.sheet.counters,
            p_a=batch.a,
            p_b=batch.b,
            p_start=batch.g,
            p_row_min=self.row_vectors[0],
            p_log_a=self.row_vectors[1],
            p_f=self.row_vectors[2],
            p_rho=self.row_vectors[3],
            p_column_min=columns[0],
            p_g=columns[1:3],
            p_v=columns[3],
            p_partial=self.partial,
            p_rounded=self.rounded,
            p_lines=self.lines,
            p_potential_f=potentials[0],
            p_potential_g=potentials[1],
            problems=len(costs),
            columns=columns.shape[1],
            CONVERGED=CONVERGED,
            MAX_ITER=MAX_ITER,
            INFEASIBLE=INFEASIBLE,
            INVALID=INVALID,
            TOO_COARSE=TOO_COARSE,
            COARSEST=2.0 * LARGEST_LEVEL * COARSEST,
            FAR=far_potential(torch.float32),
            MOMENTUM=self.momentum,
            ALIGN=align,
            **self.constants,
            **division.options(),
        )
        with torch.cuda.device_of(self.partial):
            if self._groups is None:
                self._groups = self._fitting(arguments)
            if self._groups == 0:
                return None
            self.sheet.send(batch, costs, self.base)
            try:
                resident_kernel[(self._groups * division.programs,)](**arguments)
            except RuntimeError as error:
                if "cooperative" not in str(error):
                    raise
                self._groups = 0  # this process has only a part of the device
                return None
            self.sheet.receive()
        outcome = self.sheet.host_outcome.copy()
        refuse(outcome[:, O_STATUS.value] == TOO_COARSE, outcome, batch)
        return outcome
