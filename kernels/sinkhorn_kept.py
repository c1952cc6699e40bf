"""A sweep over the kept plan: multiplications and additions only; see sinkhorn_rules.

Bound: one read of two bytes an entry, 77.6 us at 14336 x 11469 at 4.24 TB/s; the arithmetic, some
six instructions an entry, takes 30 us of that time on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_rows import kept_correction, kept_weights, store_columns
from dotresize.kernels.sinkhorn_rules import KEPT_ONE


@triton.jit
def _factors(p_v, o_c, m):
    return tl.load(p_v + o_c, mask=o_c < m, other=0.0)


@triton.jit
def _read(p_r, m_last, PARTS: tl.constexpr, BC: tl.constexpr):
    """Return rows of the kept plan in three parts, the first two full, or one part three times."""
    if PARTS == 3:
        b_k = tl.load(p_r)
        b_k1 = tl.load(p_r + BC)
    else:
        b_k = tl.load(p_r, mask=m_last, other=0.0)
        b_k1 = b_k
    b_k2 = b_k
    if PARTS == 3:
        b_k2 = tl.load(p_r + 2 * BC, mask=m_last, other=0.0)
    return b_k, b_k1, b_k2


@triton.jit
def sweep_kept(
    p_kept,
    stride,
    p_v,
    p_log_a,
    p_rho,
    p_part,
    p_rounded,
    first,
    last,
    m,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Store this program's column sums of E scaled to row sums a; gamma and v follow there.

    FIRST: after E was stored. Then rho is found, and column sums at the reference as well.
    """
    o_c = tl.arange(0, BC)
    o_b = tl.arange(0, BR)
    m_last = (((PARTS - 1) * BC + o_c) < stride)[None, :]
    b_v = _factors(p_v, o_c, m)
    b_v1 = b_v
    b_v2 = b_v
    b_sum = tl.zeros((BC,), dtype=tl.float32)
    b_sum1 = b_sum
    b_sum2 = b_sum
    b_rounded = b_sum
    b_rounded1 = b_sum
    b_rounded2 = b_sum
    if PARTS == 3:
        b_v1 = _factors(p_v, BC + o_c, m)
        b_v2 = _factors(p_v, 2 * BC + o_c, m)
    p_r = p_kept + tl.minimum(first + o_b, last - 1).to(tl.int64)[:, None] * stride
    b_k, b_k1, b_k2 = _read(p_r + o_c[None, :], m_last, PARTS, BC)
    for row in tl.range(first, last, BR, num_stages=1):
        o_r = row + o_b
        b_e = b_k.to(tl.float32)
        b_t = b_e * b_v[None, :]
        b_e1 = b_e
        b_e2 = b_e
        b_all = b_e
        if PARTS == 3:
            b_e1 = b_k1.to(tl.float32)
            b_e2 = b_k2.to(tl.float32)
            b_t += b_e1 * b_v1[None, :]
            b_t += b_e2 * b_v2[None, :]
            b_all = b_e + b_e1 + b_e2
        # The next rows are on their way while these are summed.
        p_r = p_kept + tl.minimum(o_r + BR, last - 1).to(tl.int64)[:, None] * stride
        b_k, b_k1, b_k2 = _read(p_r + o_c[None, :], m_last, PARTS, BC)
        b_log_a = tl.load(p_log_a + o_r, mask=o_r < last, other=-float("inf"))
        if FIRST:
            b_rho = kept_correction(tl.sum(b_all, 1))
            tl.store(p_rho + o_r, b_rho, mask=o_r < last)
            # At the reference a row's weight is a_i over its corrected sum, KEPT_ONE.
            b_w = kept_weights(b_log_a, KEPT_ONE)[:, None]
            b_rounded += tl.sum(b_e * b_w, 0)
            if PARTS == 3:
                b_rounded1 += tl.sum(b_e1 * b_w, 0)
                b_rounded2 += tl.sum(b_e2 * b_w, 0)
        else:
            b_rho = tl.load(p_rho + o_r, mask=o_r < last, other=1.0)
        b_w = kept_weights(b_log_a, tl.sum(b_t, 1) * b_rho)[:, None]
        b_sum += tl.sum(b_e * b_w, 0)
        if PARTS == 3:
            b_sum1 += tl.sum(b_e1 * b_w, 0)
            b_sum2 += tl.sum(b_e2 * b_w, 0)
    store_columns(p_part, b_sum, b_sum1, b_sum2, o_c, m, PARTS, BC)
    if FIRST:
        store_columns(p_rounded, b_rounded, b_rounded1, b_rounded2, o_c, m, PARTS, BC)
