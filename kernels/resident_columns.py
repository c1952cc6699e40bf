"""The column half of a resident Sinkhorn iteration: each program's own columns.

A program owns OWN columns of its problem, from ``i_p * OWN`` on, and holds what they have in
registers; what it leaves for the others is a number of each kind in ``p_lines``.
"""

from __future__ import annotations

import triton.language as tl

from dotresize.kernels.gluon_compat import gl, jit
from dotresize.kernels.sinkhorn_columns import TINY_COLUMN, misfits_of, shifted_sums
from dotresize.kernels.sinkhorn_prepare import LOG2E, minimum_or_zero
from dotresize.kernels.sinkhorn_rules import CHEAP, KEEPING

# The kinds of numbers that programs leave for each other.
R_ERROR = tl.constexpr(0)
R_AGAINST = tl.constexpr(1)
R_LARGEST = tl.constexpr(2)
R_G_SUM = tl.constexpr(3)
R_TOTAL = tl.constexpr(4)
R_DRIFT = tl.constexpr(5)
R_MISFITS = tl.constexpr(6)
R_USED = tl.constexpr(7)
R_MASS = tl.constexpr(8)
R_CODE = tl.constexpr(9)
R_SPAN = tl.constexpr(10)
KINDS = tl.constexpr(16)


@jit
def leave(p_lines, kind, i_p, number, GP: tl.constexpr):
    tl.store(p_lines + kind * GP + i_p, number)


@jit
def left(p_lines, kind, G: tl.constexpr, GP: tl.constexpr, LG: tl.constexpr):
    """Return a number of every program, 0 past the last one."""
    o_g = gl.arange(0, GP, layout=LG)
    return tl.load(p_lines + kind * GP + o_g, mask=o_g < G, other=0.0)


@jit
def own_columns(i_p, OWN: tl.constexpr, LP: tl.constexpr):
    return i_p * OWN + gl.arange(0, OWN, layout=gl.SliceLayout(0, LP))


@jit
def column_minima(
    p_part,
    p_b,
    p_column_min,
    i_p,
    m,
    INFEASIBLE: tl.constexpr,
    G: tl.constexpr,
    BP: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    LP: tl.constexpr,
):
    """Write c of this program's columns; return c, and the code of what cannot be solved."""
    o_o = own_columns(i_p, OWN, LP)
    o_p = gl.arange(0, BP, layout=gl.SliceLayout(1, LP))
    b_low = gl.full([BP, OWN], float("inf"), gl.float32, layout=LP)
    for start in range(0, G, BP):
        p_tile = p_part + (start + o_p)[:, None] * WIDTH + o_o[None, :]
        m_tile = (start + o_p < G)[:, None] & (o_o < m)[None, :]
        b_low = tl.minimum(b_low, tl.load(p_tile, mask=m_tile, other=float("inf")))
    b_c = tl.min(b_low, 0)
    b_b = tl.load(p_b + o_o, mask=o_o < m, other=0.0)
    stuck = tl.max(((b_c == float("inf")) & (b_b > 0)).to(tl.int32), 0)
    b_c = minimum_or_zero(b_c)
    tl.store(p_column_min + o_o, b_c, mask=o_o < m)
    return b_c, tl.where(stuck > 0, INFEASIBLE, -1)


@jit
def start_columns(
    p_lines,
    p_b,
    p_start,
    p_g,
    i_p,
    b_c,
    wide_per_reg,
    m,
    OWN: tl.constexpr,
    GP: tl.constexpr,
    LP: tl.constexpr,
):
    """Return b and g of this program's columns; write g, and leave what the first update needs."""
    o_o = own_columns(i_p, OWN, LP)
    b_b = tl.load(p_b + o_o, mask=o_o < m, other=0.0).to(tl.float32)
    b_start = tl.load(p_start + o_o, mask=o_o < m, other=0.0) * LOG2E
    b_g = tl.where(b_b > 0, b_start - b_c.to(tl.float64) * wide_per_reg, 0.0).to(tl.float32)
    tl.store(p_g + o_o, tl.where(b_b > 0, b_g, -float("inf")), mask=o_o < m)
    leave(p_lines, R_G_SUM, i_p, tl.sum(b_g, 0), GP)
    leave(p_lines, R_USED, i_p, tl.sum((b_b > 0).to(tl.float32), 0), GP)
    leave(p_lines, R_MASS, i_p, tl.sum(b_b, 0), GP)
    return b_b, b_g


