"""Batched log-domain Sinkhorn on a GPU: one read and one exponential per entry and iteration.

With z_ij = g_j - (C_ij - r_i - c_j) / reg, where r and c are row and column minima:

    f_i = log a_i - lse_j z_ij      and      exp(f_i + z_ij) is the finished row of the plan,

already at hand, so it is added into the column sums s; after the sweep g_j += log b_j - log s_j,
and is taken further along its last change where that helps (dotresize.acceleration.Momentum).
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

from dotresize.acceleration import far_potential
from dotresize.kernels import sinkhorn_columns as column
from dotresize.kernels import sinkhorn_layout as layout
from dotresize.kernels import sinkhorn_prepare as prepare
from dotresize.kernels.graph import Watch, iterate
from dotresize.kernels.sinkhorn_layout import COLUMN_BLOCK, RUNNING, TABLE, Tables, Tile
from dotresize.kernels.sinkhorn_sweep import sinkhorn_sweep_kernel
from dotresize.reference import CONVERGED, INFEASIBLE, INVALID, MAX_ITER, MOMENTUM

# Column minima are taken out entry by entry only where leaving them to g would cost digits.
_NEAR = 16.0
# Warps on a multiprocessor that the registers of a sweep leave room for.
_WARPS_RESIDENT = 16
_LOG2E = math.log2(math.e)
# Largest 16-bit cost, and by how much an exponent may be off for 16-bit costs to be accepted.
_STEPS = 65535
_STORAGE_ERROR = 0.02


def sinkhorn(
    costs: Sequence[Tensor],
    reg: Tensor,
    a: Tensor,
    b: Tensor,
    max_iter: int,
    tol: Tensor,
    g: Tensor,
    pace: Tensor,
    storage: str,
    labels: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve problems of any shapes together, in the costs' type.

    costs: 2-D, unit stride along rows, of one type and device; reg, tol, pace: (B,); a, b, g
    float64, those of all problems joined; labels: the problems' numbers in messages. Returns as
    ``dotresize.reference.sinkhorn`` does. Problems are grouped by how the sweep holds a row.
    """
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault(Tile(cost.shape[1], cost.dtype).key, []).append(i)
    if len(groups) == 1:
        return _Batch(costs, reg, a, b, tol, g, pace, storage, labels).solve(max_iter)
    rows = a.split([cost.shape[0] for cost in costs])
    columns = [v.split([cost.shape[1] for cost in costs]) for v in (b, g)]
    f_parts, g_parts = list(rows), list(columns[1])
    scalars = [torch.empty(len(costs), dtype=d, device=a.device) for d in _SCALARS]
    for members in groups.values():
        batch = _Batch(
            [costs[i] for i in members],
            reg[members],
            torch.cat([rows[i] for i in members]),
            torch.cat([columns[0][i] for i in members]),
            tol[members],
            torch.cat([columns[1][i] for i in members]),
            pace[members],
            storage,
            [labels[i] for i in members],
        )
        f_all, g_all, *found = batch.solve(max_iter)
        for i, part in zip(members, f_all.split(batch.n), strict=True):
            f_parts[i] = part
        for i, part in zip(members, g_all.split(batch.m), strict=True):
            g_parts[i] = part
        for whole, part in zip(scalars, found, strict=True):
            whole[members] = part
    n_iter, error, status = scalars
    return torch.cat(f_parts), torch.cat(g_parts), n_iter, error, status


_SCALARS = (torch.int64, torch.float64, torch.int64)  # n_iter, marginal_error, status


