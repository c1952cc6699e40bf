"""How Sinkhorn problems of any shapes are laid out for the kernels: tiles, programs, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# Stands for "not stopped yet" in the status vector; the other codes are in ops/constants.py.
RUNNING = -1
# A problem's line of the table that ``Tables`` makes: what stands in which of its columns.
AT_OFFSET = tl.constexpr(0)  # where its cost begins, in entries, from the first cost
AT_STRIDE = tl.constexpr(1)  # entries from row to row
AT_ROWS = tl.constexpr(2)  # n
AT_COLUMNS = tl.constexpr(3)  # m
AT_ROW = tl.constexpr(4)  # where its row vectors begin,
AT_COLUMN = tl.constexpr(5)  # its column vectors,
AT_PARTIAL = tl.constexpr(6)  # its partial column sums,
AT_BLOCK = tl.constexpr(7)  # and its column blocks
LINE = tl.constexpr(8)  # columns of the table
# Entries a thread holds of a row, if there are warps enough, and of all rows of a block at most. Of
# the former two vectors live through the loop (three with column minima), of the latter one.
ROW_ENTRIES = {torch.float32: 12, torch.float64: 4}
THREAD_ENTRIES = {torch.float32: 24, torch.float64: 4}
MAX_WARPS = {torch.float32: 16, torch.float64: 16}
STREAMED_COLUMNS = 1024
# Columns of one program of the column kernels.
COLUMN_BLOCK = 32


class Tile:
    """How a sweep program holds rows of up to ``columns`` columns."""

    def __init__(
        self, columns: int, dtype: torch.dtype, *, shifted: bool = False, vector: int | None = None
    ) -> None:
        """Choose. vector: entries of 16 stored bytes, which a thread reads at a time."""
        power = max(32, triton.next_power_of_2(columns))
        self.parts = 3 if columns <= 3 * power // 4 and power >= 128 else 1
        self.block = power // 4 if self.parts == 3 else power
        entries, most = (
            n[dtype] * 3 // (4 if shifted else 3) for n in (ROW_ENTRIES, THREAD_ENTRIES)
        )
        width = self.parts * self.block
        warps = triton.next_power_of_2(triton.cdiv(width, 32 * entries))
        # All along the columns, so that sums over the rows of a block stay within a thread.
        along = self.block // (32 * (vector or 16 // dtype.itemsize))
        self.warps = max(1, min(max(4, warps), MAX_WARPS[dtype], along))
        fitting = 32 * self.warps * most // width
        self.resident = fitting > 0
        if self.resident:
            self.rows = 1 << (fitting.bit_length() - 1)
        else:
            self.parts, self.block, self.rows, self.warps = 1, STREAMED_COLUMNS, 4, 4

    def num_warps(self, lanes: int = 32) -> int:
        """Return the warps: as many threads whatever the lanes of a warp, but at least one warp."""
        return max(1, self.warps * 32 // lanes)

    @property
    def key(self) -> tuple[bool, int, int]:
        return self.resident, self.parts, self.block

    def constants(self) -> dict[str, int]:
        return {"PARTS": self.parts, "BR": self.rows, "BC": self.block}


def rows_per_program(rows: Sequence[int], slots: int, step: int) -> int:
    """Return the rows of a program, a multiple of step, so that ``slots`` at a time end soon.

    Minimises waves * rows over one to eight waves of programs, the fewest waves first: each program
    also costs a partial sum of every column.
    """
    best, best_time = max(rows), math.inf
    for waves in (1, 2, 3, 4, 8):
        count = -(-sum(rows) // (waves * slots * step)) * step
        while sum(-(-n // count) for n in rows) > waves * slots and count < max(rows):
            count += step
        used = -(-sum(-(-n // count) for n in rows) // slots)
        if used * count < best_time:
            best, best_time = count, used * count
    return best


class Tables:
    """What a program finds its work by; int64, on the costs' device.

    problem (B, LINE): a line for each, whose columns are named above (AT_...).
    program (P, 2) and block (Q, 2): problem and first row, or first column, of each program of the
    sweep and of the column kernels.
    n, m (B,): the rows and columns again.
    """

    def __init__(self, costs: Sequence[Tensor], rows: int) -> None:
        size, base = costs[0].element_size(), costs[0].data_ptr()
        offset = np.array([(cost.data_ptr() - base) // size for cost in costs])
        stride = np.array([cost.stride(0) for cost in costs])
        n, m = (np.array([cost.shape[axis] for cost in costs]) for axis in (0, 1))
        programs, blocks = -(-n // rows), -(-m // COLUMN_BLOCK)
        begins = [_before(counts) for counts in (n, m, programs * m, blocks)]
        parts = [
            np.stack([offset, stride, n, m, *begins], 1),
            _firsts(programs, rows),
            _firsts(blocks, COLUMN_BLOCK),
            n,
            m,
        ]
        # One copy to the device: each waits for the host.
        joined = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        views = joined.to(costs[0].device).split([part.size for part in parts])
        self.problem, self.program, self.block = (
            view.view(part.shape) for view, part in zip(views[:3], parts[:3], strict=True)
        )
        self.n, self.m = views[3:]
        self.rows_total, self.columns_total = int(n.sum()), int(m.sum())
        self.partial_total = int((programs * m).sum())
        # The column blocks of the widest problem, for a block of all of them.
        self.blocks = triton.next_power_of_2(int(blocks.max()))

    def rows_of(self, values: Tensor) -> Tensor:
        """Return the problems' numbers, (B,), for each of their rows."""
        return values.repeat_interleave(self.n, output_size=self.rows_total)

    def columns_of(self, values: Tensor) -> Tensor:
        """Return the problems' numbers, (B,), for each of their columns."""
        return values.repeat_interleave(self.m, output_size=self.columns_total)


def _before(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _firsts(counts: np.ndarray, step: int) -> np.ndarray:
    """Return problem and first row, or column, of each program of every problem."""
    problem = np.arange(len(counts)).repeat(counts)
    first = (np.arange(len(problem)) - _before(counts)[problem]) * step
    return np.stack([problem, first], 1)


def aligned(costs: Sequence[Tensor]) -> list[Tensor]:
    """Return the costs, copied where their rows do not begin and end at multiples of 16 bytes.

    Entry by entry such a row takes twice as many instructions as its iteration has otherwise; a
    copy takes as long as one or two iterations.
    """
    whole = 16 // costs[0].element_size()
    found = list(costs)
    odd = [
        i
        for i, c in enumerate(costs)
        if c.data_ptr() % 16 or c.stride(0) % whole or c.shape[1] % whole
    ]
    if odd:
        shapes = [(costs[i].shape[0], -(-costs[i].shape[1] // whole) * whole) for i in odd]
        sizes = [n * m for n, m in shapes]
        # Forbidden pairs past the end of a row; zeros, less a huge minimum, would be -inf.
        parts = costs[0].new_full((sum(sizes),), math.inf).split(sizes)
        for i, part, shape in zip(odd, parts, shapes, strict=True):
            found[i] = part.view(shape)[:, : costs[i].shape[1]]
        torch._foreach_copy_([found[i] for i in odd], [costs[i] for i in odd])
    return found
