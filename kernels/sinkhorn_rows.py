"""Rows of a Sinkhorn cost in registers: how they are read, and what becomes of them in a sweep.

A row is one block of columns or three equal ones; functions that take three blocks take one three
times where there is only one.

Naming: p_ pointer, b_ block value, m_ mask, o_ offset; BR rows and BC columns of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_rules import KEPT_ONE

# A row whose sum has left 2^LOW ... 2^HIGH is done again with its maximum taken out. What
# underflows is then less than 2^-106 of its mass, far below sinkhorn_columns.TINY_COLUMN.
LOW = tl.constexpr(-20.0)
HIGH = tl.constexpr(60.0)


@triton.jit
def is_far(b_log_a, b_log_s):
    """Return which rows with mass have to be done again with their maximum."""
    return (b_log_a > -float("inf")) & ~((b_log_s > LOW) & (b_log_s < HIGH))


@triton.jit
def column_vectors(p_g, p_column_min, o_c, m, SHIFTED: tl.constexpr):
    """Return g, -inf past the last column, and the column minima. [BC] each"""
    b_g = tl.load(p_g + o_c, mask=o_c < m, other=-float("inf"))
    b_cmin = b_g
    if SHIFTED:
        b_cmin = tl.load(p_column_min + o_c, mask=o_c < m, other=0.0)
    return b_g, b_cmin


@triton.jit
def columns_of(
    p_g, p_column_min, o_c, m, SHIFTED: tl.constexpr, PARTS: tl.constexpr, BC: tl.constexpr
):
    """Return the vectors along each of three parts, or of one part three times."""
    columns = column_vectors(p_g, p_column_min, o_c, m, SHIFTED)
    columns1 = columns
    columns2 = columns
    if PARTS == 3:
        columns1 = column_vectors(p_g, p_column_min, BC + o_c, m, SHIFTED)
        columns2 = column_vectors(p_g, p_column_min, 2 * BC + o_c, m, SHIFTED)
    return columns, columns1, columns2


@triton.jit
def kept_one(b_log_a):
    """Return what rows of the plan are multiplied by in the kept plan: KEPT_ONE / a.

    Rows of a mass below 2^-106 are there with less than KEPT_ONE, which rho heeds.
    """
    return tl.exp2(tl.minimum(-b_log_a, 106.0)) * KEPT_ONE


@triton.jit
def kept_weights(b_log_a, b_sums):
    """Return a over the rows' sums; 0 for rows that the kept plan has lost, or without mass."""
    return tl.where(b_sums > 0, tl.exp2(b_log_a) / b_sums, 0.0)


@triton.jit
def kept_correction(b_sums):
    """Return rho of rows by the sums of their entries, 1 for rows that have none."""
    return tl.where(b_sums > 0, (1.0 / b_sums) * KEPT_ONE, 1.0)


