"""Before the first Sinkhorn iteration: row and column minima, what cannot be solved, 16-bit costs.

The minima r_i = min_j C_ij and c_j = min_i (C_ij - r_i), over rows and columns of positive mass,
come off before the division by reg: digits are then spent where the plan is. Bound: one read of
the cost, as rows are held as in the sweep and both minima come from one visit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_columns import (
    L_DRIFT,
    L_ERROR,
    L_G_SUM,
    L_ITERATION,
    L_LAST_ERROR,
    L_MASS,
    L_SINCE,
    L_USED,
    STATE,
)
from dotresize.kernels.sinkhorn_rows import read_rows, store_columns
from dotresize.kernels.sinkhorn_sheet import (
    LARGEST_LEVEL,
    N_PER_REG,
    N_REG,
    NUMBERS,
    O_SPAN,
    OUTCOME,
)
from dotresize.kernels.sinkhorn_tables import (
    AT_COLUMN,
    AT_COLUMNS,
    AT_OFFSET,
    AT_PARTIAL,
    AT_PROGRAM,
    AT_ROW,
    AT_ROWS,
    AT_STORED,
    AT_STRIDE,
    LINE,
    STORED_ALIGN,
)
from dotresize.ops import constants

# The kernel that stores 16-bit costs takes a block of so many rows and columns at a time.
ROWS, COLUMNS = 8, 128
# Rows, or programs, of a block of the other kernels.
MANY = 128
LOG2E = tl.constexpr(constants.LOG2E)
STEPS = tl.constexpr(float(LARGEST_LEVEL))
# Column minima are taken out entry by entry only where leaving them to g would cost digits.
FAR_MINIMUM = tl.constexpr(16.0)


@triton.jit
def place(p_problem, p_program, i_program):
    """Return problem, first row or column, and what its line says; see sinkhorn_tables.Tables."""
    i_b = tl.load(p_program + 2 * i_program)
    first = tl.load(p_program + 2 * i_program + 1).to(tl.int32)
    p_line = p_problem + i_b * LINE
    n = tl.load(p_line + AT_ROWS).to(tl.int32)
    m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
    return i_b, first, p_line, n, m


@triton.jit
def closed_columns(p_b, o_c, m):
    """Return +inf for columns without mass and past the last one, else 0. [BC]"""
    return tl.where(tl.load(p_b + o_c, mask=o_c < m, other=0.0) > 0, 0.0, float("inf"))


@triton.jit
def open_entries(b_c, b_closed):
    """Return costs with +inf in closed columns, and -inf where a cost is NaN or -inf."""
    b_t = b_c + b_closed[None, :].to(b_c.dtype)
    return tl.where(b_t == b_t, b_t, -float("inf"))


@triton.jit
def minimum_or_zero(b_low):
    return tl.where(tl.abs(b_low) < float("inf"), b_low, 0.0)


@triton.jit
def row_minima(b_low, b_a, m_r, b_code, INFEASIBLE: tl.constexpr, INVALID: tl.constexpr):
    """Return r, what column minima are of (C less this), and the codes with these rows'."""
    b_code = tl.where(m_r & (b_low == -float("inf")), INVALID, b_code)
    stuck = m_r & (b_low == float("inf")) & (b_a > 0)
    b_code = tl.where(stuck, tl.maximum(b_code, INFEASIBLE), b_code)
    b_r = minimum_or_zero(b_low)
    return b_r, tl.where(m_r & (b_a > 0), b_r, -float("inf")), b_code


