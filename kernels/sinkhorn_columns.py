"""The column half of a Sinkhorn iteration, and the state that passes between its launches.

A program owns COLUMN_BLOCK columns of one problem, its line of p_block. g has two buffers: an
iteration reads one and writes the other, so that a problem that stops keeps the potentials that its
last error belongs to. So has the state, as every block reads what all blocks of its problem left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_rules import (
    CHEAP,
    KEEPING,
    LOST,
    momentum_age,
    next_sweep,
)
from dotresize.kernels.sinkhorn_sheet import N_MAX_ITER, N_MOMENTUM, N_PER_REG, N_TOL, NUMBERS
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

# Partial sums of so many sweep programs are read at once.
PROGRAM_BLOCK = 128
# A column sum below this may have lost terms that underflowed: it is redone with a shift.
TINY_COLUMN = tl.constexpr(1e-25)
# An iteration leaves a line of the state for each column block. These numbers are the block's own:
L_ERROR = tl.constexpr(0)  # its part of the error
L_AGAINST = tl.constexpr(1)  # its part of the product of step and change
L_LARGEST = tl.constexpr(2)  # its largest potential
L_G_SUM = tl.constexpr(3)  # the sum of its potentials
L_TOTAL = tl.constexpr(4)  # the sum of its columns of the plan
L_DRIFT = tl.constexpr(5)  # its largest distance from the reference
L_MISFITS = tl.constexpr(6)  # its columns that the kept plan does not represent
L_USED = tl.constexpr(7)  # its columns with mass
L_MASS = tl.constexpr(8)  # and their mass
# These are the problem's, the same in every block's line:
L_LAST_ERROR = tl.constexpr(9)  # the error of the iteration before
L_AGE = tl.constexpr(10)  # for how long momentum has grown
L_SINCE = tl.constexpr(11)  # sweeps after the one that stored the kept plan, -1 without one
L_ITERATION = tl.constexpr(12)  # the number of the next sweep
STATE = tl.constexpr(16)


@triton.jit
def all_of(p_state, at, o_q, m_q):
    """Return a number of every block of a problem, 0 past the last one."""
    return tl.load(p_state + STATE * o_q + at, mask=m_q, other=0.0)


@triton.jit
def sweep_kind(p_state, p_numbers, i_b, o_q, m_q, KEEP: tl.constexpr):
    """Return the kind of the next sweep, by what the last one left; see sinkhorn_rules.

    p_state: the line of the problem's first block.
    """
    return next_sweep(
        tl.sum(all_of(p_state, L_ERROR, o_q, m_q), 0),
        tl.load(p_state + L_LAST_ERROR),
        tl.max(all_of(p_state, L_DRIFT, o_q, m_q), 0),
        tl.sum(all_of(p_state, L_MISFITS, o_q, m_q), 0) == 0,
        tl.load(p_state + L_SINCE),
        tl.load(p_state + L_ITERATION),
        tl.load(p_numbers + i_b * NUMBERS + N_MAX_ITER),
        tl.load(p_numbers + i_b * NUMBERS + N_TOL),
        KEEP,
    )


@triton.jit
def shifted_sums(
    p_cost, p_f, p_row_min, b_cmin, stride, n, o_r, o_c, m_c, per_reg, scale, b_max, b_sum
):
    """Return log2 of sum_i exp2(f_i - (C_ij - r_i - c_j) / reg), with a maximum taken out. [BC]

    o_r: the rows of a block, from 0; b_max, b_sum: -inf and 0, [BC].
    """
    for row in range(0, n, o_r.shape[0]):
        m_r = row + o_r < n
        b_f = tl.load(p_f + row + o_r, mask=m_r, other=-float("inf"))
        b_rmin = tl.load(p_row_min + row + o_r, mask=m_r, other=0.0)
        p_tile = p_cost + (row + o_r).to(tl.int64)[:, None] * stride + o_c[None, :]
        m_tile = m_r[:, None] & m_c[None, :]
        if p_cost.dtype.element_ty == tl.uint16:
            b_z = b_f[:, None] - tl.load(p_tile, mask=m_tile, other=0).to(tl.float32) * scale
        else:
            b_c = tl.load(p_tile, mask=m_tile, other=float("inf"))
            b_z = b_f[:, None] - (b_c - b_rmin[:, None] - b_cmin[None, :]) * per_reg
        b_new = tl.maximum(b_max, tl.max(b_z, 0))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_z - b_safe[None, :]), 0)
        b_max = b_new
    return tl.log2(b_sum) + tl.where(b_max == -float("inf"), 0.0, b_max)


@triton.jit
def misfits_of(b_s, b_b, mass):
    """Return how many columns the kept plan of this sweep would not represent."""
    return tl.sum(((b_b > 0) & ~(b_s >= mass * LOST)).to(b_s.dtype), 0)


@triton.jit
def _partial_sums(p_part, programs, m, o_p, o_c, m_c, b_sums):
    """Return column sums over the sweep's programs, from zeros [BP, BC], in a fixed order."""
    for start in range(0, programs, o_p.shape[0]):
        p_tile = p_part + (start + o_p).to(tl.int64)[:, None] * m + o_c[None, :]
        m_tile = (start + o_p < programs)[:, None] & m_c[None, :]
        b_sums += tl.load(p_tile, mask=m_tile, other=0.0)
    return tl.sum(b_sums, 0)


