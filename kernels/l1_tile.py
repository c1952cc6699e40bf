"""Batched pairwise L1 cost on a GPU.

    C[b, i, j] = sum_t |x[b, t, i] - y[b, t, j]|

There is no matrix-multiply form, so this is a problem of the arithmetic units, in one of three
kinds of numbers:

* float32: a subtraction and an addition with the absolute-value modifier, two instructions per
  pair. Bound: lanes * clock / 2 pairs per second (H100: 14.8 T pairs/s at 1.755 GHz).
* float16 (``dotresize/ops/l1_fp16.py``): two pairs share an instruction; GROUP tokens are summed in
  float16, then scaled and added to float32: 1.13 instructions per pair at least.
* bytes (``dotresize/ops/l1_u8.py``): one instruction adds the distances of four tokens, which are
  the bytes of a word, at half the rate of others: half an instruction's time per pair, in which
  another half can go out. Sums of TOKEN_BLOCK tokens are integers below 2^16, and exact.

Activations are token-major, so for one token a thread takes 8 neurons of x and 8 of y, 16 bytes at
a time, and forms their 64 differences in registers: no transpose, no reduction across threads. The
layout is explicit (Gluon). Chunks of tokens come through shared memory, the next ones on their way
while one is added: loads into registers are put off by the compiler until they are needed, and 64
sums leave registers for too few warps to hide that a cache answers late (5 to 7 T pairs/s on an
H200, of 16).

Sums have two levels, as in every backend: TOKEN_BLOCK tokens in registers, then the total. It lies
in shared memory, as a second register per entry would halve the occupancy; in ``out`` itself the
columns of an odd width are read and written 4 bytes at a time, each with an address of its own. On
AMD's GPUs, which have less shared memory and more registers, it is in registers.

A tile that would pass the edge is moved back inside, so that no load needs a mask (a masked load
clears its registers first, 1/8 of the instructions); it writes only what is its own. The launcher
pads what is smaller than a tile or not aligned.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import triton.language as tl

from dotresize.kernels.gluon_compat import async_copy, async_load, gl, jit
from dotresize.kernels.instructions import add_distances_of_bytes

# What activations are.
FLOATS, HALVES, BYTES = (tl.constexpr(kind) for kind in range(3))


@jit
def _distances(b_x, b_y):
    return gl.abs(b_x - b_y)


@jit
def _store_statistics(p_statistics, low, high, mean):
    p_tile = p_statistics + 3 * gl.program_id(0).to(gl.int64)
    gl.store(p_tile, low)
    gl.store(p_tile + 1, high)
    gl.store(p_tile + 2, mean)


@jit
def fetch(buffer, p_values, m_values, NVIDIA: tl.constexpr):
    """Send a chunk of tokens into shared memory; zeros past the last token."""
    if NVIDIA:
        async_load(buffer, p_values, mask=m_values)
    else:
        buffer.store(gl.load(p_values, mask=m_values, other=0))


@jit
def next_chunk(NVIDIA: tl.constexpr, STAGES: tl.constexpr):
    """Wait for the oldest chunk on its way."""
    if NVIDIA:
        async_copy.wait_group(STAGES - 2)


@jit
def sent(NVIDIA: tl.constexpr):
    if NVIDIA:
        async_copy.commit_group()


@jit
def l1_cost_kernel(
    p_x,
    p_y,
    p_scale,
    p_out,
    p_statistics,
    tokens,
    n,
    m,
    read_n,
    read_m,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    groups,
    divisor,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FINISH: tl.constexpr,
    NVIDIA: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
    LANES_M: tl.constexpr,
    WARPS_M: tl.constexpr,
    WARPS_N: tl.constexpr,
):
    """Compute one tile of BM x BN pairs, T x T and repetitions of it in a thread.

    tokens: of x and y as they are read, which are words of four tokens for BYTES; BLOCK of them are
    summed before the total is touched. read_n, read_m: neurons of a token that may be read, at
    least a tile, multiples of 16 and, up to padding, n and m. p_scale: (batch, groups) factors of
    the sums of CHUNK tokens for HALVES, of BLOCK words for BYTES. SHARED keeps totals in shared
    memory, not in registers. FINISH divides by ``divisor`` and writes the tile's minimum, maximum
    and mean (times its share of BM x BN).
    """
    BOTH: tl.constexpr = gl.BlockedLayout([T, T], [LANES_M, 8], [WARPS_M, WARPS_N], [1, 0])
    ROWS: tl.constexpr = gl.SliceLayout(1, BOTH)
    COLUMNS: tl.constexpr = gl.SliceLayout(0, BOTH)
    VECTOR: tl.constexpr = 8 if KIND == HALVES else 4
    COPY: tl.constexpr = gl.BlockedLayout([VECTOR], [8 * LANES_M], [WARPS_M * WARPS_N], [0])
    PLAIN: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Swizzled: threads that read at the same time meet different banks.
    SPREAD: tl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # One grid axis: the others end at 65535, and there may be more problems.
    tiles_n = gl.cdiv(m, BN)
    tiles = gl.cdiv(n, BM) * tiles_n
    i_b = (gl.program_id(0) // tiles).to(gl.int64)
    i_tile = gl.program_id(0) % tiles
    i_m = i_tile // tiles_n * BM
    i_n = i_tile % tiles_n * BN
    first_m = gl.minimum(i_m, read_n - BM)
    first_n = gl.minimum(i_n, read_m - BN)
    o_rows = gl.expand_dims(first_m + gl.arange(0, BM, layout=ROWS), 1)
    o_columns = gl.expand_dims(first_n + gl.arange(0, BN, layout=COLUMNS), 0)
    m_tile = (o_rows >= i_m) & (o_columns >= i_n) & (o_rows < n) & (o_columns < m)
    # BM divides BN: a tile wholly below the diagonal is the mirror of one wholly above it, and
    # those that cross the diagonal hold the rest.
    skip = SYMMETRIC and (i_n + BN <= i_m)
    step_x = stride_xt.to(gl.int64)  # the launcher passes what fits 32 bits as 32 bits
    step_y = stride_yt.to(gl.int64)
    if not skip:
        x_chunks = gl.allocate_shared_memory(p_x.dtype.element_ty, [STAGES, CHUNK * BM], PLAIN)
        y_chunks = gl.allocate_shared_memory(p_x.dtype.element_ty, [STAGES, CHUNK * BN], PLAIN)
        o_x = gl.arange(0, CHUNK * BM, layout=COPY)
        o_y = gl.arange(0, CHUNK * BN, layout=COPY)
        p_xc = p_x + i_b * stride_xb + first_m + (o_x // BM * step_x + o_x % BM)
        p_yc = p_y + i_b * stride_yb + first_n + (o_y // BN * step_y + o_y % BN)
        for i in gl.static_range(STAGES - 1):
            fetch(x_chunks.index(i), p_xc, i * CHUNK + o_x // BM < tokens, NVIDIA)
            fetch(y_chunks.index(i), p_yc, i * CHUNK + o_y // BN < tokens, NVIDIA)
            sent(NVIDIA)
            p_xc += CHUNK * step_x
            p_yc += CHUNK * step_y
        # 64-bit up to the tile's corner, 32-bit inside: half the address registers.
        p_corner = p_out + (i_b * n + first_m) * m + first_n
        p_tile = p_corner + ((o_rows - first_m) * m + (o_columns - first_n))
        b_total = gl.zeros([BM, BN], gl.float32, layout=BOTH)
        if ACCUMULATE:
            b_total = gl.load(p_tile, mask=m_tile, other=0.0)
        if SHARED:  # the first axis is for the interpreter, whose rows it counts
            total = gl.allocate_shared_memory(gl.float32, [1, BM, BN], SPREAD).index(0)
            total.store(b_total)
        for start in range(0, tokens, BLOCK):
            if KIND == BYTES:
                b_sum = gl.zeros([BM, BN], gl.int32, layout=BOTH)
            else:
                b_sum = gl.zeros([BM, BN], gl.float32, layout=BOTH)
            last = gl.minimum(start + BLOCK, tokens)
            for token in range(start, last, CHUNK):
                next_chunk(NVIDIA, STAGES)
                ahead = token + (STAGES - 1) * CHUNK
                free = ahead // CHUNK % STAGES
                fetch(x_chunks.index(free), p_xc, ahead + o_x // BM < tokens, NVIDIA)
                fetch(y_chunks.index(free), p_yc, ahead + o_y // BN < tokens, NVIDIA)
                sent(NVIDIA)
                p_xc += CHUNK * step_x
                p_yc += CHUNK * step_y
                x_chunk = x_chunks.index(token // CHUNK % STAGES)
                y_chunk = y_chunks.index(token // CHUNK % STAGES)
                if KIND == HALVES:
                    scale = gl.load(p_scale + i_b * groups + token // CHUNK)
                    b_half = gl.zeros([BM, BN], gl.float16, layout=BOTH)
                for i in gl.static_range(CHUNK):
                    b_x = gl.expand_dims(x_chunk.slice(i * BM, BM).load(ROWS), 1)
                    b_y = gl.expand_dims(y_chunk.slice(i * BN, BN).load(COLUMNS), 0)
                    if KIND == BYTES:
                        b_sum = add_distances_of_bytes(b_x, b_y, b_sum, NVIDIA)
                    elif KIND == HALVES:
                        b_half += _distances(b_x, b_y)
                    else:
                        b_sum += _distances(b_x, b_y)
                if KIND == HALVES:
                    b_sum += b_half.to(gl.float32) * scale
            b_part = b_sum.to(gl.float32)
            if KIND == BYTES:
                b_part *= gl.load(p_scale + i_b * groups + start // BLOCK)
            if SHARED:
                total.store(total.load(BOTH) + b_part)
            else:
                b_total += b_part
        if NVIDIA:
            async_copy.wait_group(0)  # what follows may reuse the chunks' memory
        if SHARED:
            b_total = total.load(BOTH)
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
            b_high = gl.where(m_tile, b_total, 0.0)  # no cost is below that
            low = gl.min(gl.min(b_low, 1), 0)
            high = gl.max(gl.max(b_high, 1), 0)
            mean = gl.sum(gl.sum(b_high, 1), 0) / (BM * BN)
            if SYMMETRIC:
                mean = gl.where(i_n >= i_m + BM, 2 * mean, mean)
            _store_statistics(p_statistics, low, high, mean)
    elif FINISH:
        _store_statistics(p_statistics, float("inf"), 0.0, 0.0)