@jit
def _sums(
    p_part,
    o_o,
    m,
    G: tl.constexpr,
    BP: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    LP: tl.constexpr,
):
    """Return the columns' sums over all programs, in a fixed order."""
    o_p = gl.arange(0, BP, layout=gl.SliceLayout(1, LP))
    b_sums = gl.full([BP, OWN], 0.0, gl.float32, layout=LP)
    for start in range(0, G, BP):
        p_tile = p_part + (start + o_p)[:, None] * WIDTH + o_o[None, :]
        m_tile = (start + o_p < G)[:, None] & (o_o < m)[None, :]
        b_sums += tl.load(p_tile, mask=m_tile, other=0.0)
    return tl.sum(b_sums, 0)


@jit
def update_columns(
    columns,
    p_lines,
    p_part,
    p_rounded,
    p_cost,
    stride,
    p_f,
    p_row_min,
    p_column_min,
    p_g_new,
    p_v,
    i_p,
    n,
    m,
    per_reg,
    sweep,
    share,
    centre,
    factor,
    mass,
    KEEP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BP: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    LP: tl.constexpr,
):
    """Update this program's columns and leave its numbers; the formulas of sinkhorn_columns.

    columns: b, g, the plain update before, reference and gamma; returned as they are then.
    """
    b_b, b_g, b_before, b_reference, b_gamma = columns
    o_o = own_columns(i_p, OWN, LP)
    m_o = o_o < m
    b_s = _sums(p_part, o_o, m, G, BP, OWN, WIDTH, LP)
    used = b_b > 0
    total = tl.sum(b_s, 0)
    misfits = 0.0
    if KEEP:
        if sweep == CHEAP:
            b_s *= b_gamma * tl.where(used, tl.exp2(b_g - b_reference), 0.0)
            total = tl.sum(b_s, 0)
        else:
            b_reference = b_g
            misfits = misfits_of(b_s, b_b, mass)
            if sweep == KEEPING:
                b_r = _sums(p_rounded, o_o, m, G, BP, OWN, WIDTH, LP)
                b_gamma = tl.where(used, b_s / b_r, 0.0)
    error = tl.sum(tl.abs(b_s * share - b_b), 0)
    b_tiny = (b_s < TINY_COLUMN) & used & (sweep != CHEAP)
    b_lse = tl.log2(tl.where(b_tiny, 1.0, b_s)) - b_g
    if tl.max(b_tiny.to(tl.int32), 0) > 0:
        b_zero = gl.full([OWN], 0.0, gl.float32, layout=gl.SliceLayout(0, LP))
        b_redone = shifted_sums(
            p_cost,
            p_f,
            p_row_min,
            tl.load(p_column_min + o_o, mask=m_o, other=0.0),
            stride,
            n,
            gl.arange(0, BP, layout=gl.SliceLayout(1, LP)),
            o_o,
            m_o,
            per_reg,
            1.0,
            b_zero - float("inf"),
            b_zero,
        )
        b_lse = tl.where(b_tiny, b_redone, b_lse)
    b_update = tl.where(used, tl.log2(b_b) - b_lse, 0.0)
    b_new = tl.where(used, b_update - centre, 0.0)
    if MOMENTUM:
        b_change = b_new - b_before
        b_before = b_new
        leave(p_lines, R_AGAINST, i_p, tl.sum(b_b * (b_update - b_g) * b_change, 0), GP)
        b_new += factor * b_change
    tl.store(p_g_new + o_o, tl.where(used, b_new, -float("inf")), mask=m_o)
    leave(p_lines, R_ERROR, i_p, error, GP)
    leave(p_lines, R_LARGEST, i_p, tl.max(tl.abs(b_new), 0), GP)
    leave(p_lines, R_G_SUM, i_p, tl.sum(b_new, 0), GP)
    leave(p_lines, R_TOTAL, i_p, total, GP)
    if KEEP:
        b_moved = b_new - b_reference
        tl.store(p_v + o_o, tl.where(used, tl.exp2(b_moved), 0.0), mask=m_o)
        leave(p_lines, R_DRIFT, i_p, tl.max(tl.abs(b_moved), 0), GP)
        leave(p_lines, R_MISFITS, i_p, misfits, GP)
    return b_b, b_new, b_before, b_reference, b_gamma