@triton.jit
def sinkhorn_column_kernel(
    p_cost,
    p_problem,
    p_block,
    p_numbers,
    p_scale,
    p_b,
    p_row_min,
    p_column_min,
    p_f,
    p_g,
    p_g_new,
    p_partial,
    p_rounded,
    p_reference,
    p_v,
    p_gamma,
    p_before,
    p_last,
    p_new,
    p_status,
    rows_per_program,
    RUNNING: tl.constexpr,
    BLOCKS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    MOMENTUM: tl.constexpr,
    KEEP: tl.constexpr,
    FAR: tl.constexpr,
):
    """Update g_new = g + log b - log c, centred before; leave how far the sums c are from b."""
    i_b = tl.load(p_block + 2 * tl.program_id(0))
    first = tl.load(p_block + 2 * tl.program_id(0) + 1).to(tl.int32)
    if tl.load(p_status + i_b) == RUNNING:
        kind: tl.constexpr = p_g.dtype.element_ty
        p_line = p_problem + i_b * LINE
        n = tl.load(p_line + AT_ROWS).to(tl.int32)
        m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
        i_row = tl.load(p_line + AT_ROW)
        i_column = tl.load(p_line + AT_COLUMN)
        programs = tl.cdiv(n, rows_per_program)
        o_c = first + tl.arange(0, BC)
        o_p = tl.arange(0, BP)
        m_c = o_c < m
        b_b = tl.load(p_b + i_column + o_c, mask=m_c, other=0.0).to(kind)  # [BC]
        b_g = tl.load(p_g + i_column + o_c, mask=m_c, other=-float("inf"))
        b_zeros = tl.zeros((BP, BC), dtype=kind)
        i_part = tl.load(p_line + AT_PARTIAL)
        b_s = _partial_sums(p_partial + i_part, programs, m, o_p, o_c, m_c, b_zeros)

        o_q = tl.arange(0, BLOCKS)
        m_q = o_q < tl.cdiv(m, BC)
        p_own = p_last + STATE * tl.program_id(0)
        p_all = p_last + STATE * tl.load(p_line + AT_BLOCK)
        sweep = sweep_kind(p_all, p_numbers, i_b, o_q, m_q, KEEP)
        since = tl.load(p_own + L_SINCE)
        total = tl.sum(b_s, 0)
        share = 1.0
        misfits = 0.0
        if KEEP:
            p_ref = p_reference + i_column + o_c
            p_gam = p_gamma + i_column + o_c
            mass = tl.sum(all_of(p_all, L_MASS, o_q, m_q), 0)
            if sweep == CHEAP:
                b_gamma = tl.load(p_gam, mask=m_c, other=0.0)
                if since == 0:
                    # What the keeping sweep left there are its own sums.
                    b_r = _partial_sums(p_rounded + i_part, programs, m, o_p, o_c, m_c, b_zeros)
                    b_gamma = tl.where(b_b > 0, b_gamma / b_r, 0.0)
                    tl.store(p_gam, b_gamma, mask=m_c)
                b_s *= b_gamma * tl.load(p_v + i_column + o_c, mask=m_c, other=0.0)
                total = tl.sum(b_s, 0)
                # This takes the iteration before: the other blocks of this one are still at it.
                before = tl.sum(all_of(p_all, L_TOTAL, o_q, m_q), 0)
                share = mass / before
                misfits = tl.load(p_own + L_MISFITS)
                since += 1.0
            else:
                tl.store(p_ref, tl.where(b_b > 0, b_g, 0.0), mask=m_c)
                since = -1.0
                misfits = misfits_of(b_s, b_b, mass)
                if sweep == KEEPING:
                    tl.store(p_gam, b_s, mask=m_c)
                    since = 0.0
        error = tl.sum(tl.abs(b_s * share - b_b), 0)
        # Cheap sweeps leave no row potentials to redo a column from, and have no such column.
        b_tiny = (b_s < TINY_COLUMN) & (b_b > 0) & (sweep != CHEAP)
        b_lse = tl.log2(tl.where(b_tiny, 1.0, b_s)) - tl.where(b_b > 0, b_g, 0.0)
        if tl.max(b_tiny.to(tl.int32), 0) > 0:
            b_zero = tl.zeros((BC,), dtype=kind)
            stride = tl.load(p_line + AT_STRIDE)
            offset = tl.load(p_line + AT_OFFSET)
            if p_cost.dtype.element_ty == tl.uint16:
                stride = (tl.cdiv(m, STORED_ALIGN) * STORED_ALIGN).to(tl.int64)
                offset = tl.load(p_line + AT_STORED)
            b_redone = shifted_sums(
                p_cost + offset,
                p_f + i_row,
                p_row_min + i_row,
                tl.load(p_column_min + i_column + o_c, mask=m_c, other=0.0),
                stride,
                n,
                o_p,
                o_c,
                m_c,
                tl.load(p_numbers + i_b * NUMBERS + N_PER_REG).to(kind),
                tl.load(p_scale + i_b),
                b_zero - float("inf"),
                b_zero,
            )
            b_lse = tl.where(b_tiny, b_redone, b_lse)
        # g is kept centred: its constant is free, and digits are lost far from 0.
        used = tl.load(p_own + L_USED)
        centre = tl.sum(all_of(p_all, L_G_SUM, o_q, m_q), 0) / tl.sum(
            all_of(p_all, L_USED, o_q, m_q), 0
        )
        b_update = tl.where(b_b > 0, tl.log2(b_b) - b_lse, 0.0)
        b_new = b_update - centre
        last_error = tl.sum(all_of(p_all, L_ERROR, o_q, m_q), 0)
        age = 0.0
        against = 0.0
        if MOMENTUM:
            # Taken further along the last change; see dotresize.ops.acceleration.Momentum.
            p_bef = p_before + i_column + o_c
            b_change = b_new - tl.load(p_bef, mask=m_c, other=0.0)
            tl.store(p_bef, b_new, mask=m_c)
            against = tl.sum(tl.where(b_b > 0, b_b * (b_update - b_g) * b_change, 0.0), 0)
            age = momentum_age(
                tl.load(p_own + L_AGE),
                tl.sum(all_of(p_all, L_AGAINST, o_q, m_q), 0),
                last_error,
                tl.load(p_own + L_LAST_ERROR),
                tl.max(all_of(p_all, L_LARGEST, o_q, m_q), 0),
                FAR,
            )
            factor = tl.load(p_numbers + i_b * NUMBERS + N_MOMENTUM).to(kind)
            b_new += factor * ((age - 1) / (age + 1)) * b_change
        b_new = tl.where(b_b > 0, b_new, 0.0)
        tl.store(p_g_new + i_column + o_c, tl.where(b_b > 0, b_new, -float("inf")), mask=m_c)
        p_own = p_new + STATE * tl.program_id(0)
        if KEEP:
            # Where the sweep was exact, it is the reference: that of this launch is not yet read.
            b_from = tl.where(b_b > 0, b_g, 0.0)
            if sweep == CHEAP:
                b_from = tl.load(p_ref, mask=m_c, other=0.0)
            b_moved = b_new - b_from
            b_v = tl.where(b_b > 0, tl.exp2(b_moved), 0.0)
            tl.store(p_v + i_column + o_c, b_v, mask=m_c)
            tl.store(p_own + L_DRIFT, tl.max(tl.abs(b_moved), 0))
            tl.store(p_own + L_MISFITS, misfits)
        tl.store(p_own + L_ERROR, error)
        tl.store(p_own + L_AGAINST, against)
        tl.store(p_own + L_LARGEST, tl.max(tl.abs(b_new), 0))
        tl.store(p_own + L_G_SUM, tl.sum(b_new, 0))
        tl.store(p_own + L_TOTAL, total)
        tl.store(p_own + L_USED, used)
        tl.store(p_own + L_MASS, tl.load(p_last + STATE * tl.program_id(0) + L_MASS))
        tl.store(p_own + L_LAST_ERROR, last_error)
        tl.store(p_own + L_AGE, age)
        tl.store(p_own + L_SINCE, since)
        tl.store(p_own + L_ITERATION, tl.load(p_last + STATE * tl.program_id(0) + L_ITERATION) + 1)
