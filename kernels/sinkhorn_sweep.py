"""The row sweep of ``dotresize.kernels.sinkhorn_swept``: row potentials, partial column sums.

Each program owns a few whole rows of one problem. A row that is held (sinkhorn_tables.Tile) is kept
in registers, as one block or as three equal ones (a power of two of columns, or three times that):
one read and one exponential per entry. What keeps exponentials in range is not the row's maximum,
which would ask for one more reduction before any of them, but its potential of the sweep before:

    shift_i = f_i - log a_i,   s_i = sum_j exp(z_ij + shift_i),   f_i = log a_i + shift_i - log s_i,

where s is near 1 once potentials move little, and a row whose s is far from it is done again with
the maximum. Longer rows are walked twice, the second time out of the cache, with a second
exponential. Most sweeps read the kept plan instead, without exponentials (sinkhorn_rules.py).

The tables of problems and programs are those of sinkhorn_tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_columns import (
    L_ERROR,
    L_ITERATION,
    L_SINCE,
    STATE,
    all_of,
    sweep_kind,
)
from dotresize.kernels.sinkhorn_kept import sweep_kept
from dotresize.kernels.sinkhorn_rows import (
    column_vectors,
    columns_of,
    entries,
    entries_again,
    exponents,
    exponents_of_rows,
    finite,
    is_far,
    kept_one,
    read_block,
    read_rows,
    row_vectors,
    store_columns,
)
from dotresize.kernels.sinkhorn_rules import CHEAP, KEEPING, has_converged
from dotresize.kernels.sinkhorn_sheet import (
    N_PER_REG,
    N_TOL,
    NUMBERS,
    O_ERROR,
    O_EXACT,
    O_ITERATIONS,
    OUTCOME,
)
from dotresize.kernels.sinkhorn_tables import (
    AT_BLOCK,
    AT_COLUMN,
    AT_COLUMNS,
    AT_OFFSET,
    AT_PARTIAL,
    AT_ROW,
    AT_ROWS,
    AT_STORED,
    AT_STRIDE,
    LINE,
    STORED_ALIGN,
)


@triton.jit
def _goes_on(
    p_state,
    p_numbers,
    p_outcome,
    p_status,
    i_b,
    o_q,
    m_q,
    leads,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
):
    """Return whether the problem needs another sweep, by the errors of its last one.

    Every program of the problem comes to the same answer by itself, so none waits for another. The
    leading one writes; whether its CONVERGED is seen in this launch or RUNNING still must not
    matter to any warp, so both look at the errors, which stay as they are, and neither goes on.
    """
    status = tl.load(p_status + i_b)
    running = (status == RUNNING) | (status == CONVERGED)
    if running:
        error = tl.sum(all_of(p_state, L_ERROR, o_q, m_q), 0)
        tol = tl.load(p_numbers + i_b * NUMBERS + N_TOL)
        met = has_converged(error, tl.load(p_state + L_SINCE), tol)
        running = (status == RUNNING) & ~met
        if leads & met & (status == RUNNING):
            tl.store(p_status + i_b, CONVERGED)
            p_own = p_outcome + i_b * OUTCOME
            tl.store(p_own + O_ERROR, error.to(tl.float64))
            tl.store(p_own + O_ITERATIONS, tl.load(p_state + L_ITERATION).to(tl.float64) - 1)
    return running


@triton.jit
def sinkhorn_sweep_kernel(
    p_cost,
    p_problem,
    p_program,
    p_numbers,
    p_outcome,
    p_scale,
    p_log_a,
    p_row_min,
    p_column_min,
    p_g,
    p_f,
    p_kept,
    p_v,
    p_rho,
    p_partial,
    p_rounded,
    p_state,
    p_status,
    rows_per_program,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP: tl.constexpr,
    HELD: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    KEPT_PARTS: tl.constexpr,
    KEPT_BR: tl.constexpr,
    KEPT_BC: tl.constexpr,
):
    """Sweep one program's rows; its problem and first row are its line of p_program."""
    i_b = tl.load(p_program + 2 * tl.program_id(0))
    first = tl.load(p_program + 2 * tl.program_id(0) + 1).to(tl.int32)
    p_line = p_problem + i_b * LINE
    n = tl.load(p_line + AT_ROWS).to(tl.int32)
    m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
    stride_stored = (tl.cdiv(m, STORED_ALIGN) * STORED_ALIGN).to(tl.int64)
    stored = tl.multiple_of(tl.load(p_line + AT_STORED), STORED_ALIGN)
    # Rows, and so blocks of ALIGN entries of them, begin at multiples of 16 bytes.
    if p_cost.dtype.element_ty == tl.uint16:
        p_cost += stored
        stride = tl.multiple_of(stride_stored, STORED_ALIGN)
    else:
        p_cost += tl.multiple_of(tl.load(p_line + AT_OFFSET), ALIGN)
        stride = tl.multiple_of(tl.load(p_line + AT_STRIDE), ALIGN)
    i_row = tl.load(p_line + AT_ROW)
    i_column = tl.load(p_line + AT_COLUMN)
    p_state += STATE * tl.load(p_line + AT_BLOCK)
    o_q = tl.arange(0, BLOCKS)
    m_q = o_q < tl.cdiv(m, COLUMN_BLOCK)
    leads = first == 0
    if _goes_on(p_state, p_numbers, p_outcome, p_status, i_b, o_q, m_q, leads, RUNNING, CONVERGED):
        per_reg = tl.load(p_numbers + i_b * NUMBERS + N_PER_REG).to(p_g.dtype.element_ty)
        scale = tl.load(p_scale + i_b)
        last = tl.minimum(first + rows_per_program, n)
        i_part = tl.load(p_line + AT_PARTIAL) + (first // rows_per_program).to(tl.int64) * m
        p_part = p_partial + i_part
        p_log_a += i_row
        p_row_min += i_row
        p_f += i_row
        p_g += i_column
        p_cmin = p_column_min + i_column
        sweep = sweep_kind(p_state, p_numbers, i_b, o_q, m_q, KEEP)
        if leads & (sweep != CHEAP):
            p_exact = p_outcome + i_b * OUTCOME + O_EXACT
            tl.store(p_exact, tl.load(p_exact) + 1)
        if KEEP:
            p_kept += stored
            if sweep == CHEAP:
                stride_kept = tl.multiple_of(stride_stored, STORED_ALIGN)
                if tl.load(p_state + L_SINCE) == 0:
                    sweep_kept(
                        p_kept, stride_kept, p_v + i_column, p_log_a, p_rho + i_row, p_part,
                        p_rounded + i_part, first, last, m, True, KEPT_PARTS, KEPT_BR, KEPT_BC,
                    )  # fmt: skip
                else:
                    sweep_kept(
                        p_kept, stride_kept, p_v + i_column, p_log_a, p_rho + i_row, p_part,
                        p_part, first, last, m, False, KEPT_PARTS, KEPT_BR, KEPT_BC,
                    )  # fmt: skip
        if sweep != CHEAP:
            if HELD:
                _sweep_held(
                    p_cost, p_log_a, p_row_min, p_cmin, p_g, p_f, p_part, p_kept, stride,
                    stride_stored, first, last, m, per_reg, scale, sweep == KEEPING,
                    ALIGN, SHIFTED, KEEP, PARTS, BR, BC,
                )  # fmt: skip
            else:
                _sweep_streamed(
                    p_cost, p_log_a, p_row_min, p_cmin, p_g, p_f, p_part, p_kept, stride,
                    stride_stored, first, last, m, per_reg, scale, sweep == KEEPING,
                    ALIGN, SHIFTED, KEEP, BR, BC,
                )  # fmt: skip


@triton.jit
def _sweep_held(
    p_cost,
    p_log_a,
    p_row_min,
    p_cmin,
    p_g,
    p_f,
    p_part,
    p_kept,
    stride,
    stride_kept,
    first,
    last,
    m,
    per_reg,
    scale,
    keeping,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Sweep rows that are held, and where this sweep is ``keeping``, store them in 16 bits."""
    o_c = tl.arange(0, BC)
    b_sum = tl.zeros((BC,), dtype=p_g.dtype.element_ty)
    b_sum1 = b_sum
    b_sum2 = b_sum
    columns, columns1, columns2 = columns_of(p_g, p_cmin, o_c, m, SHIFTED, PARTS, BC)
    # Read to the end of the last block of ALIGN entries: where that is past m, copied and 16-bit
    # rows have something there, and g is -inf. Of three parts the first two are within the row.
    m_last = (((PARTS - 1) * BC + o_c) < tl.cdiv(m, ALIGN) * ALIGN)[None, :]
    o_b = tl.arange(0, BR)
    # From a program's first row 32 bits are enough, and spare registers.
    p_first = p_kept + first.to(tl.int64) * stride_kept
    kept_step = stride_kept.to(tl.int32)
    p_r = p_cost + tl.minimum(first + o_b, last - 1).to(tl.int64)[:, None] * stride
    blocks = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
    vectors = row_vectors(p_log_a, p_row_min, p_f, first + o_b, last)
    for row in tl.range(first, last, BR, num_stages=1):
        b_log_a, b_rmin, b_shift = vectors
        b_z, b_z1, b_z2 = exponents_of_rows(
            blocks, columns, columns1, columns2, b_rmin, per_reg, scale, SHIFTED, PARTS
        )
        # The next rows are on their way, in the registers of these, while these are summed.
        o_next = row + BR + o_b
        p_r = p_cost + tl.minimum(o_next, last - 1).to(tl.int64)[:, None] * stride
        blocks = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
        vectors = row_vectors(p_log_a, p_row_min, p_f, o_next, last)
        b_e, b_e1, b_e2, b_s = entries(b_z, b_z1, b_z2, b_shift, PARTS)
        b_log_s = tl.log2(b_s)
        b_far = is_far(b_log_a, b_log_s)
        o_r = row + o_b
        if tl.max(b_far.to(tl.int32), 0) > 0:
            # Read again: kept until here, the costs would take registers from all rows.
            p_r = p_cost + tl.minimum(o_r, last - 1).to(tl.int64)[:, None] * stride
            again = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
            b_z, b_z1, b_z2 = exponents_of_rows(
                again, columns, columns1, columns2, b_rmin, per_reg, scale, SHIFTED, PARTS
            )
            b_shift, b_e, b_e1, b_e2, b_log_s = entries_again(
                b_z, b_z1, b_z2, b_shift, b_far, PARTS
            )
        b_log_w = b_log_a - tl.where(b_log_a == -float("inf"), 0.0, b_log_s)
        tl.store(p_f + o_r, b_log_w + b_shift, mask=o_r < last)
        b_w = tl.exp2(b_log_w)[:, None]
        b_e *= b_w
        b_sum += tl.sum(b_e, 0)
        if PARTS == 3:
            b_e1 *= b_w
            b_e2 *= b_w
            b_sum1 += tl.sum(b_e1, 0)
            b_sum2 += tl.sum(b_e2, 0)
        if KEEP:
            if keeping:
                b_one = kept_one(b_log_a)[:, None]
                m_k = (o_r < last)[:, None]
                p_k = p_first + (o_r - first)[:, None] * kept_step + o_c[None, :]
                if PARTS == 3:
                    tl.store(p_k, (b_e * b_one).to(tl.float16), mask=m_k)
                    tl.store(p_k + BC, (b_e1 * b_one).to(tl.float16), mask=m_k)
                    p_k += 2 * BC
                    b_e = b_e2
                m_k = m_k & (((PARTS - 1) * BC + o_c) < stride_kept)[None, :]
                tl.store(p_k, (b_e * b_one).to(tl.float16), mask=m_k)
    store_columns(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS, BC)


@triton.jit
def _sweep_streamed(
    p_cost,
    p_log_a,
    p_row_min,
    p_cmin,
    p_g,
    p_f,
    p_part,
    p_kept,
    stride,
    stride_kept,
    first,
    last,
    m,
    per_reg,
    scale,
    keeping,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Do the same with rows that are too long to be held, BC columns at a time."""
    o_c = tl.arange(0, BC)
    m_read = tl.cdiv(m, ALIGN) * ALIGN
    for row in range(first, last, BR):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < last
        b_log_a, b_rmin, _ = row_vectors(p_log_a, p_row_min, p_f, o_r, last)
        p_r = p_cost + o_r.to(tl.int64)[:, None] * stride
        b_max = tl.full((BR,), -float("inf"), dtype=b_log_a.dtype)
        b_s = tl.zeros((BR,), dtype=b_log_a.dtype)
        for start in range(0, m, BC):
            o_s = start + o_c
            columns = column_vectors(p_g, p_cmin, o_s, m, SHIFTED)
            m_z = m_r[:, None] & (o_s < m_read)[None, :]
            b_c = read_block(p_r + o_s[None, :], m_z, True)
            b_z = exponents(b_c, columns, b_rmin, per_reg, scale, SHIFTED)
            b_new = tl.maximum(b_max, tl.max(b_z, 1))
            b_e = tl.exp2(b_z - finite(b_new)[:, None])
            b_s = b_s * tl.exp2(b_max - finite(b_new)) + tl.sum(b_e, 1)
            b_max = b_new
        b_f = b_log_a - tl.log2(b_s) - finite(b_max)
        b_f = tl.where(b_log_a == -float("inf"), b_log_a, b_f)
        tl.store(p_f + o_r, b_f, mask=m_r)
        tl.debug_barrier()  # what other threads wrote of p_part is read back below
        for start in range(0, m, BC):
            o_s = start + o_c
            m_c = o_s < m
            columns = column_vectors(p_g, p_cmin, o_s, m, SHIFTED)
            m_z = m_r[:, None] & (o_s < m_read)[None, :]
            b_c = read_block(p_r + o_s[None, :], m_z, True)
            b_z = exponents(b_c, columns, b_rmin, per_reg, scale, SHIFTED)
            b_e = tl.exp2(b_f[:, None] + b_z)
            if KEEP:
                if keeping:
                    p_k = p_kept + o_r.to(tl.int64)[:, None] * stride_kept + o_s[None, :]
                    m_k = m_r[:, None] & (o_s < stride_kept)[None, :]
                    tl.store(p_k, (b_e * kept_one(b_log_a)[:, None]).to(tl.float16), mask=m_k)
            b_p = tl.sum(b_e, 0)
            if row > first:
                b_p += tl.load(p_part + o_s, mask=m_c, other=0.0)
            tl.store(p_part + o_s, b_p, mask=m_c)