class _Batch:
    """Problems whose rows the sweep holds alike, their tables and buffers on the device."""

    def __init__(
        self,
        costs: Sequence[Tensor],
        reg: Tensor,
        a: Tensor,
        b: Tensor,
        tol: Tensor,
        g: Tensor,
        pace: Tensor,
        storage: str,
        labels: Sequence[int],
    ) -> None:
        # A cost that is stored anew is not read often enough to be copied first.
        self.costs = costs = costs if storage == "u16" else layout.aligned(costs)
        first = costs[0]
        self.device, self.kind = first.device, first.dtype
        self.n, self.m = [c.shape[0] for c in costs], [c.shape[1] for c in costs]
        self.tile = Tile(max(self.m), self.kind)
        processors, self.lanes = 1, 32  # in the interpreter
        if first.is_cuda:
            device = torch.cuda.get_device_properties(first.device)
            processors, self.lanes = device.multi_processor_count, device.warp_size
        slots = processors * max(1, _WARPS_RESIDENT // self.tile.warps)
        self.rows = layout.rows_per_program(self.n, slots, self.tile.rows)
        self.a, self.b = a.to(self.kind), b.to(self.kind)
        self.log_a = a.log2().to(self.kind)
        self.tables = Tables(costs, self.rows)
        self.momentum = bool((pace == MOMENTUM).any())
        numbers = torch.stack([reg, _LOG2E / reg, tol, (pace == MOMENTUM).to(reg)]).to(self.device)
        self.reg = numbers[0]
        # Each by itself: as rows of one tensor their alignment, and so the kernel, varied with B.
        _, self.inv_reg, self.tol, self.limit = (row.clone() for row in numbers.to(self.kind))
        self._buffers()
        self._minima()
        self.stored, self.scale, self.align = first, self.inv_reg, 16 // first.element_size()
        if storage == "u16":
            self._store_linear(labels)
        has_mass, start = self.b > 0, ((g - self.shift_g) * _LOG2E).to(self.kind)
        self.g[0] = torch.where(has_mass, start, -torch.inf)
        self.before = torch.where(has_mass, start, 0.0)
        self.used = self._sums(has_mass.to(self.kind))
        self.g_sum[0][self.tables.problem[:, 7]] = self._sums(self.before)

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
        self.pace = torch.zeros_like(empty(2, len(t.block), column.PACE.value))
        self.pace[..., 0:3:2] = torch.inf  # no error yet; see sinkhorn_columns
        self.marginal_error = torch.full_like(empty(count), torch.nan)
        self.status = torch.full_like(empty(count, dtype=torch.int32), RUNNING)
        self.sweeps = torch.zeros_like(self.status)

    def _minima(self) -> None:
        t, row_block = self.tables, prepare.row_block(max(self.m), self.tile.warps)
        with torch.cuda.device_of(self.f):
            prepare.row_minima_kernel[(len(t.program),)](
                *(self.costs[0], t.problem, t.program, self.a, self.b),
                *(self.row_min, self.largest, self.status, self.rows),
                INFEASIBLE=INFEASIBLE,
                INVALID=INVALID,
                TABLE=TABLE,
                BR=row_block[0],
                BC=row_block[1],
                STAGES=prepare.STAGES,
                num_warps=self.tile.num_warps(self.lanes),
            )
            grid = (len(t.program), triton.cdiv(max(self.m), prepare.COLUMNS))
            prepare.partial_minima_kernel[grid](
                *(self.costs[0], t.problem, t.program, self.a),
                *(self.row_min, self.partial, self.rows),
                TABLE=TABLE,
                BR=prepare.ROWS,
                BC=prepare.COLUMNS,
            )
            prepare.column_minima_kernel[(len(t.block),)](
                *(t.problem, t.block, self.b, self.partial),
                *(self.column_min, self.status, self.rows),
                INFEASIBLE=INFEASIBLE,
                TABLE=TABLE,
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
        """16-bit copies of the costs, minima taken off; refused where that is too coarse."""
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
        ends = torch.tensor(size, device=self.device).cumsum(0)
        table[1:, 0], table[0, 0] = ends[:-1], 0
        table[:, 1] = torch.tensor(stride, device=self.device)
        stored = torch.empty(sum(size), dtype=torch.uint16, device=self.device)
        with torch.cuda.device_of(self.f):
            prepare.store_linear_kernel[(len(t.program),)](
                *(self.costs[0], t.problem, stored, table, t.program),
                *(self.row_min, self.column_min, step, self.rows),
                TABLE=TABLE,
                BR=prepare.ROWS,
                BC=prepare.COLUMNS,
            )
        self.stored, t.problem, self.align = stored, table, 8
        self.tile = Tile(max(self.m), self.kind, vector=8)
        self.shifted = False  # the minima are off
        self.scale = step * self.inv_reg

    def solve(self, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        t = self.tables
        with torch.cuda.device_of(self.f):
            iterate(self._iteration, max_iter + 1, Watch(self.status, RUNNING))
            column.sinkhorn_verdict_kernel[(len(self.costs),)](
                *(t.problem, self.error, self.tol, self.status, self.marginal_error),
                RUNNING=RUNNING,
                CONVERGED=CONVERGED,
                MAX_ITER=MAX_ITER,
                TABLE=TABLE,
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
        return f, g, n_iter, error, status

    def _iteration(self, parity: int) -> None:
        t, kernel = self.tables, column.sinkhorn_column_kernel
        now, new = (self.g[0], self.g[1]) if parity == 0 else (self.g[1], self.g[0])
        sums = (self.g_sum[parity], self.g_sum[1 - parity])
        common = {"RUNNING": RUNNING, "TABLE": TABLE, "BLOCKS": t.blocks}
        with torch.cuda.device_of(self.f):
            sinkhorn_sweep_kernel[(len(t.program),)](
                *(self.stored, t.problem, t.program, self.inv_reg, self.scale, self.log_a),
                *(self.row_min, self.column_min, now, self.f, self.partial, self.error),
                *(self.tol, self.status, self.sweeps, self.marginal_error, self.rows),
                CONVERGED=CONVERGED,
                COLUMN_BLOCK=COLUMN_BLOCK,
                ALIGN=self.align,
                SHIFTED=self.shifted,
                RESIDENT=self.tile.resident,
                num_warps=self.tile.num_warps(self.lanes),
                **self.tile.constants(),
                **common,
            )
            kernel[(len(t.block),)](
                *(self.stored, t.problem, t.block, self.inv_reg, self.scale, self.b, self.used),
                *(self.row_min, self.column_min, self.f, now, new, self.partial, self.error),
                *(*sums, self.before, self.limit, self.pace[1 - parity], self.pace[parity]),
                *(self.status, self.rows),
                TINY=column.TINY_COLUMN,
                BP=column.PROGRAM_BLOCK,
                BC=COLUMN_BLOCK,
                MOMENTUM=self.momentum,
                FAR=far_potential(self.kind),
                **common,
            )
