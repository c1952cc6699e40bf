"""Sinkhorn in one launch: problems that fit into the device's shared memory stay there.

A group of G programs holds one problem at a time: each some rows, whole, in shared memory, and some
columns in registers. An iteration is a sweep of the rows, a meeting of the group, an update of the
columns, and another meeting; partial sums pass through global memory, which is the cache. So there
is nothing to launch, to capture or to copy between the first minimum and the last potential.

    read the cost once: r, partial minima   | c, g            | what is kept of the cost
    per iteration:   f, partial column sums | g, the error    | (every program: go on?)

Groups take problems from a queue on the device. All programs must run at once: the launch is
cooperative, which the driver refuses where they do not fit, and a meeting that waits for too long
ends the launch with the problems unsolved. Sums are taken in a fixed order and every program of a
group computes what steers it from the same numbers, so results are the same bits every time.

Bound: two meetings and the latency of a row's reduction, some 2.5 us an iteration; for 4096 x 3072
2.1 us of instructions besides (132 multiprocessors at 1.98 GHz, 5.5 instructions an entry).

Naming: i_ program id, p_ pointer, b_ block value, m_ mask, o_ offset.
"""

from __future__ import annotations

import triton.language as tl

from dotresize.kernels.gluon_compat import barrier, gl, jit, wait_for_others
from dotresize.kernels.resident_columns import (
    KINDS,
    R_AGAINST,
    R_CODE,
    R_DRIFT,
    R_ERROR,
    R_G_SUM,
    R_LARGEST,
    R_MASS,
    R_MISFITS,
    R_SPAN,
    R_TOTAL,
    R_USED,
    column_minima,
    leave,
    left,
    own_columns,
    start_columns,
    update_columns,
)
from dotresize.kernels.resident_phases import (
    EXACT_COST,
    KEPT_PLAN,
    LEVELS,
    keep_costs,
    scan,
    sweep_exact,
    sweep_kept,
)
from dotresize.kernels.sinkhorn_finish import potentials
from dotresize.kernels.sinkhorn_prepare import linear_step
from dotresize.kernels.sinkhorn_rules import (
    CHEAP,
    KEEPING,
    has_converged,
    momentum_age,
    next_sweep,
)
from dotresize.kernels.sinkhorn_sheet import (
    N_MAX_ITER,
    N_MOMENTUM,
    N_PER_REG,
    N_REG,
    N_TOL,
    NUMBERS,
    O_ERROR,
    O_EXACT,
    O_ITERATIONS,
    O_SPAN,
    O_STATUS,
    OUTCOME,
)
from dotresize.kernels.sinkhorn_tables import (
    AT_COLUMN,
    AT_COLUMNS,
    AT_OFFSET,
    AT_ROW,
    AT_ROWS,
    AT_STRIDE,
    LINE,
)

# Times that a program looks whether all others have come: some seconds.
PATIENCE = tl.constexpr(1 << 22)


@jit
def meet(p_count, target, alive, LONE: tl.constexpr):
    """Return whether all programs of a group have come, after ``target`` arrivals in all.

    What they wrote before is then seen by each of them.
    """
    barrier()  # every thread's stores before the arrival of one
    met = alive
    if not LONE:
        if alive:
            gl.atomic_add(p_count, 1, sem="release", scope="gpu")
        # The difference is compared, as the counts may pass the largest integer.
        missing = target - gl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
        looks = 0
        while (missing > 0) & (looks < PATIENCE) & alive:
            wait_for_others()
            missing = target - gl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
            looks += 1
        met = alive & (missing <= 0)
        if alive & (missing > 0):
            # Nobody is to go on with what this program has not done: far fewer have come, then.
            gl.atomic_add(p_count, -(1 << 22), sem="relaxed", scope="gpu")
        barrier()
    return met


