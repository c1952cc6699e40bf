"""Batched log-domain Sinkhorn on a GPU: one read and one exponential per entry and iteration.

With z_ij = g_j - (C_ij - r_i - c_j) / reg, where r and c are row and column minima:

    f_i = log a_i - lse_j z_ij      and      exp(f_i + z_ij) is the finished row of the plan,

already at hand, so it is added into the column sums s; after the sweep g_j += log b_j - log s_j,
and is taken further along its last change where that helps (dotresize.ops.acceleration.Momentum).
Bound: one read of C per iteration (4096 x 3072 float32: 15 us on an H100 at 3.35 TB/s).

Two launches an iteration: the row sweep (programs own whole rows, and one partial column sum each)
and the column kernel. Each problem stops on the device by itself, and its programs then return at
once. IN_GRAPH iterations are one CUDA graph; every CHECK_EVERY the host looks at the status of the
look before, so the device never waits for it. Potentials are in powers of two in here.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from dotresize.kernels import sinkhorn_columns as column
from dotresize.kernels import sinkhorn_prepare as prepare
from dotresize.kernels.cuda_graph import Watch, iterate
from dotresize.kernels.sinkhorn_sweep import sinkhorn_sweep_kernel
from dotresize.kernels.sinkhorn_tables import (
    AT_BLOCK,
    AT_OFFSET,
    AT_STRIDE,
    COLUMN_BLOCK,
    RUNNING,
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
    MOMENTUM,
    SinkhornBatch,
    SinkhornSolution,
    far_potential,
)

# Column minima are taken out entry by entry only where leaving them to g would cost digits.
_NEAR = 16.0
# Warps on a multiprocessor that the registers of a sweep leave room for.
_WARPS_RESIDENT = 16
_LOG2E = math.log2(math.e)
# Largest 16-bit cost, and by how much an exponent may be off for 16-bit costs to be accepted.
_STEPS = 65535
_STORAGE_ERROR = 0.02


def sinkhorn(batch: SinkhornBatch, storage: str) -> SinkhornSolution:
    """Solve problems of any shapes together, in the costs' type.

    Problems are grouped by how the sweep holds a row. storage: "exact" or "u16", see
    ``dotresize.sinkhorn``.
    """
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for i, cost in enumerate(batch.costs):
        groups.setdefault(Tile(cost.shape[1], cost.dtype).key, []).append(i)
    if len(groups) == 1:
        return _Solver(batch, storage).solve(batch.max_iter)
    solved: dict[int, SinkhornSolution] = {}
    for members in groups.values():
        solver = _Solver(batch.part(members), storage)
        found = solver.solve(batch.max_iter)
        vectors = found.f.split(solver.n), found.g.split(solver.m)
        each = zip(*vectors, found.n_iter, found.marginal_error, found.status, strict=True)
        solved.update(zip(members, map(SinkhornSolution._make, each), strict=True))
    f, g, *numbers = zip(*(solved[i] for i in range(len(batch.costs))), strict=True)
    return SinkhornSolution(torch.cat(f), torch.cat(g), *map(torch.stack, numbers))


class _Solver:
    """Problems whose rows the sweep holds alike, their tables and buffers on the device."""

    def __init__(self, batch: SinkhornBatch, storage: str) -> None:
        costs, a, b, g, reg = batch.costs, batch.a, batch.b, batch.g, batch.reg
        use_momentum = batch.acceleration == MOMENTUM
        # A cost that is stored anew is not read often enough to be copied first.
        self.costs = costs = costs if storage == "u16" else aligned(costs)
        first = costs[0]
        self.device, self.kind = first.device, first.dtype
        self.n, self.m = [c.shape[0] for c in costs], [c.shape[1] for c in costs]
        self.tile = Tile(max(self.m), self.kind)
        processors, self.lanes = 1, 32  # in the interpreter
        if first.is_cuda:
            device = torch.cuda.get_device_properties(first.device)
            processors, self.lanes = device.multi_processor_count, device.warp_size
        slots = processors * max(1, _WARPS_RESIDENT // self.tile.warps)
        self.rows = rows_per_program(self.n, slots, self.tile.rows)
        self.a, self.b = a.to(self.kind), b.to(self.kind)
        self.log_a = a.log2().to(self.kind)
        self.tables = Tables(costs, self.rows)
        self.any_momentum = bool(use_momentum.any())
        numbers = torch.stack([reg, _LOG2E / reg, batch.tol, use_momentum.to(reg)]).to(self.device)
        self.reg = numbers[0]
        # Each by itself: as rows of one tensor their alignment, and so the kernel, varied with B.
        _, self.inv_reg, self.tol, self.use_momentum = (
            row.clone() for row in numbers.to(self.kind)
        )
        self._buffers()
        self._minima()
        self.stored, self.scale, self.align = first, self.inv_reg, 16 // first.element_size()
        if storage == "u16":
            self._store_linear(batch.labels)
        has_mass, start = self.b > 0, ((g - self.shift_g) * _LOG2E).to(self.kind)
        self.g[0] = torch.where(has_mass, start, -torch.inf)
        self.before = torch.where(has_mass, start, 0.0)
        self.used = self._sums(has_mass.to(self.kind))
        self.g_sum[0][self.tables.problem[:, AT_BLOCK.value]] = self._sums(self.before)

    def _sums(self, columns: Tensor) -> Tensor:
        return torch.segment_reduce(columns, "sum", lengths=self.tables.m)

    def _buffers(self) -> None:
        t = self.tables

        def empty(*shape: int, dtype: torch.dtype = self.kind) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        count = len(self.costs)
        self.row_min, self.column_min = empty(t.rows_total), empty(t.columns_total)
        self.f = self.log_a.clone()  # of no sweep yet; costs, minima taken off, are not below 0
        self.g = empty(2, t.columns_total)
        self.partial, self.largest = empty(t.partial_total), empty(len(t.program))
        self.error = torch.full_like(empty(len(t.block)), torch.inf)
        self.g_sum = torch.zeros_like(empty(2, len(t.block)))
        self.momentum_state = torch.zeros_like(empty(2, len(t.block), column.MOMENTUM_LINE.value))
        for at in (column.M_ERROR, column.M_LAST_ERROR):  # none yet
            self.momentum_state[..., at.value] = torch.inf
        self.marginal_error = torch.full_like(empty(count), torch.nan)
        self.status = torch.full_like(empty(count, dtype=torch.int32), RUNNING)
        self.sweeps = torch.zeros_like(self.status)

    def _minima(self) -> None:
        t, row_block = self.tables, prepare.row_block(max(self.m), self.tile.warps)
        with torch.cuda.device_of(self.f):
            prepare.row_minima_kernel[(len(t.program),)](
                p_cost=self.costs[0],
                p_problem=t.problem,
                p_program=t.program,
                p_a=self.a,
                p_b=self.b,
                p_row_min=self.row_min,
                p_largest=self.largest,
                p_status=self.status,
                rows_per_program=self.rows,
                INFEASIBLE=INFEASIBLE,
                INVALID=INVALID,
                BR=row_block[0],
                BC=row_block[1],
                STAGES=prepare.STAGES,
                num_warps=self.tile.num_warps(self.lanes),
            )
            grid = (len(t.program), triton.cdiv(max(self.m), prepare.COLUMNS))
            prepare.partial_minima_kernel[grid](
                p_cost=self.costs[0],
                p_problem=t.problem,
                p_program=t.program,
                p_a=self.a,
                p_row_min=self.row_min,
                p_partial=self.partial,
                rows_per_program=self.rows,
                BR=prepare.ROWS,
                BC=prepare.COLUMNS,
            )
            prepare.column_minima_kernel[(len(t.block),)](
                p_problem=t.problem,
                p_block=t.block,
                p_b=self.b,
                p_partial=self.partial,
                p_column_min=self.column_min,
                p_status=self.status,
                rows_per_program=self.rows,
                INFEASIBLE=INFEASIBLE,
                BP=column.PROGRAM_BLOCK,
                BC=COLUMN_BLOCK,
            )
        self.shift_g = self.column_min.double() / t.columns_of(self.reg)
        self.shifted = bool(self.shift_g.max() > _NEAR)
        if self.shifted:
            self.tile = Tile(max(self.m), self.kind, shifted=True)
        else:
            self.column_min.zero_()
            self.shift_g.zero_()
        self.shift_f = self.row_min.double() / t.rows_of(self.reg)

    def _store_linear(self, labels: Sequence[int]) -> None:
        """Store 16-bit copies of the costs less their minima; ValueError if that is too coarse."""
        t = self.tables
        spans = torch.zeros(len(self.costs), dtype=self.kind, device=self.device)
        spans.scatter_reduce_(0, t.program[:, 0], self.largest, "amax")
        error = spans.double() / (2 * _STEPS * self.reg)
        worst = int(error.argmax())
        if not error[worst] <= _STORAGE_ERROR:
            raise ValueError(
                f"storage 'u16' would change cost / reg of problem {labels[worst]} by up to "
                f"{error[worst]:.2g}: accepted is {_STORAGE_ERROR}; use storage 'exact', or a reg "
                f"of at least {float(spans[worst]) / (2 * _STEPS * _STORAGE_ERROR):.3g}"
            )
        step = torch.where(spans > 0, spans, 1.0) / _STEPS
        stride = [-(-m // 8) * 8 for m in self.m]
        size = [n * s for n, s in zip(self.n, stride, strict=True)]
        table = t.problem.clone()
        ends = torch.tensor(size, dtype=torch.int64, device=self.device).cumsum(0)
        table[1:, AT_OFFSET.value], table[0, AT_OFFSET.value] = ends[:-1], 0
        table[:, AT_STRIDE.value] = torch.tensor(stride, dtype=torch.int64, device=self.device)
        stored = torch.empty(sum(size), dtype=torch.uint16, device=self.device)
        with torch.cuda.device_of(self.f):
            prepare.store_linear_kernel[(len(t.program),)](
                p_cost=self.costs[0],
                p_problem=t.problem,
                p_stored=stored,
                p_stored_problem=table,
                p_program=t.program,
                p_row_min=self.row_min,
                p_column_min=self.column_min,
                p_step=step,
                rows_per_program=self.rows,
                BR=prepare.ROWS,
                BC=prepare.COLUMNS,
            )
        self.stored, t.problem, self.align = stored, table, 8
        self.tile = Tile(max(self.m), self.kind, vector=8)
        self.shifted = False  # the minima are off
        self.scale = step * self.inv_reg

    def solve(self, max_iter: int) -> SinkhornSolution:
        t = self.tables
        with torch.cuda.device_of(self.f):
            iterate(self._iteration, max_iter + 1, Watch(self.status, RUNNING))
            column.sinkhorn_status_kernel[(len(self.costs),)](
                p_problem=t.problem,
                p_error=self.error,
                p_tol=self.tol,
                p_status=self.status,
                p_marginal_error=self.marginal_error,
                RUNNING=RUNNING,
                CONVERGED=CONVERGED,
                MAX_ITER=MAX_ITER,
                COLUMN_BLOCK=COLUMN_BLOCK,
                BLOCKS=t.blocks,
            )
        seen, status = set(self.status.tolist()), self.status.long()
        n_iter = (self.sweeps - 1).clamp(min=0).long()
        error = self.marginal_error.double()
        odd = t.columns_of(n_iter % 2) == 1
        f = self.f.double() / _LOG2E + self.shift_f
        g = torch.where(odd, self.g[1], self.g[0]).double() / _LOG2E + self.shift_g
        for code, value, share in ((INVALID, torch.nan, torch.nan), (INFEASIBLE, -torch.inf, 1.0)):
            if code in seen:
                hit = status == code
                mass = torch.segment_reduce(self.a.double(), "sum", lengths=t.n)
                f = torch.where(t.rows_of(hit), value, f)
                g = torch.where(t.columns_of(hit), value, g)
                error = torch.where(hit, mass * share, error)
        return SinkhornSolution(f, g, n_iter, error, status)

    def _iteration(self, parity: int) -> None:
        t, other = self.tables, 1 - parity
        common = {
            "p_cost": self.stored,
            "p_problem": t.problem,
            "p_inv_reg": self.inv_reg,
            "p_scale": self.scale,
            "p_row_min": self.row_min,
            "p_column_min": self.column_min,
            "p_g": self.g[parity],
            "p_f": self.f,
            "p_partial": self.partial,
            "p_error": self.error,
            "p_status": self.status,
            "rows_per_program": self.rows,
            "RUNNING": RUNNING,
            "BLOCKS": t.blocks,
        }
        with torch.cuda.device_of(self.f):
            sinkhorn_sweep_kernel[(len(t.program),)](
                p_program=t.program,
                p_log_a=self.log_a,
                p_tol=self.tol,
                p_sweeps=self.sweeps,
                p_marginal_error=self.marginal_error,
                CONVERGED=CONVERGED,
                COLUMN_BLOCK=COLUMN_BLOCK,
                ALIGN=self.align,
                SHIFTED=self.shifted,
                RESIDENT=self.tile.resident,
                num_warps=self.tile.num_warps(self.lanes),
                **self.tile.constants(),
                **common,
            )
            column.sinkhorn_column_kernel[(len(t.block),)](
                p_block=t.block,
                p_b=self.b,
                p_used=self.used,
                p_g_new=self.g[other],
                p_g_sum=self.g_sum[parity],
                p_g_sum_new=self.g_sum[other],
                p_before=self.before,
                p_use_momentum=self.use_momentum,
                p_last=self.momentum_state[other],
                p_new=self.momentum_state[parity],
                TINY=column.TINY_COLUMN,
                BP=column.PROGRAM_BLOCK,
                BC=COLUMN_BLOCK,
                MOMENTUM=self.any_momentum,
                FAR=far_potential(self.kind),
                **common,
            )
