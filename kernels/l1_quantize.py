"""These kernels make bytes of activations, four tokens of a neuron in a word (ops/l1_u8.py).

    byte = floor((x - low) / step + dither)

Bound: memory. Activations are read once for the ranges of tokens, and once more for the bytes, a
quarter of float32's, that are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dotresize.kernels.l1_cost import ALIGNED
from dotresize.ops.constants import TOKEN_BLOCK, Quantisation

# Neurons of a program, at a time.
_NEURONS = 1024
_NEURONS_OF_A_RANGE = 4096


@triton.jit
def ranges_kernel(
    p_x,
    p_low,
    p_high,
    tokens,
    n,
    stride_b,
    stride_t,
    BN: tl.constexpr,
):
    """Compute the smallest and largest activation of one token; NaN if one is not finite."""
    i_token = tl.program_id(0)
    i_b = (i_token // tokens).to(tl.int64)
    p_token = p_x + i_b * stride_b + (i_token % tokens).to(tl.int64) * stride_t
    b_low = tl.full((BN,), float("inf"), tl.float32)
    b_high = tl.full((BN,), float("-inf"), tl.float32)
    b_bad = tl.zeros((BN,), tl.float32)
    for start in range(0, n, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < n
        b_x = tl.load(p_token + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_low = tl.minimum(b_low, tl.where(m_n, b_x, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_n, b_x, float("-inf")))
        b_bad += b_x * 0.0  # minima and maxima skip NaN
    bad = tl.sum(b_bad, 0)
    tl.store(p_low + i_token, tl.min(b_low, 0) + bad)
    tl.store(p_high + i_token, tl.max(b_high, 0) + bad)


@triton.jit
def quantize_kernel(
    p_x,
    p_token,
    p_low,
    p_dither,
    p_steps,
    p_out,
    tokens,
    words,
    blocks,
    n,
    width,
    stride_b,
    stride_t,
    TOKEN_BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute BN words of four tokens; zeros past the last token, anything past the last neuron."""
    parts = tl.cdiv(width, BN)
    i_word = tl.program_id(0) // parts
    i_b = (i_word // words).to(tl.int64)
    i_w = i_word % words
    o_n = tl.program_id(0) % parts * BN + tl.arange(0, BN)
    m_n = o_n < n
    step = tl.load(p_steps + i_b * blocks + 4 * i_w // TOKEN_BLOCK)
    b_word = tl.zeros((BN,), tl.int32)
    p_neurons = p_x + i_b * stride_b + o_n
    for i in tl.static_range(4):
        place = 4 * i_w + i
        if place < tokens:
            o_t = i_b * tokens + place
            token = tl.load(p_token + o_t)
            b_x = tl.load(p_neurons + token * stride_t, mask=m_n, other=0.0).to(tl.float32)
            b_level = tl.div_rn(b_x - tl.load(p_low + o_t), step) + tl.load(p_dither + o_t)
            b_level = tl.minimum(tl.maximum(tl.floor(b_level), 0.0), 255.0)
            b_word |= b_level.to(tl.int32) << 8 * i
    tl.store(p_out + (i_b * words + i_w) * width + o_n, b_word, mask=o_n < width)


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest activation of each token: float32 (B, T).

    Both are NaN where one is not finite. x: (B, T, n), its neurons side by side.
    """
    batch, tokens, n = x.shape
    low, high = torch.empty(2, batch, tokens, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        ranges_kernel[(batch * tokens,)](
            p_x=x,
            p_low=low,
            p_high=high,
            tokens=tokens,
            n=n,
            stride_b=x.stride(0),
            stride_t=x.stride(1),
            BN=min(_NEURONS_OF_A_RANGE, triton.next_power_of_2(n)),
        )
    return low, high


def quantize(x: Tensor, plan: Quantisation) -> Tensor:
    """Return words: int32 (B, ceil(quantised / 4), n), the neurons padded for l1_cost to read.

    x: (B, T, n), its neurons side by side.
    """
    batch, _, n = x.shape
    tokens = plan.token.shape[1]
    words, width = -(-tokens // 4), -(-n // ALIGNED) * ALIGNED
    out = torch.empty(batch, words, width, dtype=torch.int32, device=x.device)
    block = min(_NEURONS, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        quantize_kernel[(batch * words * triton.cdiv(width, block),)](
            p_x=x,
            p_token=plan.token,
            p_low=plan.low,
            p_dither=plan.dither,
            p_steps=plan.steps,
            p_out=out,
            tokens=tokens,
            words=words,
            blocks=plan.steps.shape[1],
            n=n,
            width=width,
            stride_b=x.stride(0),
            stride_t=x.stride(1),
            TOKEN_BLOCK=TOKEN_BLOCK,
            BN=block,
        )
    return out
