"""Plain-PyTorch oracle of every operator: obviously right, slow, good in float64.

Every backend is compared with these functions, and ``backend="torch"`` runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.acceleration import Anderson, Momentum
from dotresize.ops.constants import (
    ANDERSON,
    CONVERGED,
    INFEASIBLE,
    INVALID,
    MAX_ITER,
    MOMENTUM,
    TOKEN_BLOCK,
    SinkhornBatch,
    SinkhornSolution,
)


def l1_cost(x: Tensor, y: Tensor, total: Tensor | None = None) -> Tensor:
    """Sum over tokens of absolute differences: ``C[b, i, j] = sum_t |x[b, t, i] - y[b, t, j]|``.

    x: (B, T, n), y: (B, T, m), float32 or float64 -> (B, n, m). Partial sums of ``TOKEN_BLOCK``
    tokens are added to ``total`` (a new zero tensor if None) in token order.
    """
    if total is None:
        total = x.new_zeros(x.shape[0], x.shape[2], y.shape[2])
    for start in range(0, x.shape[1], TOKEN_BLOCK):
        block = slice(start, start + TOKEN_BLOCK)
        # Not the matrix-multiply form: for p = 1 cdist has none, so nothing cancels.
        total += torch.cdist(x[:, block].mT.contiguous(), y[:, block].mT.contiguous(), p=1.0)
    return total


def l1_cost_backward(x: Tensor, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum_ij G_ij C_ij`` by x and y, for the C of ``l1_cost``.

    x: (B, T, n), y: (B, T, m), gradient G: (B, n, m) -> (B, T, n) and (B, T, m): sums of
    ``G_ij sign(x_ti - y_tj)`` over j, and their negatives over i.
    """
    by_x, by_y = torch.empty_like(x), torch.empty_like(y)
    for t in range(x.shape[1]):
        terms = gradient * torch.sign(x[:, t, :, None] - y[:, t, None, :])
        by_x[:, t], by_y[:, t] = terms.sum(2), -terms.sum(1)
    return by_x, by_y


def sinkhorn(batch: SinkhornBatch) -> SinkhornSolution:
    """Solve a batch by log-domain Sinkhorn with plain log-sum-exps, in the cost's type.

    The problems must be of one shape (n, m). One iteration is ``f = log a - lse_j(g - C/reg)`` and
    ``g = log b - lse_i(f - C/reg)``, which an acceleration may take further (acceleration.py). A
    problem stops when, after a row update, ``|P'1 - b|_1 <= tol`` (never, for tol = 0), or after
    ``max_iter`` updates of g. Rows are exact at exit.

    Potentials are NaN for a cost with NaN or -inf ("invalid"), and -inf where a row or column of
    positive mass has only +inf ("infeasible").
    """
    cost = torch.stack(list(batch.costs))
    (count, n, m), max_iter = cost.shape, batch.max_iter
    a, b = batch.a.view(count, n).to(cost), batch.b.view(count, m).to(cost)
    tol, acceleration = batch.tol.to(cost.device, torch.float64), batch.acceleration.to(cost.device)
    row_min, column_min, status = minima(cost, a, b)
    wide_reg = batch.reg.to(device=cost.device, dtype=torch.float64)[:, None]
    shift_f, shift_g = row_min.double() / wide_reg, column_min.double() / wide_reg
    # The minima come off before the division: digits are then spent where the plan is.
    scaled = (cost - row_min[:, :, None] - column_min[:, None, :]) / wide_reg[:, :, None].to(cost)
    f = torch.zeros_like(a)
    g = torch.where(b > 0, batch.g.view(count, m) - shift_g, -torch.inf).to(cost)
    n_iter = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    error = torch.full((len(cost),), torch.nan, dtype=torch.float64, device=cost.device)
    finite = torch.where(b > 0, g, 0.0)
    helpers: dict[int, Momentum | Anderson] = {
        MOMENTUM: Momentum(finite, b),
        ANDERSON: Anderson(finite, b),
    }
    active = (status == MAX_ITER).nonzero().flatten()
    iteration = 0
    while active.numel():
        k, start, used = scaled[active], g[active], b[active] > 0
        row = torch.where(
            a[active] > 0, a[active].log() - _lse(start[:, None, :] - k, 2), -torch.inf
        )
        column_lse = _lse(row[:, :, None] - k, 1)
        column = torch.where(used, (start + column_lse).exp(), 0.0)
        now = (column - b[active]).abs().sum(1).double()
        f[active], error[active], n_iter[active] = row, now, iteration
        converged = (now <= tol[active]) & (tol[active] > 0)
        status[active[converged]] = CONVERGED
        raw = b[active].log() - column_lse
        update = _less_mean(raw, start, used)
        going = ~converged if iteration < max_iter else torch.zeros_like(converged)
        active = active[going]
        g[active] = update[going]
        step = (raw - start)[going]
        for code, helper in helpers.items():
            own = acceleration[active] == code
            if own.any():
                mine = active[own]
                moved, plain = (torch.where(b[mine] > 0, v, 0.0) for v in (step[own], g[mine]))
                further = helper.advance(mine, moved, plain, now[going][own])
                g[mine] = torch.where(b[mine] > 0, further, -torch.inf)
        iteration += 1
    f, g = restore(f, g, shift_f, shift_g, a, error, status)
    return SinkhornSolution(f.flatten(), g.flatten(), n_iter, error, status)


