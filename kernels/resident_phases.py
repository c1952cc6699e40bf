"""What a program of the resident Sinkhorn does between two meetings; see resident_kernel.py.

Rows of a program are BLOCKS blocks of BR, each in one part or three of BC columns, as in the sweep
that is launched for every iteration; what blocks have in shared memory is ``kept``:

    EXACT_COST      (C - r - c) / reg, in powers of two, float32
    LEVELS          the same as 65536 levels
    KEPT_PLAN       the plan of a keeping sweep in float16 (sinkhorn_rules.py)

Layouts: L of a block, LP of partial sums by columns that are a program's own; their slices are
those of vectors. Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import triton.language as tl

from dotresize.kernels.gluon_compat import gl, jit
from dotresize.kernels.sinkhorn_prepare import (
    closed_columns,
    largest,
    levels,
    open_entries,
    row_minima,
)
from dotresize.kernels.sinkhorn_rows import (
    columns_of,
    entries,
    entries_again,
    exponents,
    is_far,
    kept_correction,
    kept_one,
    kept_weights,
    row_vectors,
    store_columns,
)
from dotresize.kernels.sinkhorn_rules import KEPT_ONE

EXACT_COST, LEVELS, KEPT_PLAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@jit
def read_costs(
    p_cost, stride, o_r, o_c, n, m, ALIGN: tl.constexpr, PARTS: tl.constexpr, BC: tl.constexpr
):
    """Return a block's rows in three parts, or one part three times; +inf past the last column.

    Past the last row there is the last one again.
    """
    p_r = p_cost + tl.minimum(o_r, n - 1).to(tl.int64)[:, None] * stride + o_c[None, :]
    m_read = tl.cdiv(m, ALIGN) * ALIGN
    b_c = tl.load(p_r, mask=(o_c < m_read)[None, :], other=float("inf"))
    b_c1 = b_c
    b_c2 = b_c
    if PARTS == 3:
        b_c1 = tl.load(p_r + BC, mask=(BC + o_c < m_read)[None, :], other=float("inf"))
        b_c2 = tl.load(p_r + 2 * BC, mask=(2 * BC + o_c < m_read)[None, :], other=float("inf"))
    return b_c, b_c1, b_c2


@jit
def scan(
    kept,
    p_cost,
    stride,
    p_a,
    p_b,
    p_row_min,
    p_log_a,
    p_f,
    p_part,
    first,
    n,
    m,
    INFEASIBLE: tl.constexpr,
    INVALID: tl.constexpr,
    STORE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    L: tl.constexpr,
):
    """Find r, and the minima of C - r over this program's rows; with EXACT_COST keep C - r.

    Returns the code of what cannot be solved, and with LEVELS the largest C - r.
    """
    o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, L))
    o_b = gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    b_closed = closed_columns(p_b, o_c, m)
    b_closed1 = b_closed
    b_closed2 = b_closed
    if PARTS == 3:
        b_closed1 = closed_columns(p_b, BC + o_c, m)
        b_closed2 = closed_columns(p_b, 2 * BC + o_c, m)
    b_least = gl.full([BR, BC], float("inf"), gl.float32, layout=L)
    b_least1 = b_least
    b_least2 = b_least
    b_code = gl.full([BR], -1, gl.int32, layout=gl.SliceLayout(1, L))
    b_largest = gl.full([BR], 0.0, gl.float32, layout=gl.SliceLayout(1, L))
    for i in range(BLOCKS):
        o_r = first + i * BR + o_b
        m_r = o_r < n
        b_c, b_c1, b_c2 = read_costs(p_cost, stride, o_r, o_c, n, m, ALIGN, PARTS, BC)
        b_t = open_entries(b_c, b_closed)
        b_all = b_t
        b_t1 = b_t
        b_t2 = b_t
        if PARTS == 3:
            b_t1 = open_entries(b_c1, b_closed1)
            b_t2 = open_entries(b_c2, b_closed2)
            b_all = tl.minimum(b_t, tl.minimum(b_t1, b_t2))
        b_a = tl.load(p_a + o_r, mask=m_r, other=0.0)
        b_r, b_off, b_code = row_minima(tl.min(b_all, 1), b_a, m_r, b_code, INFEASIBLE, INVALID)
        b_log_a = tl.log2(b_a).to(tl.float32)
        tl.store(p_row_min + o_r, b_r, mask=m_r)
        tl.store(p_log_a + o_r, b_log_a, mask=m_r)
        # The first sweep needs some shift: costs, less their minima, are not below 0.
        tl.store(p_f + o_r, b_log_a, mask=m_r)
        if STORE == LEVELS:
            b_high = largest(b_c, o_c < m)
            if PARTS == 3:
                b_high = tl.maximum(b_high, largest(b_c1, BC + o_c < m))
                b_high = tl.maximum(b_high, largest(b_c2, 2 * BC + o_c < m))
            b_largest = tl.maximum(b_largest, tl.where(m_r, b_high - b_r, 0.0))
        b_least = tl.minimum(b_least, b_t - b_off[:, None])
        if PARTS == 3:
            b_least1 = tl.minimum(b_least1, b_t1 - b_off[:, None])
            b_least2 = tl.minimum(b_least2, b_t2 - b_off[:, None])
        if STORE == EXACT_COST:
            kept.index(i * PARTS).store(b_c - b_r[:, None])
            if PARTS == 3:
                kept.index(i * PARTS + 1).store(b_c1 - b_r[:, None])
                kept.index(i * PARTS + 2).store(b_c2 - b_r[:, None])
    b_low = tl.min(b_least, 0)
    b_low1 = b_low
    b_low2 = b_low
    if PARTS == 3:
        b_low1 = tl.min(b_least1, 0)
        b_low2 = tl.min(b_least2, 0)
    store_columns(p_part, b_low, b_low1, b_low2, o_c, m, PARTS, BC)
    return tl.max(b_code, 0), tl.max(b_largest, 0)


@jit
def _scaled(b_c, p_column_min, o_c, m, factor):
    b_low = tl.load(p_column_min + o_c, mask=o_c < m, other=0.0)
    return (b_c - b_low[None, :]) * factor


@jit
def keep_costs(
    kept,
    p_cost,
    stride,
    p_row_min,
    p_column_min,
    first,
    n,
    m,
    per_reg,
    step,
    STORE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    L: tl.constexpr,
):
    """Turn what ``scan`` kept into (C - r - c) / reg, or keep the levels of C - r - c."""
    o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, L))
    o_b = gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    for i in range(BLOCKS):
        if STORE == EXACT_COST:
            for j in gl.static_range(PARTS):
                b_k = _scaled(
                    kept.index(i * PARTS + j).load(L), p_column_min, j * BC + o_c, m, per_reg
                )
                kept.index(i * PARTS + j).store(b_k)
        else:
            o_r = first + i * BR + o_b
            b_r = tl.load(p_row_min + o_r, mask=o_r < n, other=0.0)[:, None]
            b_c, b_c1, b_c2 = read_costs(p_cost, stride, o_r, o_c, n, m, ALIGN, PARTS, BC)
            b_k = _scaled(b_c - b_r, p_column_min, o_c, m, 1.0)
            kept.index(i * PARTS).store(levels(b_k, step))
            if PARTS == 3:
                b_k = _scaled(b_c1 - b_r, p_column_min, BC + o_c, m, 1.0)
                kept.index(i * PARTS + 1).store(levels(b_k, step))
                b_k = _scaled(b_c2 - b_r, p_column_min, 2 * BC + o_c, m, 1.0)
                kept.index(i * PARTS + 2).store(levels(b_k, step))


@jit
def _exponents(b_k, columns, b_rmin, per_reg, scale, STORE: tl.constexpr):
    """Return z of a block, from what is kept or, for a plan to be kept, from the cost."""
    if STORE == EXACT_COST:
        b_g, _ = columns
        b_z = b_g[None, :] - b_k
    else:
        b_z = exponents(b_k, columns, b_rmin, per_reg, scale, True)
    return b_z


@jit
def sweep_exact(
    kept,
    p_cost,
    stride,
    p_row_min,
    p_column_min,
    p_log_a,
    p_f,
    p_g,
    p_part,
    first,
    n,
    m,
    per_reg,
    scale,
    keeping,
    STORE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    L: tl.constexpr,
):
    """Find f of this program's rows and their sums by columns; where ``keeping``, keep the plan."""
    o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, L))
    o_b = gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    GLOBAL: tl.constexpr = STORE == KEPT_PLAN
    columns, columns1, columns2 = columns_of(p_g, p_column_min, o_c, m, GLOBAL, PARTS, BC)
    # Sums of each thread's own rows; over threads once a sweep.
    b_sum = gl.full([BR, BC], 0.0, gl.float32, layout=L)
    b_sum1 = b_sum
    b_sum2 = b_sum
    for i in range(BLOCKS):
        o_r = first + i * BR + o_b
        b_log_a, b_rmin, b_shift = row_vectors(p_log_a, p_row_min, p_f, o_r, n)
        if GLOBAL:
            b_k, b_k1, b_k2 = read_costs(p_cost, stride, o_r, o_c, n, m, ALIGN, PARTS, BC)
        else:
            b_k = kept.index(i * PARTS).load(L)
            b_k1 = b_k
            b_k2 = b_k
            if PARTS == 3:
                b_k1 = kept.index(i * PARTS + 1).load(L)
                b_k2 = kept.index(i * PARTS + 2).load(L)
        b_z = _exponents(b_k, columns, b_rmin, per_reg, scale, STORE)
        b_z1 = b_z
        b_z2 = b_z
        if PARTS == 3:
            b_z1 = _exponents(b_k1, columns1, b_rmin, per_reg, scale, STORE)
            b_z2 = _exponents(b_k2, columns2, b_rmin, per_reg, scale, STORE)
        b_e, b_e1, b_e2, b_s = entries(b_z, b_z1, b_z2, b_shift, PARTS)
        b_log_s = tl.log2(b_s)
        b_far = is_far(b_log_a, b_log_s)
        if tl.max(b_far.to(tl.int32), 0) > 0:
            b_shift, b_e, b_e1, b_e2, b_log_s = entries_again(
                b_z, b_z1, b_z2, b_shift, b_far, PARTS
            )
        b_log_w = b_log_a - tl.where(b_log_a == -float("inf"), 0.0, b_log_s)
        tl.store(p_f + o_r, b_log_w + b_shift, mask=o_r < n)
        b_w = tl.exp2(b_log_w)[:, None]
        b_e *= b_w
        b_sum += b_e
        if PARTS == 3:
            b_e1 *= b_w
            b_e2 *= b_w
            b_sum1 += b_e1
            b_sum2 += b_e2
        if STORE == KEPT_PLAN:
            if keeping:
                b_one = kept_one(b_log_a)[:, None]
                kept.index(i * PARTS).store((b_e * b_one).to(tl.float16))
                if PARTS == 3:
                    kept.index(i * PARTS + 1).store((b_e1 * b_one).to(tl.float16))
                    kept.index(i * PARTS + 2).store((b_e2 * b_one).to(tl.float16))
    _store_sums(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS, BC)


