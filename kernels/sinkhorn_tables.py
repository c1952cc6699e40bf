"""How Sinkhorn problems of any shapes are laid out for the kernels: tiles, programs, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# A problem's line of the table that ``Tables.lines`` makes: what stands in which of its columns.
AT_OFFSET = tl.constexpr(0)  # where its cost begins, in entries, from the base of all costs
AT_STRIDE = tl.constexpr(1)  # entries from row to row
AT_ROWS = tl.constexpr(2)  # n
AT_COLUMNS = tl.constexpr(3)  # m
AT_ROW = tl.constexpr(4)  # where its row vectors begin,
AT_COLUMN = tl.constexpr(5)  # its column vectors,
AT_PARTIAL = tl.constexpr(6)  # its partial column sums,
AT_BLOCK = tl.constexpr(7)  # its column blocks,
AT_PROGRAM = tl.constexpr(8)  # its programs,
AT_STORED = tl.constexpr(9)  # and its entries in 16 bits, rows at multiples of STORED_ALIGN
LINE = tl.constexpr(16)  # columns of the table
STORED_ALIGN = tl.constexpr(8)
# Entries a thread holds of a row, if there are warps enough, and of all rows of a block at most. Of
# the former two vectors live through the loop (three with column minima), of the latter one.
ROW_ENTRIES = {torch.float32: 12, torch.float64: 4}
THREAD_ENTRIES = {torch.float32: 24, torch.float64: 4}
MAX_WARPS = {torch.float32: 16, torch.float64: 16}
STREAMED_COLUMNS = 1024
# Of a thread, so that three programs of four warps share a multiprocessor.
MOST_REGISTERS = 168
# Columns of one program of the column kernels.
COLUMN_BLOCK = 32


def parts_of(columns: int) -> tuple[int, int]:
    """Return how many equal parts a row of so many columns has, one or three, and their width.

    A width is a power of two, so three parts hold rows that would fill one part to 3/4 at most.
    """
    power = max(32, triton.next_power_of_2(columns))
    return (3, power // 4) if columns <= 3 * power // 4 and power >= 128 else (1, power)


class Tile:
    """How a sweep program holds rows of up to ``columns`` columns.

    held: whether a row stays in registers, else it is walked twice. keeps: whether a row of the
    kept plan, half as large, does; it has the shape ``kept``: parts, rows, columns of a part.
    """

    def __init__(
        self, columns: int, dtype: torch.dtype, *, shifted: bool = False, vector: int | None = None
    ) -> None:
        """Choose. vector: entries of 16 stored bytes, which a thread reads at a time."""
        parts, block = parts_of(columns)
        shapes = [(parts, block)] if parts == 1 else [(parts, block), (1, 4 * block)]
        for self.parts, self.block in shapes:
            # Warps stand along the columns alone, which three short parts give less room for.
            if self._hold(dtype, shifted, vector):
                break
        self.kept = (self.parts, self.rows, self.block) if self.held else (parts, 1, block)
        threads = 32 * MAX_WARPS[dtype]
        fits = self.held or parts * block <= threads * THREAD_ENTRIES[dtype]
        self.keeps = dtype == torch.float32 and vector is None and fits
        if not self.held:
            self.warps = MAX_WARPS[dtype] if self.keeps else 4
            self.parts, self.block, self.rows = 1, STREAMED_COLUMNS * self.warps // 4, 4

    def _hold(self, dtype: torch.dtype, shifted: bool, vector: int | None) -> bool:
        entries, most = (
            n[dtype] * 3 // (4 if shifted else 3) for n in (ROW_ENTRIES, THREAD_ENTRIES)
        )
        width = self.parts * self.block
        warps = triton.next_power_of_2(triton.cdiv(width, 32 * entries))
        # All along the columns, so that sums over the rows of a block stay within a thread; also of
        # the kept plan, of which a thread reads eight entries.
        along = self.block // (32 * (vector or (8 if dtype == torch.float32 else 2)))
        self.warps = max(1, min(max(4, warps), MAX_WARPS[dtype], along))
        fitting = 32 * self.warps * most // width
        self.held = fitting > 0
        self.rows = 1 << max(0, fitting.bit_length() - 1)
        return self.held

    def num_warps(self, lanes: int = 32) -> int:
        """Return the warps: as many threads whatever the lanes of a warp, but at least one warp."""
        return max(1, self.warps * 32 // lanes)

    def options(self, lanes: int = 32) -> dict[str, int]:
        """Return what the compiler is told of a sweep."""
        few = self.keeps and self.warps <= 4 and lanes == 32 and torch.version.hip is None
        return {"num_warps": self.num_warps(lanes)} | ({"maxnreg": MOST_REGISTERS} if few else {})

    @property
    def key(self) -> tuple[bool, int, int]:
        return self.held, self.parts, self.block

    def constants(self) -> dict[str, int]:
        return {"PARTS": self.parts, "BR": self.rows, "BC": self.block}

    def kept_constants(self) -> dict[str, int]:
        return dict(zip(("KEPT_PARTS", "KEPT_BR", "KEPT_BC"), self.kept, strict=True))


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
    """What a program finds its work by, for problems of these shapes.

    ``lines`` is int64 (B, LINE), in numpy; its columns are named above (AT_...), and the first two
    wait for the costs. ``program`` (P, 2) and ``block`` (Q, 2), int64 on the device, are problem
    and first row, or first column, of each program of the sweep and of the column kernels.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: int, device: torch.device | str
    ) -> None:
        n, m = (np.array([shape[axis] for shape in shapes]) for axis in (0, 1))
        programs, blocks = -(-n // rows), -(-m // COLUMN_BLOCK)
        stored = n * (-(-m // STORED_ALIGN.value) * STORED_ALIGN.value)
        self.lines = np.zeros((len(shapes), LINE.value), dtype=np.int64)
        for at, values in (
            (AT_ROWS, n),
            (AT_COLUMNS, m),
            (AT_ROW, _before(n)),
            (AT_COLUMN, _before(m)),
            (AT_PARTIAL, _before(programs * m)),
            (AT_BLOCK, _before(blocks)),
            (AT_PROGRAM, _before(programs)),
            (AT_STORED, _before(stored)),
        ):
            self.lines[:, at.value] = values
        parts = [_firsts(programs, rows), _firsts(blocks, COLUMN_BLOCK)]
        joined = torch.from_numpy(np.concatenate(parts)).to(device)
        self.program, self.block = joined.split([len(part) for part in parts])
        self.rows_total, self.columns_total = int(n.sum()), int(m.sum())
        self.partial_total, self.stored_total = int((programs * m).sum()), int(stored.sum())
        # The column blocks of the widest problem, for a block of all of them.
        self.blocks = triton.next_power_of_2(int(blocks.max()))


def _before(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _firsts(counts: np.ndarray, step: int) -> np.ndarray:
    """Return problem and first row, or column, of each program of every problem."""
    problem = np.arange(len(counts)).repeat(counts)
    first = (np.arange(len(problem)) - _before(counts)[problem]) * step
    return np.stack([problem, first], 1)


def lies_aligned(cost: Tensor) -> bool:
    """Return whether every row begins and ends at a multiple of 16 bytes."""
    whole = 16 // cost.element_size()
    return not (cost.data_ptr() % 16 or cost.stride(0) % whole or cost.shape[1] % whole)


def aligned(costs: Sequence[Tensor]) -> list[Tensor]:
    """Return the costs, copied where their rows do not begin and end at multiples of 16 bytes.

    Entry by entry such a row takes twice as many instructions as its iteration has otherwise; a
    copy takes as long as one or two iterations.
    """
    whole = 16 // costs[0].element_size()
    found = list(costs)
    odd = [i for i, cost in enumerate(costs) if not lies_aligned(cost)]
    if odd:
        shapes = [(costs[i].shape[0], -(-costs[i].shape[1] // whole) * whole) for i in odd]
        ends = [0, *accumulate(n * m for n, m in shapes)]
        # Forbidden pairs past the end of a row; zeros, less a huge minimum, would be -inf.
        room = costs[0].new_full((ends[-1],), math.inf)
        for i, begin, shape in zip(odd, ends, shapes, strict=False):
            found[i] = room.as_strided((shape[0], costs[i].shape[1]), (shape[1], 1), begin)
        torch._foreach_copy_([found[i] for i in odd], [costs[i] for i in odd])
    return found