def minima(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row minima, and column minima of what remains, over rows and columns with mass.

    Returns (B, n), (B, m) and the status (B,): MAX_ITER, or why a problem cannot be solved.
    """
    rows = torch.where((b > 0)[:, None, :], cost, torch.inf).amin(2)
    row_min = torch.where(rows.isfinite(), rows, 0.0)
    rest = cost - row_min[:, :, None]
    columns = torch.where((a > 0)[:, :, None], rest, torch.inf).amin(1)
    column_min = torch.where(columns.isfinite(), columns, 0.0)
    stuck = ((rows == torch.inf) & (a > 0)).any(1) | ((columns == torch.inf) & (b > 0)).any(1)
    bad = (cost.isnan() | (cost == -torch.inf)).flatten(1).any(1)
    status = torch.full((len(cost),), MAX_ITER, dtype=torch.int64, device=cost.device)
    status[stuck], status[bad] = INFEASIBLE, INVALID
    return row_min, column_min, status


def restore(
    f: Tensor, g: Tensor, shift_f: Tensor, shift_g: Tensor, a: Tensor, error: Tensor, status: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the potentials of the caller's cost, float64; set unsolvable problems' errors."""
    f, g = f.double() + shift_f, g.double() + shift_g
    for code, value, mass in ((INVALID, torch.nan, torch.nan), (INFEASIBLE, -torch.inf, 1.0)):
        hit = status == code
        f[hit], g[hit] = value, value
        error[hit] = a.double().sum(1)[hit] * mass
    return f, g


def _less_mean(update: Tensor, g: Tensor, used: Tensor) -> Tensor:
    """Return the update less the mean of g: the constant is free; digits are lost far from 0."""
    mean = torch.where(used, g, 0.0).sum(1, keepdim=True) / used.sum(1, keepdim=True)
    return torch.where(used, update - mean, -torch.inf)


def _lse(z: Tensor, dim: int) -> Tensor:
    # A slice with nothing but -inf has the sum 0, not NaN; torch.logsumexp knows that too, but
    # not for an empty slice.
    return torch.logsumexp(z, dim) if z.shape[dim] else z.sum(dim).log()


def assignment(score: Tensor, maximize: bool) -> Tensor:
    """Return the optimal column of each row by scipy in float64, one problem after the other.

    score (B, n, m) without NaN, n <= m -> int64 (B, n) on the CPU; all -1 where forbidden pairs
    leave none.
    """
    from scipy.optimize import linear_sum_assignment  # importing dotresize costs torch and numpy

    columns = torch.full(score.shape[:2], -1, dtype=torch.int64, device="cpu")
    for problem, out in zip(score.cpu(), columns, strict=True):
        try:
            found = linear_sum_assignment(problem.double().numpy(), maximize=maximize)[1]
        except ValueError:  # "cost matrix is infeasible": the entries were checked
            continue
        out.copy_(torch.from_numpy(found))
    return columns


def assignment_duals(cost: Tensor, columns: Tensor) -> Tensor:
    """Return the column duals v of a minimal assignment.

    ``v_j - v_x_i <= c_ij - c_i,x_i`` for all i and j.

    cost (n, m) float64, n <= m, columns (n,) -> (m,), 0 for a column that is left over. Shortest
    paths over these differences by Bellman and Ford; an optimal assignment has no negative cycle,
    so n rounds are enough.
    """
    paid = cost.gather(1, columns[:, None])
    rounding = torch.finfo(cost.dtype).eps * float(paid.abs().max())
    v = cost.new_zeros(cost.shape[1])
    for _ in range(len(cost)):
        shorter = torch.minimum(v, (v[columns, None] + (cost - paid)).amin(0))
        done = bool((v - shorter).max() <= rounding)
        v = shorter
        if done:
            break
    return v
