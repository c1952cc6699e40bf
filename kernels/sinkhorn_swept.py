"""Sinkhorn on a GPU by launches: what does not fit on the device's multiprocessors, or is float64.

With z_ij = g_j - (C_ij - r_i - c_j) / reg, where r and c are row and column minima:

    f_i = log a_i - lse_j z_ij      and      exp(f_i + z_ij) is the finished row of the plan,

already at hand, so it is added into the column sums s; after the sweep g_j += log b_j - log s_j,
and is taken further along its last change where that helps (dotresize.ops.acceleration.Momentum).
Bound: one read an iteration, of the cost or, in float32, mostly of a plan kept in 16 bits
(sinkhorn_rules.py): 14336 x 11469 at 4.24 TB/s, 155 us or 77.6.

Two launches an iteration: the row sweep (programs own whole rows, and one partial column sum each)
and the column kernel. Each problem stops on the device by itself, and its programs then return at
once. IN_GRAPH iterations are one CUDA graph; every CHECK_EVERY the host looks at the status of the
look before, so the device never waits for it. Potentials are in powers of two in here.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dotresize.kernels import sinkhorn_columns as column
from dotresize.kernels import sinkhorn_prepare as prepare
from dotresize.kernels.cuda_graph import Steps
from dotresize.kernels.sinkhorn_device import Device
from dotresize.kernels.sinkhorn_finish import finish_kernel
from dotresize.kernels.sinkhorn_sheet import COARSEST, RUNNING, Sheet, exponent_errors, refuse
from dotresize.kernels.sinkhorn_sweep import sinkhorn_sweep_kernel
from dotresize.kernels.sinkhorn_tables import (
    COLUMN_BLOCK,
    Tables,
    Tile,
    aligned,
    rows_per_program,
)
from dotresize.ops.constants import (
    CONVERGED,
    INFEASIBLE,
    INVALID,
    MAX_ITER,
    SinkhornBatch,
    far_potential,
)

# Warps on a multiprocessor that the registers of a sweep leave room for.
_WARPS_RESIDENT = 12


class Swept:
    """Solves problems of certain shapes by launches, and has what these need for the next."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: Device,
        *,
        storage: str,
        keep: bool,
        momentum: bool,
    ) -> None:
        """Allocate. keep: whether a plan may be kept in 16 bits; momentum: whether it is used."""
        self.kind, self.device, self.momentum = dtype, device, momentum
        self.in_levels = storage == "u16"
        self.widest = max(shape[1] for shape in shapes)
        self.tile = Tile(self.widest, dtype)
        self.keep = keep and not self.in_levels and self.tile.keeps
        slots = device.processors * max(1, _WARPS_RESIDENT // self.tile.warps)
        self.rows = rows_per_program([n for n, _ in shapes], slots, self.tile.rows)
        self.tables = t = Tables(shapes, self.rows, device.torch)
        self.sheet = Sheet(len(shapes), 1, device.torch)
        self.sheet.host_lines[:] = t.lines
        self.programs, self.blocks = len(t.program), len(t.block)
        empty = self._empty
        self.row_min, self.log_a, self.f, self.rho = (empty(t.rows_total) for _ in range(4))
        # Both buffers at multiples of 64 bytes: else they were two kernels to the compiler.
        self.g = empty(2, -(-t.columns_total // 16) * 16)
        self.b, self.column_min, self.before, self.v, self.gamma, self.reference = (
            empty(t.columns_total) for _ in range(6)
        )
        self.partial = empty(t.partial_total)
        self.rounded = empty(t.partial_total) if self.keep else self.partial
        self.state = empty(2, self.blocks, column.STATE.value)
        self.largest, self.scale = empty(self.programs), empty(len(shapes))
        stored = torch.uint16 if self.in_levels else torch.float16
        room = t.stored_total if self.in_levels or self.keep else 1
        self.stored = empty(room, dtype=stored)
        self.base = self.row_min  # costs are found from here
        self.steps: dict[bool, Steps] = {}

    @property
    def bytes(self) -> int:
        """How much memory the buffers take."""
        held = (v for v in vars(self).values() if isinstance(v, Tensor))
        return sum(v.numel() * v.element_size() for v in held)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.kind, device=self.device.torch)

    def solve(self, batch: SinkhornBatch, potentials: tuple[Tensor, Tensor]) -> np.ndarray:
        """Write f and g, and return the problems' outcomes (sinkhorn_sheet)."""
        # A cost that is stored anew is not read often enough to be copied first.
        costs = batch.costs if self.in_levels else aligned(batch.costs)
        with torch.cuda.device_of(self.f):
            self.sheet.send(batch, costs, self.base)
            self._minima(batch, 1 if self.in_levels else 16 // self.kind.itemsize)
            self.sheet.receive()
            shifted = bool(self.sheet.host_counters[0]) and not self.in_levels
            if self.in_levels:
                self._store_linear(batch)
            self._start(batch, shifted)
            if shifted not in self.steps:
                tile = Tile(
                    self.widest, self.kind, shifted=shifted, vector=8 if self.in_levels else None
                )
                step = functools.partial(self._iteration, tile, shifted)
                self.steps[shifted] = Steps(step, self.sheet.status)
            self.steps[shifted].run(batch.max_iter + 1, RUNNING)
            self._finish(batch, potentials, shifted)
            self.sheet.receive()
        return self.sheet.host_outcome.copy()

    def _minima(self, batch: SinkhornBatch, align: int) -> None:
        t, sheet = self.tables, self.sheet
        prepare.minima_kernel[(self.programs,)](
            p_cost=self.base,
            p_problem=sheet.lines,
            p_program=t.program,
            p_a=batch.a,
            p_b=batch.b,
            p_row_min=self.row_min,
            p_partial=self.partial,
            p_largest=self.largest,
            p_status=sheet.status,
            rows_per_program=self.rows,
            INFEASIBLE=INFEASIBLE,
            INVALID=INVALID,
            ALIGN=align,
            SPAN=self.in_levels,
            HELD=self.tile.held,
            num_warps=self.tile.num_warps(self.device.lanes),
            **self.tile.constants(),
        )
        prepare.begin_kernel[(self.programs + self.blocks,)](
            p_problem=sheet.lines,
            p_program=t.program,
            p_block=t.block,
            p_numbers=sheet.numbers,
            p_outcome=sheet.outcome,
            p_counters=sheet.counters,
            p_a=batch.a,
            p_b=batch.b,
            p_partial=self.partial,
            p_largest=self.largest,
            p_log_a=self.log_a,
            p_f=self.f,
            p_column_min=self.column_min,
            p_status=sheet.status,
            rows_per_program=self.rows,
            programs=self.programs,
            INFEASIBLE=INFEASIBLE,
            SPAN=self.in_levels,
            BP=prepare.MANY,
            BC=COLUMN_BLOCK,
        )

    def _store_linear(self, batch: SinkhornBatch) -> None:
        """Store 16-bit copies of the costs less their minima; ValueError if that is too coarse."""
        outcome = self.sheet.host_outcome
        refuse(~(exponent_errors(outcome, batch) <= COARSEST), outcome, batch)
        prepare.store_linear_kernel[(self.programs,)](
            p_cost=self.base,
            p_problem=self.sheet.lines,
            p_stored=self.stored,
            p_program=self.tables.program,
            p_row_min=self.row_min,
            p_column_min=self.column_min,
            p_numbers=self.sheet.numbers,
            p_outcome=self.sheet.outcome,
            p_scale=self.scale,
            rows_per_program=self.rows,
            BR=prepare.ROWS,
            BC=prepare.COLUMNS,
        )

    def _start(self, batch: SinkhornBatch, shifted: bool) -> None:
        prepare.start_kernel[(self.blocks,)](
            p_problem=self.sheet.lines,
            p_block=self.tables.block,
            p_numbers=self.sheet.numbers,
            p_mass=batch.b,
            p_start=batch.g,
            p_b=self.b,
            p_column_min=self.column_min,
            p_g=self.g,
            p_before=self.before,
            p_state=self.state[1],
            SHIFTED=shifted or self.in_levels,
            BC=COLUMN_BLOCK,
        )

    def _iteration(self, tile: Tile, shifted: bool, parity: int) -> None:
        t, sheet, other = self.tables, self.sheet, 1 - parity
        common = {
            "p_cost": self.stored if self.in_levels else self.base,
            "p_problem": sheet.lines,
            "p_numbers": sheet.numbers,
            "p_scale": self.scale,
            "p_row_min": self.row_min,
            "p_column_min": self.column_min,
            "p_g": self.g[parity],
            "p_f": self.f,
            "p_v": self.v,
            "p_partial": self.partial,
            "p_rounded": self.rounded,
            "p_status": sheet.status,
            "rows_per_program": self.rows,
            "RUNNING": RUNNING,
            "BLOCKS": t.blocks,
            "KEEP": self.keep and tile.keeps,
        }
        sinkhorn_sweep_kernel[(self.programs,)](
            p_program=t.program,
            p_outcome=sheet.outcome,
            p_log_a=self.log_a,
            p_kept=self.stored,
            p_rho=self.rho,
            p_state=self.state[other],
            CONVERGED=CONVERGED,
            COLUMN_BLOCK=COLUMN_BLOCK,
            ALIGN=8 if self.in_levels else 16 // self.kind.itemsize,
            SHIFTED=shifted,
            HELD=tile.held,
            **tile.options(self.device.lanes),
            **tile.constants(),
            **tile.kept_constants(),
            **common,
        )
        column.sinkhorn_column_kernel[(self.blocks,)](
            p_block=t.block,
            p_b=self.b,
            p_g_new=self.g[other],
            p_reference=self.reference,
            p_gamma=self.gamma,
            p_before=self.before,
            p_last=self.state[other],
            p_new=self.state[parity],
            BP=column.PROGRAM_BLOCK,
            BC=COLUMN_BLOCK,
            MOMENTUM=self.momentum,
            FAR=far_potential(self.kind),
            **common,
        )

    def _finish(
        self, batch: SinkhornBatch, potentials: tuple[Tensor, Tensor], shifted: bool
    ) -> None:
        t, sheet = self.tables, self.sheet
        finish_kernel[(self.programs + self.blocks,)](
            p_problem=sheet.lines,
            p_program=t.program,
            p_block=t.block,
            p_numbers=sheet.numbers,
            p_outcome=sheet.outcome,
            p_a=batch.a,
            p_row_min=self.row_min,
            p_column_min=self.column_min,
            p_f=self.f,
            p_g=self.g,
            p_state=self.state[batch.max_iter % 2],
            p_potential_f=potentials[0],
            p_potential_g=potentials[1],
            p_status=sheet.status,
            columns=self.g.shape[1],
            rows_per_program=self.rows,
            programs=self.programs,
            RUNNING=RUNNING,
            CONVERGED=CONVERGED,
            MAX_ITER=MAX_ITER,
            INFEASIBLE=INFEASIBLE,
            INVALID=INVALID,
            SHIFTED=shifted or self.in_levels,
            COLUMN_BLOCK=COLUMN_BLOCK,
            BLOCKS=t.blocks,
            BR=prepare.MANY,
        )
