"""The row sweep of ``dotresize.kernels.sinkhorn``: row potentials, and partial column sums.

Each program owns a few whole rows of one problem. A row that fits (sinkhorn_tables.Tile) is kept in
registers, as one block or as three equal ones (a power of two of columns, or three times that):
one read and one exponential per entry. What keeps exponentials in range is not the row's maximum,
which would ask for one more reduction before any of them, but its potential of the sweep before:

    shift_i = f_i - log a_i,   s_i = sum_j exp(z_ij + shift_i),   f_i = log a_i + shift_i - log s_i,

where s is near 1 once potentials move little, and a row whose s is far from it is done again with
the maximum. Longer rows are walked twice, the second time out of the cache, with a second
exponential.

The tables of problems and programs are those of sinkhorn_tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_rows import (
    columns_of,
    entries,
    exponents,
    exponents_of_rows,
    finite,
    read_block,
    read_rows,
    row_vectors,
)
from dotresize.kernels.sinkhorn_tables import (
    AT_BLOCK,
    AT_COLUMN,
    AT_COLUMNS,
    AT_OFFSET,
    AT_PARTIAL,
    AT_ROW,
    AT_ROWS,
    AT_STRIDE,
    LINE,
)

# A row whose sum has left 2^LOW ... 2^HIGH is done again with its maximum taken out. What
# underflows is then less than 2^-106 of its mass, far below sinkhorn_columns.TINY_COLUMN.
LOW = tl.constexpr(-20.0)
HIGH = tl.constexpr(60.0)


@triton.jit
def _goes_on(
    p_error,
    p_tol,
    p_status,
    p_sweeps,
    p_marginal_error,
    i_b,
    i_block,
    m,
    leads,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Return whether the problem needs another sweep, by the errors of its last one.

    Every program of the problem comes to the same answer by itself, so none waits for another. The
    leading one writes; whether its CONVERGED is seen in this launch or RUNNING still must not
    matter to any warp, so both look at the errors, which stay as they are.
    """
    running = (tl.load(p_status + i_b) == RUNNING) | (tl.load(p_status + i_b) == CONVERGED)
    if running:
        o_e = tl.arange(0, BLOCKS)
        m_e = o_e < tl.cdiv(m, COLUMN_BLOCK)
        error = tl.sum(tl.load(p_error + i_block + o_e, mask=m_e, other=0.0), 0)
        tol = tl.load(p_tol + i_b)
        running = (tol == 0) | ~(error <= tol)  # never by an error that is NaN
        if leads:
            if running:
                tl.store(p_sweeps + i_b, tl.load(p_sweeps + i_b) + 1)
            else:
                tl.store(p_status + i_b, CONVERGED)
                tl.store(p_marginal_error + i_b, error)
    return running