@triton.jit
def minima_kernel(
    p_cost,
    p_problem,
    p_program,
    p_a,
    p_b,
    p_row_min,
    p_partial,
    p_largest,
    p_status,
    rows_per_program,
    INFEASIBLE: tl.constexpr,
    INVALID: tl.constexpr,
    ALIGN: tl.constexpr,
    SPAN: tl.constexpr,
    HELD: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute r, minima of the columns of C - r over these rows, and with SPAN the largest C - r.

    Marks problems that hold NaN or -inf, or a row with mass and nowhere to go.
    """
    i_b, first, p_line, n, m = place(p_problem, p_program, tl.program_id(0))
    p_cost += tl.multiple_of(tl.load(p_line + AT_OFFSET), ALIGN)
    stride = tl.multiple_of(tl.load(p_line + AT_STRIDE), ALIGN)
    p_a += tl.load(p_line + AT_ROW)
    p_row_min += tl.load(p_line + AT_ROW)
    p_b += tl.load(p_line + AT_COLUMN)
    p_part = p_partial + tl.load(p_line + AT_PARTIAL) + (first // rows_per_program).to(tl.int64) * m
    last = tl.minimum(first + rows_per_program, n)
    m_read = tl.cdiv(m, ALIGN) * ALIGN
    o_c = tl.arange(0, BC)
    o_b = tl.arange(0, BR)
    b_code = tl.full((BR,), -1, dtype=tl.int32)
    b_largest = tl.zeros((BR,), dtype=p_row_min.dtype.element_ty)
    if HELD:
        m_last = (((PARTS - 1) * BC + o_c) < m_read)[None, :]
        b_closed = closed_columns(p_b, o_c, m)
        b_closed1 = b_closed
        b_closed2 = b_closed
        b_least = tl.full((BC,), float("inf"), dtype=b_largest.dtype)
        b_least1 = b_least
        b_least2 = b_least
        if PARTS == 3:
            b_closed1 = closed_columns(p_b, BC + o_c, m)
            b_closed2 = closed_columns(p_b, 2 * BC + o_c, m)
        p_r = p_cost + tl.minimum(first + o_b, last - 1).to(tl.int64)[:, None] * stride
        b_c, b_c1, b_c2 = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
        for row in tl.range(first, last, BR, num_stages=1):
            b_t = open_entries(b_c, b_closed)
            b_all = b_t
            if PARTS == 3:
                b_t1 = open_entries(b_c1, b_closed1)
                b_t2 = open_entries(b_c2, b_closed2)
                b_all = tl.minimum(b_t, tl.minimum(b_t1, b_t2))
            if SPAN:
                b_high = tl.where((o_c < m)[None, :], b_c, -float("inf"))
                if PARTS == 3:
                    b_last = tl.where((2 * BC + o_c < m)[None, :], b_c2, -float("inf"))
                    b_high = tl.maximum(b_high, tl.maximum(b_c1, b_last))
                b_high = tl.max(b_high, 1)
            # The next rows are on their way while these are compared.
            p_r = p_cost + tl.minimum(row + BR + o_b, last - 1).to(tl.int64)[:, None] * stride
            b_c, b_c1, b_c2 = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
            m_r = row + o_b < last
            b_a = tl.load(p_a + row + o_b, mask=m_r, other=0.0)
            b_r, b_off, b_code = row_minima(tl.min(b_all, 1), b_a, m_r, b_code, INFEASIBLE, INVALID)
            tl.store(p_row_min + row + o_b, b_r, mask=m_r)
            if SPAN:
                b_largest = tl.maximum(b_largest, tl.where(m_r, b_high - b_r, 0.0))
            b_least = tl.minimum(b_least, tl.min(b_t - b_off[:, None], 0))
            if PARTS == 3:
                b_least1 = tl.minimum(b_least1, tl.min(b_t1 - b_off[:, None], 0))
                b_least2 = tl.minimum(b_least2, tl.min(b_t2 - b_off[:, None], 0))
        store_columns(p_part, b_least, b_least1, b_least2, o_c, m, PARTS, BC)
    else:
        for row in range(first, last, BR):
            m_r = row + o_b < last
            p_r = p_cost + tl.minimum(row + o_b, last - 1).to(tl.int64)[:, None] * stride
            b_low = tl.full((BR,), float("inf"), dtype=b_largest.dtype)
            b_high = -b_low
            for start in range(0, m, BC):
                o_s = start + o_c
                b_c = tl.load(p_r + o_s[None, :], mask=(o_s < m_read)[None, :], other=float("inf"))
                b_t = open_entries(b_c, closed_columns(p_b, o_s, m))
                b_low = tl.minimum(b_low, tl.min(b_t, 1))
                if SPAN:
                    b_high = tl.maximum(b_high, largest(b_c, o_s < m))
            b_a = tl.load(p_a + row + o_b, mask=m_r, other=0.0)
            b_r, b_off, b_code = row_minima(b_low, b_a, m_r, b_code, INFEASIBLE, INVALID)
            tl.store(p_row_min + row + o_b, b_r, mask=m_r)
            if SPAN:
                b_largest = tl.maximum(b_largest, tl.where(m_r, b_high - b_r, 0.0))
            tl.debug_barrier()  # what other threads wrote of p_part is read back below
            for start in range(0, m, BC):
                o_s = start + o_c
                b_c = tl.load(p_r + o_s[None, :], mask=(o_s < m_read)[None, :], other=float("inf"))
                b_t = open_entries(b_c, closed_columns(p_b, o_s, m))
                b_least = tl.min(b_t - b_off[:, None], 0)
                if row > first:
                    b_least = tl.minimum(b_least, tl.load(p_part + o_s, mask=o_s < m, other=0.0))
                tl.store(p_part + o_s, b_least, mask=o_s < m)
    if SPAN:
        tl.store(p_largest + tl.program_id(0), tl.max(b_largest, 0))
    code = tl.max(b_code, 0)
    if code > -1:
        tl.atomic_max(p_status + i_b, code)


@triton.jit
def largest(b_c, m_c):
    return tl.max(tl.where(m_c[None, :], b_c, -float("inf")), 1)


@triton.jit
def begin_kernel(
    p_problem,
    p_program,
    p_block,
    p_numbers,
    p_outcome,
    p_counters,
    p_a,
    p_b,
    p_partial,
    p_largest,
    p_log_a,
    p_f,
    p_column_min,
    p_status,
    rows_per_program,
    programs,
    INFEASIBLE: tl.constexpr,
    SPAN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute log a of each program's rows, or c of a block of columns.

    Marks problems that have a column with nowhere to go. The first counter becomes 1 where column
    minima are large.
    """
    if tl.program_id(0) < programs:
        i_b, first, p_line, n, m = place(p_problem, p_program, tl.program_id(0))
        i_row = tl.load(p_line + AT_ROW)
        last = tl.minimum(first + rows_per_program, n)
        for row in range(first, last, BP):
            o_r = row + tl.arange(0, BP)
            b_a = tl.load(p_a + i_row + o_r, mask=o_r < last, other=0.0)
            b_log_a = tl.log2(b_a).to(p_f.dtype.element_ty)
            tl.store(p_log_a + i_row + o_r, b_log_a, mask=o_r < last)
            # The first sweep needs some shift: costs, less their minima, are not below 0.
            tl.store(p_f + i_row + o_r, b_log_a, mask=o_r < last)
    else:
        i_b, first, p_line, n, m = place(p_problem, p_block, tl.program_id(0) - programs)
        i_column = tl.load(p_line + AT_COLUMN)
        p_part = p_partial + tl.load(p_line + AT_PARTIAL)
        count = tl.cdiv(n, rows_per_program)
        o_c = first + tl.arange(0, BC)
        m_c = o_c < m
        b_all = tl.full((BP, BC), float("inf"), dtype=p_column_min.dtype.element_ty)
        for start in range(0, count, BP):
            o_p = start + tl.arange(0, BP)
            p_tile = p_part + o_p.to(tl.int64)[:, None] * m + o_c[None, :]
            m_tile = (o_p < count)[:, None] & m_c[None, :]
            b_all = tl.minimum(b_all, tl.load(p_tile, mask=m_tile, other=float("inf")))
        b_low = tl.min(b_all, 0)
        b_b = tl.load(p_b + i_column + o_c, mask=m_c, other=0.0)
        stuck = tl.max(((b_low == float("inf")) & (b_b > 0)).to(tl.int32), 0)
        b_low = minimum_or_zero(b_low)
        tl.store(p_column_min + i_column + o_c, b_low, mask=m_c)
        if stuck > 0:
            tl.atomic_max(p_status + i_b, INFEASIBLE)
        reg = tl.load(p_numbers + i_b * NUMBERS + N_REG)
        if tl.max(b_low.to(tl.float64), 0) > reg * FAR_MINIMUM:
            tl.atomic_max(p_counters, 1)
        if SPAN:
            if first == 0:
                p_own = p_largest + tl.load(p_line + AT_PROGRAM)
                o_p = tl.arange(0, BP)
                b_span = tl.zeros((BP,), dtype=tl.float64)
                for start in range(0, count, BP):
                    b_own = tl.load(p_own + start + o_p, mask=start + o_p < count, other=0.0)
                    b_span = tl.maximum(b_span, b_own.to(tl.float64))
                tl.store(p_outcome + i_b * OUTCOME + O_SPAN, tl.max(b_span, 0))


@triton.jit
def start_kernel(
    p_problem,
    p_block,
    p_numbers,
    p_mass,
    p_start,
    p_b,
    p_column_min,
    p_g,
    p_before,
    p_state,
    SHIFTED: tl.constexpr,
    BC: tl.constexpr,
):
    """Write b, the g that the first sweep reads, and the state that it finds.

    SHIFTED: column minima come off the cost, and so off g; else they become 0.
    """
    i_b, first, p_line, _, m = place(p_problem, p_block, tl.program_id(0))
    i_column = tl.load(p_line + AT_COLUMN)
    o_c = first + tl.arange(0, BC)
    m_c = o_c < m
    b_mass = tl.load(p_mass + i_column + o_c, mask=m_c, other=0.0)
    b_b = b_mass.to(p_b.dtype.element_ty)
    tl.store(p_b + i_column + o_c, b_b, mask=m_c)
    b_start = tl.load(p_start + i_column + o_c, mask=m_c, other=0.0) * LOG2E
    if SHIFTED:
        b_low = tl.load(p_column_min + i_column + o_c, mask=m_c, other=0.0).to(tl.float64)
        b_start -= b_low * tl.load(p_numbers + i_b * NUMBERS + N_PER_REG)
    else:
        tl.store(p_column_min + i_column + o_c, tl.zeros_like(b_b), mask=m_c)
    b_start = tl.where(b_b > 0, b_start, 0.0).to(p_g.dtype.element_ty)
    tl.store(p_before + i_column + o_c, b_start, mask=m_c)
    tl.store(p_g + i_column + o_c, tl.where(b_b > 0, b_start, -float("inf")), mask=m_c)
    p_own = p_state + STATE * tl.program_id(0)
    o_s = tl.arange(0, STATE)
    tl.store(p_own + o_s, tl.zeros((STATE,), dtype=p_g.dtype.element_ty))
    tl.debug_barrier()  # others write these zeros
    tl.store(p_own + L_ERROR, float("inf"))
    tl.store(p_own + L_LAST_ERROR, float("inf"))
    tl.store(p_own + L_DRIFT, float("inf"))
    tl.store(p_own + L_SINCE, -1.0)
    tl.store(p_own + L_ITERATION, 0.0)
    tl.store(p_own + L_G_SUM, tl.sum(b_start, 0))
    tl.store(p_own + L_USED, tl.sum((b_b > 0).to(p_g.dtype.element_ty), 0))
    tl.store(p_own + L_MASS, tl.sum(b_b, 0))


@triton.jit
def store_linear_kernel(
    p_cost,
    p_problem,
    p_stored,
    p_program,
    p_row_min,
    p_column_min,
    p_numbers,
    p_outcome,
    p_scale,
    rows_per_program,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Store (C - r - c) / step, rounded, as uint16; the step is 1/65535 of the problem's span.

    p_scale: what becomes of a level in an exponent.
    """
    i_b, first, p_line, n, m = place(p_problem, p_program, tl.program_id(0))
    p_cost += tl.load(p_line + AT_OFFSET)
    stride = tl.load(p_line + AT_STRIDE)
    p_stored += tl.load(p_line + AT_STORED)
    stride_stored = (tl.cdiv(m, STORED_ALIGN) * STORED_ALIGN).to(tl.int64)
    i_row = tl.load(p_line + AT_ROW)
    i_column = tl.load(p_line + AT_COLUMN)
    wide_step = linear_step(tl.load(p_outcome + i_b * OUTCOME + O_SPAN))
    if first == 0:
        scale = wide_step * tl.load(p_numbers + i_b * NUMBERS + N_PER_REG)
        tl.store(p_scale + i_b, scale.to(p_scale.dtype.element_ty))
    step = wide_step.to(p_row_min.dtype.element_ty)
    last = tl.minimum(first + rows_per_program, n)
    for row in range(first, last, BR):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < last
        b_rmin = tl.load(p_row_min + i_row + o_r, mask=m_r, other=0.0)
        for start in range(0, m, BC):
            o_c = start + tl.arange(0, BC)
            b_cmin = tl.load(p_column_min + i_column + o_c, mask=o_c < m, other=0.0)
            m_tile = m_r[:, None] & (o_c < m)[None, :]
            p_tile = p_cost + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
            b_c = tl.load(p_tile, mask=m_tile, other=0.0)
            b_c = levels(b_c - b_rmin[:, None] - b_cmin[None, :], step)
            p_out = p_stored + o_r.to(tl.int64)[:, None] * stride_stored + o_c[None, :]
            tl.store(p_out, b_c, mask=m_tile)


@triton.jit
def linear_step(span):
    """Return a level of 16-bit costs, by the largest one."""
    return tl.where(span > 0, span, 1.0) / STEPS


@triton.jit
def levels(b_c, step):
    # Rows or columns without mass have no part in the minima and may lie below them.
    return tl.minimum(tl.maximum(b_c / step + 0.5, 0.0), STEPS).to(tl.uint16)
