"""Before the first Sinkhorn iteration: row and column minima, what cannot be solved, 16-bit costs.

The minima r_i = min_j C_ij and c_j = min_i (C_ij - r_i), over rows and columns of positive mass,
come off before the division by reg: digits are then spent where the plan is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_tables import (
    AT_COLUMN,
    AT_COLUMNS,
    AT_OFFSET,
    AT_PARTIAL,
    AT_ROW,
    AT_ROWS,
    AT_STRIDE,
    LINE,
)

# Of a program's block; what fills a warp's loads, and leaves registers for loads on their way.
ROWS, COLUMNS = 8, 128
STAGES = 4


def row_block(columns: int, warps: int) -> tuple[int, int]:
    """Return rows and columns of a block along rows: long, as each step waits for memory."""
    long = min(128 * warps, triton.next_power_of_2(columns))
    return 128 * warps // long, long


@triton.jit
def _line(p_problem, p_program):
    """Return problem, first row, and the columns of its line; see sinkhorn_tables.Tables."""
    i_b = tl.load(p_program + 2 * tl.program_id(0))
    first = tl.load(p_program + 2 * tl.program_id(0) + 1).to(tl.int32)
    p_line = p_problem + i_b * LINE
    offset = tl.load(p_line + AT_OFFSET)
    stride = tl.load(p_line + AT_STRIDE)
    n = tl.load(p_line + AT_ROWS).to(tl.int32)
    m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
    return i_b, first, p_line, offset, stride, n, m


@triton.jit
def row_minima_kernel(
    p_cost,
    p_problem,
    p_program,
    p_a,
    p_b,
    p_row_min,
    p_largest,
    p_status,
    rows_per_program,
    INFEASIBLE: tl.constexpr,
    INVALID: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute r, and each program's largest C - r; mark problems with bad entries."""
    i_b, first, p_line, offset, stride, n, m = _line(p_problem, p_program)
    p_cost += offset
    i_row = tl.load(p_line + AT_ROW)
    i_column = tl.load(p_line + AT_COLUMN)
    last = tl.minimum(first + rows_per_program, n)
    b_code = tl.full((BR,), -1, dtype=tl.int32)
    b_largest = tl.zeros((BR,), dtype=p_row_min.dtype.element_ty)
    for row in range(first, last, BR):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < last
        p_r = p_cost + o_r.to(tl.int64)[:, None] * stride
        b_lows = tl.full((BR, BC), float("inf"), dtype=b_largest.dtype)
        b_highs = tl.full((BR, BC), -float("inf"), dtype=b_largest.dtype)
        b_any = tl.full((BR, BC), float("inf"), dtype=b_largest.dtype)
        for start in tl.range(0, m, BC, num_stages=STAGES):
            o_c = start + tl.arange(0, BC)
            m_tile = m_r[:, None] & (o_c < m)[None, :]
            b_c = tl.load(p_r + o_c[None, :], mask=m_tile, other=float("inf"))
            b_b = tl.load(p_b + i_column + o_c, mask=o_c < m, other=0.0)
            b_any = tl.minimum(b_any, b_c, propagate_nan=tl.PropagateNan.ALL)
            b_lows = tl.minimum(b_lows, tl.where((b_b > 0)[None, :], b_c, float("inf")))
            b_highs = tl.maximum(b_highs, tl.where(m_tile, b_c, -float("inf")))
        b_bad = (b_any != b_any) | (b_any == -float("inf"))
        b_low = tl.min(b_lows, 1)
        b_high = tl.max(b_highs, 1)
        b_a = tl.load(p_a + i_row + o_r, mask=m_r, other=0.0)
        b_stuck = (b_low == float("inf")) & (b_a > 0)
        b_low = tl.where(tl.abs(b_low) < float("inf"), b_low, 0.0)
        tl.store(p_row_min + i_row + o_r, b_low, mask=m_r)
        b_largest = tl.maximum(b_largest, tl.where(m_r, b_high - b_low, 0.0))
        b_code = tl.where(m_r & b_stuck, tl.maximum(b_code, INFEASIBLE), b_code)
        b_code = tl.where(tl.max(b_bad.to(tl.int32), 1) > 0, INVALID, b_code)
    tl.store(p_largest + tl.program_id(0), tl.max(b_largest, 0))
    code = tl.max(b_code, 0)
    if code > -1:
        tl.atomic_max(p_status + i_b, code)


