"""Plain-PyTorch oracle of every operator: obviously right, slow, good in float64.

Every backend is compared with these functions, and ``backend="torch"`` runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens per partial sum; the same in every backend, see csrc/kernels.hpp.
TOKEN_BLOCK = 256

CONVERGED, MAX_ITER, INFEASIBLE, INVALID = range(4)


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


def sinkhorn(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: float, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-domain Sinkhorn of a batch by plain log-sum-exps.

    cost (B, n, m); reg (B,); a (B, n); b (B, m); g (B, m) the initial column potentials. One
    iteration is ``f = log a - lse_j(g - C/reg)`` and ``g = log b - lse_i(f - C/reg)``; a problem
    stops when, after a row update, ``|P'1 - b|_1 <= tol`` (never, for tol = 0), or after
    ``max_iter`` updates of g. Rows are exact at exit.

    Returns f, g, n_iter, marginal_error, status (codes above). Potentials are NaN for a cost with
    NaN or -inf ("invalid"), and -inf where a row or column of positive mass has only +inf
    ("infeasible").
    """
    log_a, log_b = a.to(cost).log(), b.to(cost).log()
    scaled = cost / reg.to(cost)[:, None, None]
    g = torch.where(b > 0, g.to(cost), -torch.inf)
    f = torch.zeros_like(log_a)
    count = cost.shape[0]
    n_iter = torch.zeros(count, dtype=torch.int64, device=cost.device)
    error = torch.full((count,), torch.nan, dtype=torch.float64, device=cost.device)
    status = _initial_status(cost, a, b)
    invalid, infeasible = status == INVALID, status == INFEASIBLE
    error[infeasible] = a.double().sum(1)[infeasible]
    active = (status == MAX_ITER).nonzero().flatten()
    iteration = 0
    while active.numel():
        k, start = scaled[active], g[active]
        row = log_a[active] - _lse(start[:, None, :] - k, 2)
        row = torch.where(a[active] > 0, row, -torch.inf)
        column_lse = _lse(row[:, :, None] - k, 1)
        column = torch.where(b[active] > 0, (start + column_lse).exp(), 0.0)
        now = (column - b[active]).abs().sum(1).double()
        f[active], error[active], n_iter[active] = row, now, iteration
        converged = (now <= tol) & (tol > 0)
        status[active[converged]] = CONVERGED
        update = _centred(log_b[active] - column_lse, b[active] > 0)
        going = ~converged if iteration < max_iter else torch.zeros_like(converged)
        active = active[going]
        g[active] = update[going]
        iteration += 1
    for problems, value in ((invalid, torch.nan), (infeasible, -torch.inf)):
        f[problems], g[problems] = value, value
    return f, g, n_iter, error, status


def _initial_status(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    status = torch.full((cost.shape[0],), MAX_ITER, dtype=torch.int64, device=cost.device)
    used = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    forbidden = (cost == torch.inf) | ~used
    stuck = (forbidden.all(2) & (a > 0)).any(1) | (forbidden.all(1) & (b > 0)).any(1)
    status[stuck] = INFEASIBLE
    status[(cost.isnan() | (cost == -torch.inf)).flatten(1).any(1)] = INVALID
    return status


def _centred(g: Tensor, used: Tensor) -> Tensor:
    """g with mean 0 over the used columns: the constant is free, and digits are lost far from 0."""
    mean = torch.where(used, g, 0.0).sum(1, keepdim=True) / used.sum(1, keepdim=True)
    return torch.where(used, g - mean, -torch.inf)


def _lse(z: Tensor, dim: int) -> Tensor:
    # A slice with nothing but -inf has the sum 0, not NaN; torch.logsumexp knows that too, but
    # not for an empty slice.
    return torch.logsumexp(z, dim) if z.shape[dim] else z.sum(dim).log()
