"""Batched pairwise L1 cost on a GPU.

    C[b, i, j] = sum_t |x[b, t, i] - y[b, t, j]|

There is no matrix-multiply form, so this is a problem of the floating-point units: a subtraction
and an addition with the absolute-value modifier, two instructions per pair. Bound: lanes * clock
/ 2 pairs per second (H100: 14.8 T pairs/s at 1.755 GHz).

Activations are token-major, so for one token a program loads BM contiguous neurons of x and BN of
y and forms their outer difference in registers: no transpose and no reduction across threads.
Sums have two levels, TOKEN_BLOCK tokens and then the total, as in every backend.

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dotresize.reference import TOKEN_BLOCK


@dataclass(frozen=True)
class L1Config:
    block_m: int
    block_n: int
    num_warps: int


# Both tiles keep a block sum and a total in registers: 2 * 32 float32 a thread. 64 x 128 with 4
# warps spilled in the ahead-of-time builds (tests/test_kernels_compile.py); these do not. The
# narrow one is for problems too small to fill the device. Neither has been timed on a device yet.
CONFIGS = {"wide": L1Config(64, 64, 4), "narrow": L1Config(32, 32, 1)}
_FEW_TILES = 512


@triton.jit
def l1_cost_kernel(
    p_x,
    p_y,
    p_index,
    p_out,
    tokens,
    n,
    m,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    HAS_INDEX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # One grid axis: the others end at 65535, and there may be more problems.
    tiles_n = tl.cdiv(m, BN)
    tiles = tl.cdiv(n, BM) * tiles_n
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_m = i_tile // tiles_n
    i_n = i_tile % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    m_m = o_m < n
    m_n = o_n < m
    # Wholly below the diagonal: the mirror of another tile.
    skip = SYMMETRIC and (i_n * BN + BN <= i_m * BM)
    if not skip:
        o_y = o_n.to(tl.int64)
        if HAS_INDEX:
            o_y = tl.load(p_index + i_b * m + o_n, mask=m_n, other=0)
        p_xt = p_x + i_b * stride_xb + o_m
        p_yt = p_y + i_b * stride_yb + o_y
        # 64-bit up to the tile's corner, 32-bit inside: half the address registers.
        o_rows = tl.arange(0, BM)[:, None]
        o_columns = tl.arange(0, BN)[None, :]
        p_tile = p_out + (i_b * n + i_m * BM) * m + i_n * BN + (o_rows * m + o_columns)
        m_tile = m_m[:, None] & m_n[None, :]
        if SYMMETRIC:
            m_tile = m_tile & (o_n[None, :] >= o_m[:, None])
        b_total = tl.zeros((BM, BN), dtype=tl.float32)
        if ACCUMULATE:
            b_total = tl.load(p_tile, mask=m_tile, other=0.0)
        for start in range(0, tokens, TOKEN_BLOCK):
            b_sum = tl.zeros((BM, BN), dtype=tl.float32)
            for _ in range(start, tl.minimum(start + TOKEN_BLOCK, tokens)):
                b_x = tl.load(p_xt, mask=m_m, other=0.0).to(tl.float32)  # [BM]
                b_y = tl.load(p_yt, mask=m_n, other=0.0).to(tl.float32)  # [BN]
                b_sum += tl.abs(b_x[:, None] - b_y[None, :])
                p_xt += stride_xt
                p_yt += stride_yt
            b_total += b_sum
        tl.store(p_tile, b_total, mask=m_tile)
        if SYMMETRIC:
            p_mirror = p_out + (i_b * n + i_n * BN) * m + i_m * BM + (o_columns * m + o_rows)
            tl.store(p_mirror, b_total, mask=m_tile & (o_n[None, :] > o_m[:, None]))


def choose_config(batch: int, n: int, m: int) -> L1Config:
    wide = CONFIGS["wide"]
    tiles = batch * triton.cdiv(n, wide.block_m) * triton.cdiv(m, wide.block_n)
    return wide if tiles >= _FEW_TILES else CONFIGS["narrow"]


def l1_cost(
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    *,
    accumulate: bool,
    scale: float,
) -> None:
    """out (+)= sum over tokens / scale.

    x (B, T, n); y (B, T, m), or index (B, m), or neither: y = x. Shapes are the caller's
    responsibility (dotresize.ops.l1_cost).
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    if y is not None:
        y = y if y.stride(2) == 1 else y.contiguous()
    columns = x if y is None else y
    batch, tokens, n = x.shape
    m = out.shape[2]
    config = choose_config(batch, n, m)
    grid = (batch * triton.cdiv(n, config.block_m) * triton.cdiv(m, config.block_n),)
    with torch.cuda.device_of(x):
        l1_cost_kernel[grid](
            x,
            columns,
            out if index is None else index,
            out,
            tokens,
            n,
            m,
            x.stride(0),
            x.stride(1),
            columns.stride(0),
            columns.stride(1),
            HAS_INDEX=index is not None,
            SYMMETRIC=y is None and index is None,
            ACCUMULATE=accumulate,
            TOKEN_BLOCK=TOKEN_BLOCK,
            BM=config.block_m,
            BN=config.block_n,
            num_warps=config.num_warps,
        )
    if scale != 1.0:
        out /= scale
