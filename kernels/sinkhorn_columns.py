"""The column half of a Sinkhorn iteration, and the status after the last one.

A program owns COLUMN_BLOCK columns of one problem, its line of p_block. g has two buffers: an
iteration reads one and writes the other, so that a problem that stops keeps the potentials that its
last error belongs to.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
from dotresize.ops import constants

# Partial sums of so many sweep programs are read at once.
PROGRAM_BLOCK = 128
# A column sum below this may have lost terms that underflowed: it is redone with a shift.
TINY_COLUMN = 1e-25
FAST_ENOUGH = tl.constexpr(constants.FAST_ENOUGH)
# What momentum keeps of a column block: a line of its state.
M_ERROR = tl.constexpr(0)  # the block's part of the error
M_AGAINST = tl.constexpr(1)  # its part of the product of step and change
M_LAST_ERROR = tl.constexpr(2)  # the problem's error before; the first block's line has it
M_AGE = tl.constexpr(3)  # how long the problem's momentum has grown; likewise
M_LARGEST = tl.constexpr(4)  # the block's largest potential
MOMENTUM_LINE = tl.constexpr(8)  # a power of two: 32 bytes in float32


@triton.jit
def _shifted_sums(
    p_cost, p_f, p_row_min, b_cmin, stride, n, o_c, m_c, inv_reg, scale, BR: tl.constexpr
):
    """Return log2 of sum_i exp2(f_i - (C_ij - r_i - c_j) / reg), with a maximum taken out. [BC]"""
    b_max = tl.full(o_c.shape, -float("inf"), dtype=b_cmin.dtype)
    b_sum = tl.zeros(o_c.shape, dtype=b_cmin.dtype)
    for row in range(0, n, BR):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < n
        b_f = tl.load(p_f + o_r, mask=m_r, other=-float("inf"))
        b_rmin = tl.load(p_row_min + o_r, mask=m_r, other=0.0)
        p_tile = p_cost + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        m_tile = m_r[:, None] & m_c[None, :]
        if p_cost.dtype.element_ty == tl.uint16:
            b_z = b_f[:, None] - tl.load(p_tile, mask=m_tile, other=0).to(tl.float32) * scale
        else:
            b_c = tl.load(p_tile, mask=m_tile, other=float("inf"))
            b_z = b_f[:, None] - (b_c - b_rmin[:, None] - b_cmin[None, :]) * inv_reg
        b_new = tl.maximum(b_max, tl.max(b_z, 0))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_z - b_safe[None, :]), 0)
        b_max = b_new
    return tl.log2(b_sum) + tl.where(b_max == -float("inf"), 0.0, b_max)


@triton.jit
def _factor(p_last, p_new, o_q, m_q, FAR: tl.constexpr):
    """Return this iteration's over-relaxation, by what the last two left (ops/acceleration.py).

    Every block comes to the same answer, from the lines that all blocks of the problem have left.
    """
    error = tl.sum(tl.load(p_last + MOMENTUM_LINE * o_q + M_ERROR, mask=m_q, other=0.0), 0)
    against = tl.sum(tl.load(p_last + MOMENTUM_LINE * o_q + M_AGAINST, mask=m_q, other=0.0), 0)
    largest = tl.max(tl.load(p_last + MOMENTUM_LINE * o_q + M_LARGEST, mask=m_q, other=0.0), 0)
    again = (against < 0) | (error < FAST_ENOUGH * tl.load(p_last + M_LAST_ERROR)) | (largest > FAR)
    age = tl.where(again, 0.0, tl.load(p_last + M_AGE)) + 1
    tl.store(p_new + M_LAST_ERROR, error)
    tl.store(p_new + M_AGE, age)
    return (age - 1) / (age + 1)


@triton.jit
def sinkhorn_column_kernel(
    p_cost,
    p_problem,
    p_block,
    p_inv_reg,
    p_scale,
    p_b,
    p_used,
    p_row_min,
    p_column_min,
    p_f,
    p_g,
    p_g_new,
    p_partial,
    p_error,
    p_g_sum,
    p_g_sum_new,
    p_before,
    p_use_momentum,
    p_last,
    p_new,
    p_status,
    rows_per_program,
    RUNNING: tl.constexpr,
    BLOCKS: tl.constexpr,
    TINY: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FAR: tl.constexpr,
):
    """Update g_new = g + log b - log s, centred before; store how far the sums s are from b."""
    i_b = tl.load(p_block + 2 * tl.program_id(0))
    first = tl.load(p_block + 2 * tl.program_id(0) + 1).to(tl.int32)
    if tl.load(p_status + i_b) == RUNNING:
        p_line = p_problem + i_b * LINE
        n = tl.load(p_line + AT_ROWS).to(tl.int32)
        m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
        i_row = tl.load(p_line + AT_ROW)
        i_column = tl.load(p_line + AT_COLUMN)
        i_block = tl.load(p_line + AT_BLOCK)
        p_part = p_partial + tl.load(p_line + AT_PARTIAL)
        programs = tl.cdiv(n, rows_per_program)
        o_c = first + tl.arange(0, BC)
        m_c = o_c < m
        b_b = tl.load(p_b + i_column + o_c, mask=m_c, other=0.0)  # [BC]
        b_g = tl.load(p_g + i_column + o_c, mask=m_c, other=0.0)
        b_sums = tl.zeros((BP, BC), dtype=b_b.dtype)
        for start in range(0, programs, BP):
            o_p = start + tl.arange(0, BP)
            p_tile = p_part + o_p.to(tl.int64)[:, None] * m + o_c[None, :]
            b_sums += tl.load(p_tile, mask=(o_p < programs)[:, None] & m_c[None, :], other=0.0)
        b_s = tl.sum(b_sums, 0)
        error = tl.sum(tl.abs(b_s - b_b), 0)
        tl.store(p_error + tl.program_id(0), error)
        b_tiny = (b_s < TINY) & (b_b > 0)
        b_lse = tl.log2(tl.where(b_tiny, 1.0, b_s)) - b_g
        if tl.max(b_tiny.to(tl.int32), 0) > 0:
            b_redone = _shifted_sums(
                p_cost + tl.load(p_line + AT_OFFSET),
                p_f + i_row,
                p_row_min + i_row,
                tl.load(p_column_min + i_column + o_c, mask=m_c, other=0.0),
                tl.load(p_line + AT_STRIDE),
                n,
                o_c,
                m_c,
                tl.load(p_inv_reg + i_b),
                tl.load(p_scale + i_b),
                BP,
            )
            b_lse = tl.where(b_tiny, b_redone, b_lse)
        # g is kept centred: its constant is free, and digits are lost far from 0.
        o_q = tl.arange(0, BLOCKS)
        m_q = o_q < tl.cdiv(m, BC)
        total = tl.sum(tl.load(p_g_sum + i_block + o_q, mask=m_q, other=0.0), 0)
        b_update = tl.log2(b_b) - b_lse
        b_new = b_update - total / tl.load(p_used + i_b)
        if MOMENTUM:
            # Taken further along the last change; see dotresize.ops.acceleration.Momentum.
            b_change = b_new - tl.load(p_before + i_column + o_c, mask=m_c, other=0.0)
            b_inner = tl.where(b_b > 0, b_b * (b_update - b_g) * b_change, 0.0)
            tl.store(p_before + i_column + o_c, tl.where(b_b > 0, b_new, 0.0), mask=m_c)
            p_new += MOMENTUM_LINE * tl.program_id(0)
            factor = _factor(p_last + MOMENTUM_LINE * i_block, p_new, o_q, m_q, FAR)
            tl.store(p_new + M_ERROR, error)
            tl.store(p_new + M_AGAINST, tl.sum(b_inner, 0))
            b_new += tl.load(p_use_momentum + i_b) * factor * b_change
            tl.store(p_new + M_LARGEST, tl.max(tl.where(b_b > 0, tl.abs(b_new), 0.0), 0))
        tl.store(p_g_new + i_column + o_c, tl.where(b_b > 0, b_new, -float("inf")), mask=m_c)
        tl.store(p_g_sum_new + tl.program_id(0), tl.sum(tl.where(b_b > 0, b_new, 0.0), 0))


@triton.jit
def sinkhorn_status_kernel(
    p_problem,
    p_error,
    p_tol,
    p_status,
    p_marginal_error,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
    MAX_ITER: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Stop what has not stopped by itself: one program per problem."""
    i_b = tl.program_id(0).to(tl.int64)
    if tl.load(p_status + i_b) == RUNNING:
        m = tl.load(p_problem + i_b * LINE + AT_COLUMNS)
        o_e = tl.arange(0, BLOCKS)
        p_e = p_error + tl.load(p_problem + i_b * LINE + AT_BLOCK) + o_e
        error = tl.sum(tl.load(p_e, mask=o_e < tl.cdiv(m, COLUMN_BLOCK), other=0.0), 0)
        tol = tl.load(p_tol + i_b)
        converged = (error <= tol) & (tol > 0)
        tl.store(p_marginal_error + i_b, error)
        tl.debug_barrier()  # every thread has read the status before one of them writes it
        tl.store(p_status + i_b, tl.where(converged, CONVERGED, MAX_ITER))
