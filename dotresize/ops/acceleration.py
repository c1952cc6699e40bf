"""What turns plain Sinkhorn updates into fewer ones; for dotresize.ops.reference.

y is what a sweep was done at, G its plain update ``y + log b - log c(y)`` up to a constant (plain),
``log b - log c`` the step; all ``(A, m)`` for A problems still running, 0 in columns without mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dotresize.ops.constants import FAST_ENOUGH, far_potential

_MEMORY = 5
# An error so many times the best one sends Anderson back to where it was best.
_WORSE = 2.0


class Momentum:
    r"""Nesterov's extrapolation with restarts: over-relaxation by a factor that tunes itself.

    .. math:: y_{k+1} = G_k + \beta_k (G_k - G_{k-1}), \quad \beta_k = (k - 1) / (k + 1)

    k starts again where the last change was against the gradient of the dual,
    ``sum_j b_j (G_k - y_k)_j (G_k - G_{k-1})_j < 0``, where the last error was below
    ``FAST_ENOUGH`` of the one before, or where potentials are so large that exponents lose digits
    (forbidden pairs that admit no plan let them grow without end). All are those of the iteration
    before, as kernels that run in parallel do not have this one's sums yet.

    Reference: B. O'Donoghue, E. Candès, Adaptive Restart for Accelerated Gradient Schemes,
    Foundations of Computational Mathematics 15, 2015.
    """

    def __init__(self, start: Tensor, b: Tensor) -> None:
        self.before, self.b = start.clone(), b
        zeros = torch.zeros(len(b), dtype=torch.float64, device=b.device)
        self.age, self.against = zeros.clone(), zeros.clone()
        self.error, self.error_before = zeros + torch.inf, zeros + torch.inf
        self.far = zeros > 0
        self.limit = far_potential(b.dtype) * math.log(2)

    def advance(self, active: Tensor, step: Tensor, plain: Tensor, error: Tensor) -> Tensor:
        fast = self.error[active] < FAST_ENOUGH * self.error_before[active]
        again = (self.against[active] < 0) | fast | self.far[active]
        age = torch.where(again, 0.0, self.age[active]) + 1
        change = plain - self.before[active]
        self.age[active], self.before[active] = age, plain
        self.against[active] = (self.b[active] * step * change).sum(1).double()
        self.error_before[active], self.error[active] = self.error[active], error
        further = plain + ((age - 1) / (age + 1))[:, None].to(plain) * change
        self.far[active] = further.abs().amax(1) > self.limit
        return further


class Anderson:
    """Anderson acceleration (type II) over the last ``_MEMORY`` updates.

    The next y is the affine combination of past updates G whose residuals G - y cancel best. Where
    the error has more than doubled since its best, the memory is dropped and the best is the start.

    Reference: H. Walker, P. Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM Journal on
    Numerical Analysis 49, 2011.
    """

    def __init__(self, start: Tensor, b: Tensor) -> None:
        self.seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in b]
        self.best: list[tuple[float, Tensor]] = [(float("inf"), row) for row in start]

    def advance(self, active: Tensor, step: Tensor, plain: Tensor, error: Tensor) -> Tensor:
        steps = zip(active.tolist(), step, plain, error.tolist(), strict=True)
        return torch.stack([self._one(*step) for step in steps])

    def _one(self, i: int, step: Tensor, plain: Tensor, error: float) -> Tensor:
        lowest, at = self.best[i]
        if error > _WORSE * lowest:
            self.seen[i], self.best[i] = [], (float("inf"), at)
            return at
        if error < lowest:
            self.best[i] = (error, plain)
        self.seen[i] = [*self.seen[i], (plain, step - step.mean())][-_MEMORY - 1 :]
        updates, residuals = (torch.stack(v).double() for v in zip(*self.seen[i], strict=True))
        if len(updates) == 1:
            return plain
        turns = residuals.diff(dim=0).T
        # Least squares through the singular values: old residuals may be nearly parallel.
        weights = torch.linalg.pinv(turns, rtol=1e-6) @ residuals[-1]
        return (updates[-1] - updates.diff(dim=0).T @ weights).to(plain)
