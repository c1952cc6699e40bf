"""The gradient of the L1 cost on a GPU.

    out[b, t, i] = sum_j G[b, i, j] sign(x[b, t, i] - y[b, t, j]),   sign(0) = 0

Bound: three instructions for a pair of activations; the cost itself takes two. A subtraction, a
multiply-add whose result is cut off at 0 and 1, so that it is a step function of the difference
with 1/2 at 0, and a multiply-add of that with G. Twice the sum less the sum of G is the gradient:
a step of 1 counts G, one of 1/2 nothing, one of 0 takes it off. Comparisons would take four, two
of them at half rate. The gradient by y is the same sum with the roles of x and y exchanged, in a
launch of its own.

A tile is tokens x neurons of x, whose activations and sums stay in registers while the neurons of
y pass: for each of them a thread takes 8 tokens' activations and 4 entries of G from shared memory,
where they come in chunks, the next ones on their way, as in the forward kernel (l1_tile.py). Sums
have two levels, as there: TOKEN_BLOCK terms in registers, then the total in ``out``. The sum of G
is taken in the same order, so that nothing is left where all activations are equal; where some are,
their G is still in the rounding, 1e-7 of the sum of |G| in a block.

The launcher makes y and G neuron by neuron, so that what a thread reads lies side by side, and pads
their ends to whole tiles; zeros of G past the last neuron add nothing.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dotresize.kernels.gluon_compat import async_copy, gl, jit
from dotresize.kernels.instructions import step_up
from dotresize.kernels.l1_cost import NVIDIA, L1Config, lanes_of
from dotresize.kernels.l1_tile import fetch, next_chunk, sent
from dotresize.ops.constants import TOKEN_BLOCK, L1Gradients, chunk_tokens

# 32 activations and 32 sums of a thread. Not yet timed.
CONFIG = L1Config(64, 64, 4, (2, 2), 8, 3, 255)


@jit
def l1_backward_kernel(
    p_x,
    p_y,
    p_gradient,
    p_out,
    tokens,
    n,
    m,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_yb,
    stride_ym,
    stride_gb,
    stride_gm,
    divisor,
    NVIDIA: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
    LANES_M: tl.constexpr,
    WARPS_M: tl.constexpr,
    WARPS_N: tl.constexpr,
):
    """Compute the gradients of BM tokens by BN neurons.

    p_y: (batch, m, tokens) and p_gradient: (batch, m, n), float32, both padded to whole tiles.
    p_x: any strides; p_out: float32, contiguous (batch, tokens, n).
    """
    BOTH: tl.constexpr = gl.BlockedLayout([T, T], [LANES_M, 8], [WARPS_M, WARPS_N], [1, 0])
    ROWS: tl.constexpr = gl.SliceLayout(1, BOTH)
    COLUMNS: tl.constexpr = gl.SliceLayout(0, BOTH)
    COPY: tl.constexpr = gl.BlockedLayout([4], [8 * LANES_M], [WARPS_M * WARPS_N], [0])
    PLAIN: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles_n = gl.cdiv(n, BN)
    tiles = gl.cdiv(tokens, BM) * tiles_n
    i_b = (gl.program_id(0) // tiles).to(gl.int64)
    i_tile = gl.program_id(0) % tiles
    i_t = i_tile // tiles_n * BM
    i_n = i_tile % tiles_n * BN
    o_tokens = gl.expand_dims(i_t + gl.arange(0, BM, layout=ROWS), 1)
    o_neurons = gl.expand_dims(i_n + gl.arange(0, BN, layout=COLUMNS), 0)
    m_tile = (o_tokens < tokens) & (o_neurons < n)
    p_own = p_x + i_b * stride_xb + o_tokens.to(gl.int64) * stride_xt
    b_x = gl.load(p_own + o_neurons.to(gl.int64) * stride_xn, mask=m_tile, other=0.0)
    b_x = b_x.to(gl.float32)
    y_chunks = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK * BM], PLAIN)
    g_chunks = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK * BN], PLAIN)
    o_y = gl.arange(0, CHUNK * BM, layout=COPY)
    o_g = gl.arange(0, CHUNK * BN, layout=COPY)
    step_y = stride_ym.to(gl.int64)  # the launcher passes what fits 32 bits as 32 bits
    step_g = stride_gm.to(gl.int64)
    p_yc = p_y + i_b * stride_yb + i_t + (o_y // BM * step_y + o_y % BM)
    p_gc = p_gradient + i_b * stride_gb + i_n + (o_g // BN * step_g + o_g % BN)
    for i in gl.static_range(STAGES - 1):
        fetch(y_chunks.index(i), p_yc, i * CHUNK + o_y // BM < m, NVIDIA)
        fetch(g_chunks.index(i), p_gc, i * CHUNK + o_g // BN < m, NVIDIA)
        sent(NVIDIA)
        p_yc += CHUNK * step_y
        p_gc += CHUNK * step_g
    p_corner = p_out + (i_b * tokens + i_t) * n + i_n
    p_tile = p_corner + ((o_tokens - i_t) * n + (o_neurons - i_n))
    for start in range(0, m, TOKEN_BLOCK):
        b_sum = gl.zeros([BM, BN], gl.float32, layout=BOTH)
        b_all = gl.zeros([BN], gl.float32, layout=COLUMNS)
        last = gl.minimum(start + TOKEN_BLOCK, m)
        for neuron in range(start, last, CHUNK):
            next_chunk(NVIDIA, STAGES)
            ahead = neuron + (STAGES - 1) * CHUNK
            free = ahead // CHUNK % STAGES
            fetch(y_chunks.index(free), p_yc, ahead + o_y // BM < m, NVIDIA)
            fetch(g_chunks.index(free), p_gc, ahead + o_g // BN < m, NVIDIA)
            sent(NVIDIA)
            p_yc += CHUNK * step_y
            p_gc += CHUNK * step_g
            y_chunk = y_chunks.index(neuron // CHUNK % STAGES)
            g_chunk = g_chunks.index(neuron // CHUNK % STAGES)
            for i in gl.static_range(CHUNK):
                b_y = gl.expand_dims(y_chunk.slice(i * BM, BM).load(ROWS), 1)
                b_g = g_chunk.slice(i * BN, BN).load(COLUMNS)
                b_all += b_g
                b_sum += step_up(b_x - b_y, NVIDIA) * gl.expand_dims(b_g, 0)
        b_sum += b_sum - gl.expand_dims(b_all, 0)  # twice the sum could overflow
        b_sum += gl.load(p_tile, mask=m_tile & (start > 0), other=0.0)
        if start + TOKEN_BLOCK >= m:
            b_sum = gl.div_rn(b_sum, divisor)
        gl.store(p_tile, b_sum, mask=m_tile)
    if NVIDIA:
        async_copy.wait_group(0)  # no copy outlives its program


def l1_backward(work: L1Gradients, by_y: bool) -> tuple[Tensor, Tensor | None]:
    """Return the gradients by x, and by y if that is wanted, in float32.

    Without y that by x holds both its roles. Shapes are the caller's responsibility
    (dotresize.ops.l1_gradient).
    """
    x, y, gradient = work.x, work.y, work.gradient
    if y is not None:
        by_x = _launch(x, y, gradient, work.divisor)
        return by_x, _launch(y, x, gradient.mT, work.divisor) if by_y else None
    # Both roles of a neuron in one sum, over all of x.
    if work.targets is not None:
        batch, n, _ = gradient.shape
        index = work.targets[:, None, :].expand(-1, n, -1)
        whole = gradient.new_zeros(batch, n, n)
        gradient = whole.scatter_add_(2, index, gradient)
    gradient = gradient + gradient.mT
    # A neuron has the sign 0 beside itself. Its G, which may be large, is left out beforehand; only
    # taken off at the end, with the sum of G, it would round what the others add.
    gradient.diagonal(dim1=1, dim2=2).zero_()
    return _launch(x, x, gradient, work.divisor), None


def _launch(x: Tensor, y: Tensor, gradient: Tensor, divisor: float) -> Tensor:
    """Return the gradient by x; the copies of y and the gradient are made of some tokens a time."""
    batch, tokens, n = x.shape
    m = y.shape[2]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    columns = _padded(gradient.mT, CONFIG.block_n)
    lanes = lanes_of(x)
    step = chunk_tokens(batch, m, 4)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        own, rows = x[:, part], _padded(y[:, part].mT, CONFIG.block_m)
        found = out if own.shape[1] == tokens else out.new_empty(own.shape)
        grid = (batch * triton.cdiv(own.shape[1], CONFIG.block_m) * triton.cdiv(n, CONFIG.block_n),)
        with torch.cuda.device_of(x):
            l1_backward_kernel[grid](
                p_x=own,
                p_y=rows,
                p_gradient=columns,
                p_out=found,
                tokens=own.shape[1],
                n=n,
                m=m,
                stride_xb=own.stride(0),
                stride_xt=own.stride(1),
                stride_xn=own.stride(2),
                stride_yb=rows.stride(0),
                stride_ym=rows.stride(1),
                stride_gb=columns.stride(0),
                stride_gm=columns.stride(1),
                divisor=divisor,
                NVIDIA=NVIDIA,
                TOKEN_BLOCK=TOKEN_BLOCK,
                **CONFIG.options(lanes),
                **CONFIG.constants(lanes),
            )
        if found is not out:
            out[:, part] = found
    return out


def _padded(value: Tensor, block: int) -> Tensor:
    """Return a float32 copy (B, m, count) with zeros at its end, up to a multiple of a block."""
    count = value.shape[2]
    wide = torch.zeros(
        (*value.shape[:2], -(-count // block) * block), dtype=torch.float32, device=value.device
    )
    wide[:, :, :count] = value
    return wide