@jit
def _store_sums(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS: tl.constexpr, BC: tl.constexpr):
    b_s = tl.sum(b_sum, 0)
    b_s1 = b_s
    b_s2 = b_s
    if PARTS == 3:
        b_s1 = tl.sum(b_sum1, 0)
        b_s2 = tl.sum(b_sum2, 0)
    store_columns(p_part, b_s, b_s1, b_s2, o_c, m, PARTS, BC)


@jit
def sweep_kept(
    kept,
    p_log_a,
    p_rho,
    p_v,
    p_part,
    p_rounded,
    first,
    n,
    m,
    FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    L: tl.constexpr,
):
    """Find sums by columns of E scaled to row sums a; gamma and v follow in the update.

    FIRST: of a plan that was just stored, at the reference itself, into p_rounded; and rho.
    """
    o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, L))
    o_b = gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    b_v = o_c.to(tl.float32)
    if not FIRST:
        b_v = tl.load(p_v + o_c, mask=o_c < m, other=0.0)
    b_v1 = b_v
    b_v2 = b_v
    if PARTS == 3 and not FIRST:
        b_v1 = tl.load(p_v + BC + o_c, mask=BC + o_c < m, other=0.0)
        b_v2 = tl.load(p_v + 2 * BC + o_c, mask=2 * BC + o_c < m, other=0.0)
    b_sum = gl.full([BR, BC], 0.0, gl.float32, layout=L)
    b_sum1 = b_sum
    b_sum2 = b_sum
    for i in range(BLOCKS):
        o_r = first + i * BR + o_b
        b_log_a = tl.load(p_log_a + o_r, mask=o_r < n, other=-float("inf"))
        b_e = kept.index(i * PARTS).load(L).to(tl.float32)
        b_e1 = b_e
        b_e2 = b_e
        if FIRST:
            b_t = b_e
        else:
            b_t = b_e * b_v[None, :]
        if PARTS == 3:
            b_e1 = kept.index(i * PARTS + 1).load(L).to(tl.float32)
            b_e2 = kept.index(i * PARTS + 2).load(L).to(tl.float32)
            if FIRST:
                b_t += b_e1 + b_e2
            else:
                b_t += b_e1 * b_v1[None, :]
                b_t += b_e2 * b_v2[None, :]
        b_s = tl.sum(b_t, 1)
        if FIRST:
            tl.store(p_rho + o_r, kept_correction(b_s), mask=o_r < n)
            # At the reference a row's weight is a_i over its corrected sum, KEPT_ONE.
            b_w = kept_weights(b_log_a, KEPT_ONE)[:, None]
        else:
            b_rho = tl.load(p_rho + o_r, mask=o_r < n, other=1.0)
            b_w = kept_weights(b_log_a, b_s * b_rho)[:, None]
        b_sum += b_e * b_w
        if PARTS == 3:
            b_sum1 += b_e1 * b_w
            b_sum2 += b_e2 * b_w
    if FIRST:
        _store_sums(p_rounded, b_sum, b_sum1, b_sum2, o_c, m, PARTS, BC)
    else:
        _store_sums(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS, BC)
