"""Batched pairwise L1 cost on a GPU.

    C[b, i, j] = sum_t |x[b, t, i] - y[b, t, j]|

There is no matrix-multiply form, so this is a problem of the floating-point units: a subtraction
and an addition with the absolute-value modifier, two instructions per pair. Bound: lanes * clock
/ 2 pairs per second (H100: 14.8 T pairs/s at 1.755 GHz). Two float16 pairs share an instruction;
GROUP tokens are summed in float16, then scaled and added to float32: 1.13 instructions per pair at
least.

Activations are token-major, so for one token a thread loads 8 neurons of x and 8 of y, 16 bytes at
a time, and forms their 64 differences in registers: no transpose, no reduction across threads, no
shared memory. The layout is explicit (Gluon); left to itself Triton passes every token through
shared memory. As compiled (tests/test_kernels_compile.py): 2.25 instructions per pair, packed 1.25.

Sums have two levels, as in every backend: TOKEN_BLOCK tokens in registers, then the total in
``out`` itself, which stays in the cache; a second register per entry would halve the occupancy.

A tile that would pass the edge is moved back inside, so that no load needs a mask (a masked load
clears its registers first, 1/8 of the instructions); it writes only what is its own.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import triton.language as tl

from dotresize.kernels.layouts import gl, jit


@jit
def _load(p_values, m_values, MASKED: tl.constexpr):
    if MASKED:
        b_values = gl.load(p_values, mask=m_values, other=0.0)
    else:
        b_values = gl.load(p_values)
    return b_values


@jit
def _distances(b_x, b_y):
    return gl.abs(gl.expand_dims(b_x, 1) - gl.expand_dims(b_y, 0))


@jit
def _store_statistics(p_statistics, low, high, mean):
    p_tile = p_statistics + 3 * gl.program_id(0).to(gl.int64)
    gl.store(p_tile, low)
    gl.store(p_tile + 1, high)
    gl.store(p_tile + 2, mean)


@jit
def l1_cost_kernel(
    p_x,
    p_y,
    p_index,
    p_scale,
    p_out,
    p_statistics,
    tokens,
    n,
    m,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    groups,
    divisor,
    HAS_INDEX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    FINISH: tl.constexpr,
    MASKED: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES_M: tl.constexpr,
    WARPS_M: tl.constexpr,
    WARPS_N: tl.constexpr,
):
    """One tile of BM x BN pairs, T x T and repetitions of it in a thread.

    p_scale, with PACKED: (batch, groups) factors of the sums of GROUP tokens. FINISH divides by
    ``divisor`` and writes the tile's minimum, maximum and mean (times its share of BM x BN).
    """
    BOTH: tl.constexpr = gl.BlockedLayout([T, T], [LANES_M, 8], [WARPS_M, WARPS_N], [1, 0])
    ROWS: tl.constexpr = gl.SliceLayout(1, BOTH)
    COLUMNS: tl.constexpr = gl.SliceLayout(0, BOTH)
    # One grid axis: the others end at 65535, and there may be more problems.
    tiles_n = gl.cdiv(m, BN)
    tiles = gl.cdiv(n, BM) * tiles_n
    i_b = (gl.program_id(0) // tiles).to(gl.int64)
    i_tile = gl.program_id(0) % tiles
    i_m = i_tile // tiles_n * BM
    i_n = i_tile % tiles_n * BN
    first_m = i_m
    first_n = i_n
    if not MASKED:
        first_m = gl.minimum(i_m, n - BM)
        first_n = gl.minimum(i_n, m - BN)
    o_m = first_m + gl.arange(0, BM, layout=ROWS)
    o_n = first_n + gl.arange(0, BN, layout=COLUMNS)
    o_rows = gl.expand_dims(o_m, 1)
    o_columns = gl.expand_dims(o_n, 0)
    if MASKED:
        m_tile = (o_rows < n) & (o_columns < m)
    else:
        m_tile = (o_rows >= i_m) & (o_columns >= i_n)
    # BM divides BN: a tile wholly below the diagonal is the mirror of one wholly above it, and
    # those that cross the diagonal hold the rest.
    skip = SYMMETRIC and (i_n + BN <= i_m)
    if not skip:
        m_m = o_m < n
        m_n = o_n < m
        o_y = o_n
        if HAS_INDEX:
            o_y = _load(p_index + i_b * m + o_n, m_n, MASKED).to(gl.int32)
        p_xt = p_x + i_b * stride_xb
        p_yt = p_y + i_b * stride_yb
        # 64-bit up to the tile's corner, 32-bit inside: half the address registers.
        p_corner = p_out + (i_b * n + first_m) * m + first_n
        p_tile = p_corner + ((o_rows - first_m) * m + (o_columns - first_n))
        for start in range(0, tokens, TOKEN_BLOCK):
            b_sum = gl.zeros([BM, BN], gl.float32, layout=BOTH)
            count = gl.minimum(TOKEN_BLOCK, tokens - start)
            if PACKED:
                for i in range(0, count // GROUP):
                    b_half = gl.zeros([BM, BN], gl.float16, layout=BOTH)
                    for _ in range(0, GROUP // UNROLL):
                        for _ in gl.static_range(UNROLL):
                            b_x = _load(p_xt + o_m, m_m, MASKED)
                            b_y = _load(p_yt + o_y, m_n, MASKED)
                            b_half += _distances(b_x, b_y)
                            p_xt += stride_xt
                            p_yt += stride_yt
                    scale = gl.load(p_scale + i_b * groups + start // GROUP + i)
                    b_sum += b_half.to(gl.float32) * scale
            else:
                for _ in range(0, count // UNROLL):
                    for _ in gl.static_range(UNROLL):
                        b_x = _load(p_xt + o_m, m_m, MASKED).to(gl.float32)
                        b_y = _load(p_yt + o_y, m_n, MASKED).to(gl.float32)
                        b_sum += _distances(b_x, b_y)
                        p_xt += stride_xt
                        p_yt += stride_yt
                for _ in range(0, count % UNROLL):
                    b_x = _load(p_xt + o_m, m_m, MASKED).to(gl.float32)
                    b_y = _load(p_yt + o_y, m_n, MASKED).to(gl.float32)
                    b_sum += _distances(b_x, b_y)
                    p_xt += stride_xt
                    p_yt += stride_yt
            m_old = m_tile & (start + ACCUMULATE > 0)
            b_sum += gl.load(p_tile, mask=m_old, other=0.0)
            gl.store(p_tile, b_sum, mask=m_tile)
        if SYMMETRIC or FINISH:
            b_total = gl.load(p_tile, mask=m_tile, other=0.0)
            if FINISH:
                b_total = gl.div_rn(b_total, divisor)
                gl.store(p_tile, b_total, mask=m_tile)
            if SYMMETRIC:
                if i_n >= i_m + BM:
                    p_other = p_out + (i_b * n + first_n) * m + first_m
                    p_mirror = p_other + ((o_columns - first_n) * m + (o_rows - first_m))
                    gl.store(p_mirror, b_total, mask=m_tile)
            if FINISH:
                b_low = gl.where(m_tile, b_total, float("inf"))
                low = gl.min(gl.min(b_low, 1), 0)
                high = gl.max(gl.max(b_total, 1), 0)  # 0 where masked, as no cost is below that
                mean = gl.sum(gl.sum(b_total, 1), 0) / (BM * BN)
                if SYMMETRIC:
                    mean = gl.where(i_n >= i_m + BM, 2 * mean, mean)
                _store_statistics(p_statistics, low, high, mean)
    elif FINISH:
        _store_statistics(p_statistics, float("inf"), 0.0, 0.0)