@triton.jit
def counted(b_c):
    """Return uint16 as float32 by its bits: conversions run at a quarter of the rate."""
    return (b_c.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def exponents(b_c, columns, b_rmin, inv_reg, scale, SHIFTED: tl.constexpr):
    """Return z = g - (C - r - c) / reg of a block, in powers of two; -inf past the edges. [BR, BC]

    With uint16 storage, C - r - c is stored as a multiple of the scale.
    """
    b_g, b_cmin = columns
    if b_c.dtype == tl.uint16:
        b_z = b_g[None, :] - counted(b_c) * scale
    else:
        b_c = b_c - b_rmin[:, None]
        if SHIFTED:
            b_c -= b_cmin[None, :]
        b_z = b_g[None, :] - b_c * inv_reg
    return b_z


@triton.jit
def read_block(p_rows, m_c, MASKED: tl.constexpr):
    """Return a block of costs; +inf past the edge: 0 less a huge minimum would be -inf."""
    if MASKED:
        if p_rows.dtype.element_ty == tl.uint16:
            b_c = tl.load(p_rows, mask=m_c, other=0)
        else:
            b_c = tl.load(p_rows, mask=m_c, other=float("inf"))
    else:
        b_c = tl.load(p_rows)
    return b_c


@triton.jit
def row_vectors(p_log_a, p_row_min, p_f, o_r, last):
    """Return log a, r, and what keeps the rows' exponentials in range. [BR] each"""
    m_r = o_r < last
    b_log_a = tl.load(p_log_a + o_r, mask=m_r, other=-float("inf"))
    b_rmin = tl.load(p_row_min + o_r, mask=m_r, other=0.0)
    b_f = tl.load(p_f + o_r, mask=m_r, other=0.0)
    # Without mass: entries, sum and weight are 0, whatever z is.
    b_shift = tl.where(b_log_a == -float("inf"), b_log_a, b_f - b_log_a)
    return b_log_a, b_rmin, b_shift


@triton.jit
def read_rows(p_r, m_last, PARTS: tl.constexpr, BC: tl.constexpr):
    """Return whole rows in three parts, the first two full, or one part three times."""
    if PARTS == 3:
        b_c = read_block(p_r, m_last, False)
        b_c1 = read_block(p_r + BC, m_last, False)
        b_c2 = read_block(p_r + 2 * BC, m_last, True)
    else:
        b_c = read_block(p_r, m_last, True)
        b_c1 = b_c
        b_c2 = b_c
    return b_c, b_c1, b_c2


@triton.jit
def exponents_of_rows(
    blocks,
    columns,
    columns1,
    columns2,
    b_rmin,
    inv_reg,
    scale,
    SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return z of each part."""
    b_c, b_c1, b_c2 = blocks
    b_z = exponents(b_c, columns, b_rmin, inv_reg, scale, SHIFTED)
    b_z1 = b_z
    b_z2 = b_z
    if PARTS == 3:
        b_z1 = exponents(b_c1, columns1, b_rmin, inv_reg, scale, SHIFTED)
        b_z2 = exponents(b_c2, columns2, b_rmin, inv_reg, scale, SHIFTED)
    return b_z, b_z1, b_z2


@triton.jit
def entries(b_z, b_z1, b_z2, b_shift, PARTS: tl.constexpr):
    """Return exp2(z + shift) of each part, and the rows' sums."""
    b_e = tl.exp2(b_z + b_shift[:, None])
    b_e1 = b_e
    b_e2 = b_e
    b_all = b_e
    if PARTS == 3:
        b_e1 = tl.exp2(b_z1 + b_shift[:, None])
        b_e2 = tl.exp2(b_z2 + b_shift[:, None])
        b_all = b_e + b_e1 + b_e2
    return b_e, b_e1, b_e2, tl.sum(b_all, 1)


@triton.jit
def entries_again(b_z, b_z1, b_z2, b_shift, b_far, PARTS: tl.constexpr):
    """Return shift, entries and log2 sums with the maximum of each far row as its shift."""
    b_top = b_z
    if PARTS == 3:
        b_top = tl.maximum(b_z, tl.maximum(b_z1, b_z2))
    b_shift = tl.where(b_far, -finite(tl.max(b_top, 1)), b_shift)
    b_e, b_e1, b_e2, b_s = entries(b_z, b_z1, b_z2, b_shift, PARTS)
    return b_shift, b_e, b_e1, b_e2, tl.log2(b_s)


@triton.jit
def store_columns(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS: tl.constexpr, BC: tl.constexpr):
    tl.store(p_part + o_c, b_sum, mask=o_c < m)
    if PARTS == 3:
        tl.store(p_part + BC + o_c, b_sum1, mask=BC + o_c < m)
        tl.store(p_part + 2 * BC + o_c, b_sum2, mask=2 * BC + o_c < m)


@triton.jit
def finite(b_max):
    return tl.where(b_max == -float("inf"), 0.0, b_max)
