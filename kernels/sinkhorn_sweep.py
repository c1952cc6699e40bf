"""The row sweep of ``dotresize.kernels.sinkhorn``: row potentials, and partial column sums.

Each program owns whole rows. Rows of up to MAX_RESIDENT columns are kept in registers: one read
and one exponential per entry. Longer ones are walked twice, the second time out of the cache, with
a second exponential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Stands for "not stopped yet" in the status vector; the other codes are reference.py's.
RUNNING = -1
MAX_RESIDENT = 4096
# Entries a sweep program holds at once: 32 float32 a thread with 4 warps, 16 float64 with 8; no
# spills in the ahead-of-time builds (tests/test_kernels_compile.py).
TILE = 4096
STREAMED_COLUMNS = 1024
WARPS = {torch.float32: 4, torch.float64: 8}


def sweep_tile(m: int) -> tuple[int, int]:
    """Rows and columns that a sweep program holds at once for problems of m columns."""
    block_c = triton.next_power_of_2(m) if m <= MAX_RESIDENT else STREAMED_COLUMNS
    return max(1, TILE // block_c), block_c


@triton.jit
def _exponents(p_row, p_g, p_column_min, b_rmin, m_r, o_c, m, inv_reg):
    """z of a tile of streamed rows, -inf past the last column. -> [BR, BC]"""
    m_c = o_c < m
    b_g = tl.load(p_g + o_c, mask=m_c, other=-float("inf"))  # [BC]
    b_cmin = tl.load(p_column_min + o_c, mask=m_c, other=0.0)
    b_c = tl.load(p_row + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
    return b_g[None, :] - (b_c - b_rmin[:, None] - b_cmin[None, :]) * inv_reg


@triton.jit
def sinkhorn_sweep_kernel(
    p_cost,
    p_inv_reg,
    p_a,
    p_row_min,
    p_column_min,
    p_g,
    p_f,
    p_partial,
    p_status,
    n,
    m,
    rows_per_program,
    programs,
    RUNNING: tl.constexpr,
    RESIDENT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_p = tl.program_id(0) % programs
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    if tl.load(p_status + i_b) == RUNNING:
        inv_reg = tl.load(p_inv_reg + i_b)
        first = i_p * rows_per_program
        last = tl.minimum(first + rows_per_program, n)
        p_part = p_partial + (i_b * programs + i_p) * m
        o_c = tl.arange(0, BC)
        if RESIDENT:
            m_c = o_c < m
            b_g = tl.load(p_g + i_b * m + o_c, mask=m_c, other=-float("inf"))  # [BC]
            b_cmin = tl.load(p_column_min + i_b * m + o_c, mask=m_c, other=0.0)
            b_sum = tl.zeros((BC,), dtype=b_g.dtype)
            for row in range(first, last, BR):
                o_r = row + tl.arange(0, BR)
                m_r = o_r < last
                b_rmin = tl.load(p_row_min + i_b * n + o_r, mask=m_r, other=0.0)  # [BR]
                b_a = tl.load(p_a + i_b * n + o_r, mask=m_r, other=0.0)
                p_tile = p_cost + (i_b * n + o_r[:, None]) * m + o_c[None, :]
                b_c = tl.load(p_tile, mask=m_r[:, None] & m_c[None, :], other=0.0)  # [BR, BC]
                b_z = b_g[None, :] - (b_c - b_rmin[:, None] - b_cmin[None, :]) * inv_reg
                b_max = tl.max(b_z, 1)
                b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
                b_e = tl.exp(b_z - b_max[:, None])
                b_s = tl.sum(b_e, 1)
                b_w = tl.where(b_a > 0, b_a / b_s, 0.0)
                b_f = tl.where(b_a > 0, tl.log(b_a) - tl.log(b_s) - b_max, -float("inf"))
                tl.store(p_f + i_b * n + o_r, b_f, mask=m_r)
                b_sum += tl.sum(b_e * b_w[:, None], 0)
            tl.store(p_part + o_c, b_sum, mask=m_c)
        else:
            p_gs = p_g + i_b * m
            p_cmins = p_column_min + i_b * m
            for start in range(0, m, BC):
                tl.store(p_part + start + o_c, tl.zeros((BC,), tl.float32), mask=start + o_c < m)
            for row in range(first, last, BR):
                tl.debug_barrier()  # the partial sums below are read back by other threads
                o_r = row + tl.arange(0, BR)
                m_r = o_r < last
                b_rmin = tl.load(p_row_min + i_b * n + o_r, mask=m_r, other=0.0)  # [BR]
                b_a = tl.load(p_a + i_b * n + o_r, mask=m_r, other=0.0)
                p_row = p_cost + (i_b * n + o_r[:, None]) * m
                b_max = tl.full((BR,), -float("inf"), dtype=b_a.dtype)
                b_s = tl.zeros((BR,), dtype=b_a.dtype)
                for start in range(0, m, BC):
                    b_z = _exponents(p_row, p_gs, p_cmins, b_rmin, m_r, start + o_c, m, inv_reg)
                    b_new = tl.maximum(b_max, tl.max(b_z, 1))
                    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                    b_s = b_s * tl.exp(b_max - b_safe) + tl.sum(tl.exp(b_z - b_safe[:, None]), 1)
                    b_max = b_new
                b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
                b_f = tl.where(b_a > 0, tl.log(b_a) - tl.log(b_s) - b_max, -float("inf"))
                tl.store(p_f + i_b * n + o_r, b_f, mask=m_r)
                for start in range(0, m, BC):
                    m_c = start + o_c < m
                    b_z = _exponents(p_row, p_gs, p_cmins, b_rmin, m_r, start + o_c, m, inv_reg)
                    b_p = tl.sum(tl.exp(b_f[:, None] + b_z), 0)
                    b_old = tl.load(p_part + start + o_c, mask=m_c, other=0.0)
                    tl.store(p_part + start + o_c, b_old + b_p, mask=m_c)