@triton.jit
def sinkhorn_sweep_kernel(
    p_cost,
    p_problem,
    p_program,
    p_inv_reg,
    p_scale,
    p_log_a,
    p_row_min,
    p_column_min,
    p_g,
    p_f,
    p_partial,
    p_error,
    p_tol,
    p_status,
    p_sweeps,
    p_marginal_error,
    rows_per_program,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESIDENT: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Sweep one program's rows; its problem and first row are its line of p_program."""
    i_b = tl.load(p_program + 2 * tl.program_id(0))
    first = tl.load(p_program + 2 * tl.program_id(0) + 1).to(tl.int32)
    p_line = p_problem + i_b * LINE
    # Rows, and so blocks of ALIGN entries of them, begin at multiples of 16 bytes.
    p_cost += tl.multiple_of(tl.load(p_line + AT_OFFSET), ALIGN)
    stride = tl.multiple_of(tl.load(p_line + AT_STRIDE), ALIGN)
    n = tl.load(p_line + AT_ROWS).to(tl.int32)
    m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
    # Read to the end of the last block of ALIGN entries: where that is past m, copied and 16-bit
    # rows have something there, and g is -inf.
    m_read = tl.cdiv(m, ALIGN) * ALIGN
    i_row = tl.load(p_line + AT_ROW)
    i_column = tl.load(p_line + AT_COLUMN)
    i_block = tl.load(p_line + AT_BLOCK)
    if _goes_on(
        p_error,
        p_tol,
        p_status,
        p_sweeps,
        p_marginal_error,
        i_b,
        i_block,
        m,
        first == 0,
        RUNNING,
        CONVERGED,
        COLUMN_BLOCK,
        BLOCKS,
    ):
        inv_reg = tl.load(p_inv_reg + i_b)
        scale = tl.load(p_scale + i_b)
        last = tl.minimum(first + rows_per_program, n)
        p_part = (
            p_partial + tl.load(p_line + AT_PARTIAL) + (first // rows_per_program).to(tl.int64) * m
        )
        p_log_a += i_row
        p_row_min += i_row
        p_f += i_row
        p_g += i_column
        p_cmin = p_column_min + i_column
        o_c = tl.arange(0, BC)
        if RESIDENT:
            b_sum = tl.zeros((BC,), dtype=p_g.dtype.element_ty)
            columns = columns_of(p_g, p_cmin, o_c, m, SHIFTED)
            columns1 = columns
            columns2 = columns
            if PARTS == 3:
                columns1 = columns_of(p_g, p_cmin, BC + o_c, m, SHIFTED)
                columns2 = columns_of(p_g, p_cmin, 2 * BC + o_c, m, SHIFTED)
                b_sum1 = tl.zeros((BC,), dtype=p_g.dtype.element_ty)
                b_sum2 = tl.zeros((BC,), dtype=p_g.dtype.element_ty)
            # Of three parts the first two are within the row.
            m_last = (((PARTS - 1) * BC + o_c) < m_read)[None, :]
            o_b = tl.arange(0, BR)
            p_r = p_cost + tl.minimum(first + o_b, last - 1).to(tl.int64)[:, None] * stride
            blocks = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
            vectors = row_vectors(p_log_a, p_row_min, p_f, first + o_b, last)
            for row in tl.range(first, last, BR, num_stages=1):
                b_log_a, b_rmin, b_shift = vectors
                b_z, b_z1, b_z2 = exponents_of_rows(
                    blocks, columns, columns1, columns2, b_rmin, inv_reg, scale, SHIFTED, PARTS
                )
                # The next rows are on their way, in the registers of these, while these are summed.
                o_next = row + BR + o_b
                p_r = p_cost + tl.minimum(o_next, last - 1).to(tl.int64)[:, None] * stride
                blocks = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
                vectors = row_vectors(p_log_a, p_row_min, p_f, o_next, last)
                b_e, b_e1, b_e2, b_s = entries(b_z, b_z1, b_z2, b_shift, PARTS)
                b_log_s = tl.log2(b_s)
                b_far = (b_log_a > -float("inf")) & ~((b_log_s > LOW) & (b_log_s < HIGH))
                o_r = row + o_b
                if tl.max(b_far.to(tl.int32), 0) > 0:
                    # Read again: kept until here, the costs would take registers from all rows.
                    p_r = p_cost + tl.minimum(o_r, last - 1).to(tl.int64)[:, None] * stride
                    again = read_rows(p_r + o_c[None, :], m_last, PARTS, BC)
                    b_z, b_z1, b_z2 = exponents_of_rows(
                        again, columns, columns1, columns2, b_rmin, inv_reg, scale, SHIFTED, PARTS
                    )
                    b_top = b_z
                    if PARTS == 3:
                        b_top = tl.maximum(b_z, tl.maximum(b_z1, b_z2))
                    b_shift = tl.where(b_far, -finite(tl.max(b_top, 1)), b_shift)
                    b_e, b_e1, b_e2, b_s = entries(b_z, b_z1, b_z2, b_shift, PARTS)
                    b_log_s = tl.log2(b_s)
                b_log_w = b_log_a - tl.where(b_log_a == -float("inf"), 0.0, b_log_s)
                tl.store(p_f + o_r, b_log_w + b_shift, mask=o_r < last)
                b_w = tl.exp2(b_log_w)
                b_sum += tl.sum(b_e * b_w[:, None], 0)
                if PARTS == 3:
                    b_sum1 += tl.sum(b_e1 * b_w[:, None], 0)
                    b_sum2 += tl.sum(b_e2 * b_w[:, None], 0)
            tl.store(p_part + o_c, b_sum, mask=o_c < m)
            if PARTS == 3:
                o_c += BC
                tl.store(p_part + o_c, b_sum1, mask=o_c < m)
                o_c += BC
                tl.store(p_part + o_c, b_sum2, mask=o_c < m)
        else:
            for row in range(first, last, BR):
                o_r = row + tl.arange(0, BR)
                m_r = o_r < last
                b_log_a, b_rmin, _ = row_vectors(p_log_a, p_row_min, p_f, o_r, last)
                p_r = p_cost + o_r.to(tl.int64)[:, None] * stride
                b_max = tl.full((BR,), -float("inf"), dtype=b_log_a.dtype)
                b_s = tl.zeros((BR,), dtype=b_log_a.dtype)
                for start in range(0, m, BC):
                    o_s = start + o_c
                    columns = columns_of(p_g, p_cmin, o_s, m, SHIFTED)
                    m_z = m_r[:, None] & (o_s < m_read)[None, :]
                    b_c = read_block(p_r + o_s[None, :], m_z, True)
                    b_z = exponents(b_c, columns, b_rmin, inv_reg, scale, SHIFTED)
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
                    columns = columns_of(p_g, p_cmin, o_s, m, SHIFTED)
                    m_z = m_r[:, None] & (o_s < m_read)[None, :]
                    b_c = read_block(p_r + o_s[None, :], m_z, True)
                    b_z = exponents(b_c, columns, b_rmin, inv_reg, scale, SHIFTED)
                    b_p = tl.sum(tl.exp2(b_f[:, None] + b_z), 0)
                    if row > first:
                        b_p += tl.load(p_part + o_s, mask=m_c, other=0.0)
                    tl.store(p_part + o_s, b_p, mask=m_c)