@triton.jit
def partial_minima_kernel(
    p_cost,
    p_problem,
    p_program,
    p_a,
    p_row_min,
    p_partial,
    rows_per_program,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute column minima of C - r over a sweep program's rows; the second axis is columns."""
    _, first, p_line, offset, stride, n, m = _line(p_problem, p_program)
    p_cost += offset
    i_row = tl.load(p_line + AT_ROW)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(1) * BC < m:
        last = tl.minimum(first + rows_per_program, n)
        b_low = tl.full((BR, BC), float("inf"), dtype=p_row_min.dtype.element_ty)
        for row in range(first, last, BR):
            o_r = row + tl.arange(0, BR)
            m_r = o_r < last
            b_a = tl.load(p_a + i_row + o_r, mask=m_r, other=0.0)
            b_rmin = tl.load(p_row_min + i_row + o_r, mask=m_r, other=0.0)
            p_tile = p_cost + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
            m_tile = (b_a > 0)[:, None] & (o_c < m)[None, :]
            b_c = tl.load(p_tile, mask=m_tile, other=float("inf"))
            b_low = tl.minimum(b_low, b_c - b_rmin[:, None])
        p_part = (
            p_partial + tl.load(p_line + AT_PARTIAL) + (first // rows_per_program).to(tl.int64) * m
        )
        tl.store(p_part + o_c, tl.min(b_low, 0), mask=o_c < m)


@triton.jit
def column_minima_kernel(
    p_problem,
    p_block,
    p_b,
    p_partial,
    p_column_min,
    p_status,
    rows_per_program,
    INFEASIBLE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute c from the partial minima; mark problems with a column that has nowhere to go."""
    i_b, first, p_line, _, _, n, m = _line(p_problem, p_block)
    i_column = tl.load(p_line + AT_COLUMN)
    p_part = p_partial + tl.load(p_line + AT_PARTIAL)
    programs = tl.cdiv(n, rows_per_program)
    o_c = first + tl.arange(0, BC)
    m_c = o_c < m
    b_all = tl.full((BP, BC), float("inf"), dtype=p_column_min.dtype.element_ty)
    for start in range(0, programs, BP):
        o_p = start + tl.arange(0, BP)
        p_tile = p_part + o_p.to(tl.int64)[:, None] * m + o_c[None, :]
        m_tile = (o_p < programs)[:, None] & m_c[None, :]
        b_all = tl.minimum(b_all, tl.load(p_tile, mask=m_tile, other=float("inf")))
    b_low = tl.min(b_all, 0)
    b_b = tl.load(p_b + i_column + o_c, mask=m_c, other=0.0)
    stuck = tl.max(((b_low == float("inf")) & (b_b > 0)).to(tl.int32), 0)
    b_low = tl.where(tl.abs(b_low) < float("inf"), b_low, 0.0)
    tl.store(p_column_min + i_column + o_c, b_low, mask=m_c)
    if stuck > 0:
        tl.atomic_max(p_status + i_b, INFEASIBLE)


@triton.jit
def store_linear_kernel(
    p_cost,
    p_problem,
    p_stored,
    p_stored_problem,
    p_program,
    p_row_min,
    p_column_min,
    p_step,
    rows_per_program,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Store (C - r - c) / step, rounded, as uint16 into the problem's place of p_stored_problem."""
    i_b, first, p_line, offset, stride, n, m = _line(p_problem, p_program)
    p_cost += offset
    p_stored += tl.load(p_stored_problem + i_b * LINE + AT_OFFSET)
    stride_stored = tl.load(p_stored_problem + i_b * LINE + AT_STRIDE)
    i_row = tl.load(p_line + AT_ROW)
    i_column = tl.load(p_line + AT_COLUMN)
    step = tl.load(p_step + i_b)
    for row in range(first, tl.minimum(first + rows_per_program, n), BR):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < tl.minimum(first + rows_per_program, n)
        b_rmin = tl.load(p_row_min + i_row + o_r, mask=m_r, other=0.0)
        for start in range(0, m, BC):
            o_c = start + tl.arange(0, BC)
            b_cmin = tl.load(p_column_min + i_column + o_c, mask=o_c < m, other=0.0)
            m_tile = m_r[:, None] & (o_c < m)[None, :]
            p_tile = p_cost + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
            b_c = tl.load(p_tile, mask=m_tile, other=0.0)
            b_c = (b_c - b_rmin[:, None] - b_cmin[None, :]) / step + 0.5
            # Rows or columns without mass have no part in the minima and may lie below them.
            b_c = tl.minimum(tl.maximum(b_c, 0.0), 65535.0).to(tl.uint16)
            p_out = p_stored + o_r.to(tl.int64)[:, None] * stride_stored + o_c[None, :]
            tl.store(p_out, b_c, mask=m_tile)
