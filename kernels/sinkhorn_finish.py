"""After the last Sinkhorn iteration: what became of each problem, and potentials of its cost."""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.sinkhorn_columns import L_ERROR, L_ITERATION, L_SINCE, STATE, all_of
from dotresize.kernels.sinkhorn_prepare import place
from dotresize.kernels.sinkhorn_rules import has_converged
from dotresize.kernels.sinkhorn_sheet import (
    N_REG,
    N_TOL,
    NUMBERS,
    O_ERROR,
    O_ITERATIONS,
    O_STATUS,
    OUTCOME,
)
from dotresize.kernels.sinkhorn_tables import AT_BLOCK, AT_COLUMN, AT_ROW
from dotresize.ops import constants

LN2 = tl.constexpr(1 / constants.LOG2E)


@triton.jit
def potentials(b_p, b_low, reg, status, INFEASIBLE: tl.constexpr, INVALID: tl.constexpr):
    """Return potentials of the caller's cost, in float64: the minima come back, over reg."""
    b_found = b_p.to(tl.float64) * LN2 + b_low.to(tl.float64) / reg
    b_found = tl.where(status == INFEASIBLE, -float("inf"), b_found)
    return tl.where(status == INVALID, float("nan"), b_found)


@triton.jit
def finish_kernel(
    p_problem,
    p_program,
    p_block,
    p_numbers,
    p_outcome,
    p_a,
    p_row_min,
    p_column_min,
    p_f,
    p_g,
    p_state,
    p_potential_f,
    p_potential_g,
    p_status,
    columns,
    rows_per_program,
    programs,
    RUNNING: tl.constexpr,
    CONVERGED: tl.constexpr,
    MAX_ITER: tl.constexpr,
    INFEASIBLE: tl.constexpr,
    INVALID: tl.constexpr,
    SHIFTED: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BR: tl.constexpr,
):
    """Write the potentials of each program's rows, or of a block of columns.

    The first block of a problem's columns also writes what became of it. columns: of all problems,
    where the second buffer of g begins. p_state: of the last iteration that was launched.
    """
    if tl.program_id(0) < programs:
        i_b, first, p_line, n, m = place(p_problem, p_program, tl.program_id(0))
        status = tl.load(p_status + i_b)
        reg = tl.load(p_numbers + i_b * NUMBERS + N_REG)
        i_row = tl.load(p_line + AT_ROW)
        last = tl.minimum(first + rows_per_program, n)
        for row in range(first, last, BR):
            o_r = row + tl.arange(0, BR)
            m_r = o_r < last
            b_f = tl.load(p_f + i_row + o_r, mask=m_r, other=0.0)
            b_low = tl.load(p_row_min + i_row + o_r, mask=m_r, other=0.0)
            b_found = potentials(b_f, b_low, reg, status, INFEASIBLE, INVALID)
            tl.store(p_potential_f + i_row + o_r, b_found, mask=m_r)
    else:
        i_b, first, p_line, n, m = place(p_problem, p_block, tl.program_id(0) - programs)
        status = tl.load(p_status + i_b)
        p_own = p_outcome + i_b * OUTCOME
        iterations = tl.load(p_own + O_ITERATIONS).to(tl.int32)
        p_all = p_state + STATE * tl.load(p_line + AT_BLOCK)
        if status == RUNNING:
            iterations = tl.load(p_all + L_ITERATION).to(tl.int32) - 1
        if first == 0:
            if status == RUNNING:
                o_q = tl.arange(0, BLOCKS)
                error = tl.sum(all_of(p_all, L_ERROR, o_q, o_q < tl.cdiv(m, COLUMN_BLOCK)), 0)
                tol = tl.load(p_numbers + i_b * NUMBERS + N_TOL)
                met = has_converged(error, tl.load(p_all + L_SINCE), tol)
                tl.store(p_own + O_ERROR, error.to(tl.float64))
                tl.store(p_own + O_ITERATIONS, iterations.to(tl.float64))
                code = tl.where(met, CONVERGED, MAX_ITER)
                tl.store(p_own + O_STATUS, code.to(tl.float64))
            else:
                tl.store(p_own + O_STATUS, status.to(tl.float64))
            if status == INFEASIBLE:
                b_mass = tl.zeros((BR,), dtype=tl.float64)
                i_row = tl.load(p_line + AT_ROW)
                for row in range(0, n, BR):
                    o_r = row + tl.arange(0, BR)
                    b_mass += tl.load(p_a + i_row + o_r, mask=o_r < n, other=0.0)
                tl.store(p_own + O_ERROR, tl.sum(b_mass, 0))
        o_c = first + tl.arange(0, COLUMN_BLOCK)
        m_c = o_c < m
        i_column = tl.load(p_line + AT_COLUMN)
        b_g = tl.load(p_g + (iterations % 2) * columns + i_column + o_c, mask=m_c, other=0.0)
        b_low = tl.zeros_like(b_g)
        if SHIFTED:
            b_low = tl.load(p_column_min + i_column + o_c, mask=m_c, other=0.0)
        reg = tl.load(p_numbers + i_b * NUMBERS + N_REG)
        b_found = potentials(b_g, b_low, reg, status, INFEASIBLE, INVALID)
        tl.store(p_potential_g + i_column + o_c, b_found, mask=m_c)