@jit(do_not_specialize=["problems", "columns"])
def resident_kernel(
    p_cost,
    p_problem,
    p_numbers,
    p_outcome,
    p_counters,
    p_a,
    p_b,
    p_start,
    p_row_min,
    p_log_a,
    p_f,
    p_rho,
    p_column_min,
    p_g,
    p_v,
    p_partial,
    p_rounded,
    p_lines,
    p_potential_f,
    p_potential_g,
    problems,
    columns,
    CONVERGED: tl.constexpr,
    MAX_ITER: tl.constexpr,
    INFEASIBLE: tl.constexpr,
    INVALID: tl.constexpr,
    TOO_COARSE: tl.constexpr,
    COARSEST: tl.constexpr,
    FAR: tl.constexpr,
    STORE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGN: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    OWN: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    WARPS_ROWS: tl.constexpr,
    WARPS_COLUMNS: tl.constexpr,
    OWN_LANES: tl.constexpr,
):
    """Solve problems until none is left; a launch has whole groups of G programs.

    p_counters: the next problem that waits, then for each group arrivals and its next problem.
    columns: of all problems, where the second buffer of g begins. LANES of a warp, and its warps,
    stand along the columns of a block, the others along its rows; VECTOR entries in a thread.
    """
    WARPS: tl.constexpr = WARPS_ROWS * WARPS_COLUMNS
    L: tl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 // LANES, LANES], [WARPS_ROWS, WARPS_COLUMNS], [1, 0]
    )
    LP: tl.constexpr = gl.BlockedLayout([1, 4], [32 // OWN_LANES, OWN_LANES], [WARPS, 1], [1, 0])
    # Each warp has the numbers of all programs, so that their sums need no exchange between warps.
    LG: tl.constexpr = gl.BlockedLayout([GP // 32], [32], [WARPS], [0])
    FLAT: tl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, 1, [1, 0])
    WIDTH: tl.constexpr = PARTS * BC
    KEEP: tl.constexpr = STORE == KEPT_PLAN
    LONE: tl.constexpr = G == 1
    if STORE == EXACT_COST:
        kept = gl.allocate_shared_memory(gl.float32, [BLOCKS * PARTS, BR, BC], FLAT)
    elif STORE == LEVELS:
        kept = gl.allocate_shared_memory(gl.uint16, [BLOCKS * PARTS, BR, BC], FLAT)
    else:
        kept = gl.allocate_shared_memory(gl.float16, [BLOCKS * PARTS, BR, BC], FLAT)
    i_g = gl.program_id(0) // G
    i_p = gl.program_id(0) % G
    groups = gl.num_programs(0) // G
    first = i_p * BLOCKS * BR
    p_part = p_partial + (i_g * G * WIDTH).to(tl.int64)
    p_round = p_rounded + (i_g * G * WIDTH).to(tl.int64)
    p_lines += i_g * KINDS * GP
    p_count = p_counters + 1 + 2 * i_g
    meetings = 0
    alive = problems > 0
    i_b = i_g
    while (i_b < problems) & alive:
        p_line = p_problem + i_b * LINE
        p_mine = p_cost + tl.multiple_of(tl.load(p_line + AT_OFFSET), ALIGN)
        stride = tl.multiple_of(tl.load(p_line + AT_STRIDE), ALIGN)
        n = tl.load(p_line + AT_ROWS).to(tl.int32)
        m = tl.load(p_line + AT_COLUMNS).to(tl.int32)
        i_row = tl.load(p_line + AT_ROW)
        i_column = tl.load(p_line + AT_COLUMN)
        p_asked = p_numbers + i_b * NUMBERS
        reg = tl.load(p_asked + N_REG)
        wide_per_reg = tl.load(p_asked + N_PER_REG)
        per_reg = wide_per_reg.to(tl.float32)
        tol = tl.load(p_asked + N_TOL)
        max_iter = tl.load(p_asked + N_MAX_ITER).to(tl.int32)
        use_momentum = tl.load(p_asked + N_MOMENTUM).to(tl.float32)

        code, span = scan(
            kept, p_mine, stride, p_a + i_row, p_b + i_column, p_row_min + i_row, p_log_a + i_row,
            p_f + i_row, p_part + i_p * WIDTH, first, n, m,
            INFEASIBLE, INVALID, STORE, ALIGN, BLOCKS, PARTS, BR, BC, L,
        )  # fmt: skip
        leave(p_lines, R_SPAN, i_p, span, GP)
        meetings += G
        alive = meet(p_count, meetings, alive, LONE)
        b_c, stuck = column_minima(
            p_part, p_b + i_column, p_column_min + i_column, i_p, m, INFEASIBLE,
            G, BP, OWN, WIDTH, LP,
        )  # fmt: skip
        b_b, b_g = start_columns(
            p_lines, p_b + i_column, p_start + i_column, p_g + i_column, i_p, b_c, wide_per_reg,
            m, OWN, GP, LP,
        )  # fmt: skip
        # One more than the code: what is read past the last program is 0.
        leave(p_lines, R_CODE, i_p, (tl.maximum(code, stuck) + 1).to(tl.float32), GP)
        span = tl.max(left(p_lines, R_SPAN, G, GP, LG), 0).to(tl.float64)
        meetings += G
        alive = meet(p_count, meetings, alive, LONE)
        code = tl.max(left(p_lines, R_CODE, G, GP, LG), 0).to(tl.int32) - 1
        step = linear_step(span)
        scale = (step * wide_per_reg).to(tl.float32)
        if STORE == LEVELS:
            code = tl.where((code < 0) & ~(span <= reg * COARSEST), TOO_COARSE, code)
        if STORE != KEPT_PLAN:
            keep_costs(
                kept, p_mine, stride, p_row_min + i_row, p_column_min + i_column, first, n, m,
                per_reg, step.to(tl.float32), STORE, ALIGN, BLOCKS, PARTS, BR, BC, L,
            )  # fmt: skip

        used = tl.sum(left(p_lines, R_USED, G, GP, LG), 0)
        mass = tl.sum(left(p_lines, R_MASS, G, GP, LG), 0)
        centre = tl.sum(left(p_lines, R_G_SUM, G, GP, LG), 0) / used
        b_before = b_g
        b_reference = b_g
        b_gamma = b_g
        iteration = 0
        exact = 0
        since = -1
        age = 0.0
        against = 0.0
        largest = 0.0
        total = mass
        drift = float("inf")
        misfits = 0.0
        error = float("inf")
        last_error = float("inf")
        parity = 0
        running = alive & (code < 0)
        while running:
            sweep = next_sweep(
                error, last_error, drift, misfits == 0, since, iteration, max_iter, tol, KEEP
            )
            p_now = p_g + parity * columns + i_column
            share = 1.0
            if KEEP:
                if sweep == CHEAP:
                    sweep_kept(
                        kept, p_log_a + i_row, p_rho + i_row, p_v + i_column,
                        p_part + i_p * WIDTH, p_round + i_p * WIDTH, first, n, m,
                        False, BLOCKS, PARTS, BR, BC, L,
                    )  # fmt: skip
                    share = mass / total
                    since += 1
            if sweep != CHEAP:
                sweep_exact(
                    kept, p_mine, stride, p_row_min + i_row, p_column_min + i_column,
                    p_log_a + i_row, p_f + i_row, p_now, p_part + i_p * WIDTH, first, n, m,
                    per_reg, scale, sweep == KEEPING, STORE, ALIGN, BLOCKS, PARTS, BR, BC, L,
                )  # fmt: skip
                exact += 1
                since = -1
                if KEEP:
                    if sweep == KEEPING:
                        sweep_kept(
                            kept, p_log_a + i_row, p_rho + i_row, p_v + i_column,
                            p_part + i_p * WIDTH, p_round + i_p * WIDTH, first, n, m,
                            True, BLOCKS, PARTS, BR, BC, L,
                        )  # fmt: skip
                        since = 0
            meetings += G
            alive = meet(p_count, meetings, alive, LONE)
            if MOMENTUM:
                age = momentum_age(age, against, error, last_error, largest, FAR)
            factor = use_momentum * ((age - 1) / (age + 1))
            b_b, b_g, b_before, b_reference, b_gamma = update_columns(
                (b_b, b_g, b_before, b_reference, b_gamma), p_lines, p_part, p_round, p_mine,
                stride, p_f + i_row, p_row_min + i_row, p_column_min + i_column,
                p_g + (1 - parity) * columns + i_column, p_v + i_column, i_p, n, m, per_reg,
                sweep, share, centre, factor, mass, KEEP, MOMENTUM, G, GP, BP, OWN, WIDTH, LP,
            )  # fmt: skip
            meetings += G
            alive = meet(p_count, meetings, alive, LONE)
            last_error = error
            error = tl.sum(left(p_lines, R_ERROR, G, GP, LG), 0)
            centre = tl.sum(left(p_lines, R_G_SUM, G, GP, LG), 0) / used
            if MOMENTUM:
                against = tl.sum(left(p_lines, R_AGAINST, G, GP, LG), 0)
                largest = tl.max(left(p_lines, R_LARGEST, G, GP, LG), 0)
            if KEEP:
                total = tl.sum(left(p_lines, R_TOTAL, G, GP, LG), 0)
                drift = tl.max(left(p_lines, R_DRIFT, G, GP, LG), 0)
                misfits = tl.sum(left(p_lines, R_MISFITS, G, GP, LG), 0)
            met = has_converged(error, since, tol)
            running = alive & ~met & (iteration < max_iter)
            if running:
                iteration += 1
                parity = 1 - parity
            else:
                code = tl.where(met, CONVERGED, MAX_ITER)

        o_c = own_columns(i_p, OWN, LP)
        b_found = tl.load(p_g + parity * columns + i_column + o_c, mask=o_c < m, other=0.0)
        b_found = potentials(b_found, b_c, reg, code, INFEASIBLE, INVALID)
        tl.store(p_potential_g + i_column + o_c, b_found, mask=o_c < m)
        for i in range(BLOCKS):
            o_r = first + i * BR + gl.arange(0, BR, layout=gl.SliceLayout(1, L))
            b_f = tl.load(p_f + i_row + o_r, mask=o_r < n, other=0.0)
            b_low = tl.load(p_row_min + i_row + o_r, mask=o_r < n, other=0.0)
            b_f = potentials(b_f, b_low, reg, code, INFEASIBLE, INVALID)
            tl.store(p_potential_f + i_row + o_r, b_f, mask=o_r < n)
        if (i_p == 0) & alive:
            found = error.to(tl.float64)
            if code == INFEASIBLE:
                found = total_of(p_a + i_row, n, GP, LG)
            found = tl.where(code == INVALID, float("nan"), found)
            p_own = p_outcome + i_b * OUTCOME
            tl.store(p_own + O_STATUS, code.to(tl.float64))
            tl.store(p_own + O_ERROR, found)
            tl.store(p_own + O_ITERATIONS, iteration.to(tl.float64))
            tl.store(p_own + O_EXACT, exact.to(tl.float64))
            tl.store(p_own + O_SPAN, span)
        if i_p == 0:
            waiting = gl.atomic_add(p_counters, 1, sem="relaxed", scope="gpu")
            tl.store(p_count + 1, groups + waiting)
        meetings += G
        alive = meet(p_count, meetings, alive, LONE)
        i_b = tl.load(p_count + 1)


@jit
def total_of(p_values, n, GP: tl.constexpr, LG: tl.constexpr):
    """Return the sum of n values, float64."""
    o_r = gl.arange(0, GP, layout=LG)
    b_sum = gl.full([GP], 0.0, gl.float64, layout=LG)
    for row in range(0, n, GP):
        b_sum += tl.load(p_values + row + o_r, mask=row + o_r < n, other=0.0)
    return tl.sum(b_sum, 0)
