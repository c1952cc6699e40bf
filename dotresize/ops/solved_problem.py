"""One solved Sinkhorn problem: its plan, its values, and their derivatives by its cost.

Derivatives go through the fixed point, without unrolling the iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dotresize.ops.backends import cpp, threads

STATUS_WORDS = ("converged", "max_iter", "infeasible", "invalid")
_RIDGE = 1e-13


@dataclass(frozen=True, eq=False)
class SolvedProblem:
    """One solved problem; the cost is the caller's tensor, not a copy."""

    source: Tensor  # (n, m); may require a gradient
    reg: float
    f: Tensor  # (n,) float64
    g: Tensor  # (m,) float64
    a: Tensor  # (n,) float64
    b: Tensor
    n_iter: int
    marginal_error: float
    status: str
    backend: str

    @property
    def cost(self) -> Tensor:
        return self.source.detach()

    @property
    def wants_gradient(self) -> bool:
        return self.source.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.source.dtype == torch.float64 else torch.float32

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        return self.f.to(self.dtype), self.g.to(self.dtype)

    def reason(self) -> str:
        if self.status == "max_iter":
            return f"marginal error {self.marginal_error:.3g} after {self.n_iter} iterations"
        if self.status == "invalid":
            found = (self.cost.isnan() | (self.cost == -torch.inf)).nonzero().tolist()
            if not found:
                return "the cost held NaN or -inf, and has been changed since"
            row, column = found[0]
            value = self.cost[row, column].item()
            return f"cost is {value} at row {row}, column {column}: must be finite, or inf"
        if self.status == "infeasible":
            open_pairs = self.cost < torch.inf
            stuck_rows = (self.a > 0) & ~(open_pairs & (self.b > 0)).any(1)
            stuck_columns = (self.b > 0) & ~(open_pairs & (self.a > 0)[:, None]).any(0)
            rows, columns = (v.nonzero().flatten().tolist() for v in (stuck_rows, stuck_columns))
            if not rows and not columns:
                return "a row or column had forbidden pairs only, and the cost was changed since"
            name, index = ("row", rows[0]) if rows else ("column", columns[0])
            return f"{name} {index} has mass, and every pair of it is forbidden (inf)"
        return ""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the plan in float64, by blocks of rows.

        f, g and cost / reg may be large numbers that nearly cancel. A forbidden pair meets
        f = -inf or g = -inf as -inf, never as NaN.
        """
        # On a CPU a block stays in the cache; a GPU wants few launches.
        entries = 2**16 if self.cost.device.type == "cpu" else 2**24
        rows = max(1, entries // max(1, self.cost.shape[1]))
        for start in range(0, self.cost.shape[0], rows):
            block = slice(start, start + rows)
            scaled = self.cost[block].to(torch.float64, copy=True).div_(self.reg)
            yield block, (self.f[block, None] + self.g).sub_(scaled).exp_()

    def plan(self, out: Tensor | None = None) -> Tensor:
        """Return the plan in the result's dtype, into ``out`` if there is one."""
        if out is None:
            out = self.cost.new_empty(self.cost.shape, dtype=self.dtype)
        as_is = self.cost.dtype == self.dtype and self.cost.stride(1) == 1
        as_is = as_is and not self.cost.is_neg()
        if self.backend == "cpp" and as_is and self.status != "invalid":
            cpp().plan(
                n=self.cost.shape[0],
                m=self.cost.shape[1],
                cost=self.cost.data_ptr(),
                stride=self.cost.stride(0),
                reg=self.reg,
                f=self.f.contiguous().data_ptr(),
                g=self.g.contiguous().data_ptr(),
                out=out.data_ptr(),
                use_float64=self.dtype == torch.float64,
                num_threads=threads(),
            )
            return out
        for block, values in self.blocks():
            out[block] = values
        return out

    def differentiable_plan(self) -> Tensor:
        return _DifferentiablePlan.apply(self.source, self) if self.wants_gradient else self.plan()

    def differentiable_value(self) -> float | Tensor:
        return (
            _DifferentiableValue.apply(self.source, self) if self.wants_gradient else self.values[1]
        )

    def differentiable_value_linear(self) -> float | Tensor:
        if not self.wants_gradient:
            return self.values[0]
        plan = self.differentiable_plan().double()
        # A forbidden pair has no mass, and 0 times its infinite cost is nothing.
        return (plan * torch.where(plan == 0, 0.0, self.source.double())).sum().cpu()

    @cached_property
    def values(self) -> tuple[float, float]:
        """The pair of value_linear and value."""
        linear = entropy = 0.0
        for block, plan in self.blocks():
            # A pair without mass costs nothing, also where it is forbidden; NaN stays NaN.
            paid = torch.where(plan == 0, 0.0, plan * self.cost[block].double())
            linear += float(paid.sum())
            entropy += float(torch.special.xlogy(plan, plan).sum())
        return linear, linear + self.reg * entropy


class _DifferentiablePlan(torch.autograd.Function):
    r"""The plan of a solved problem, differentiable through its fixed point.

    With the marginals held, ``dP = P * (u_i + v_j - dC_ij / reg)`` where u and v keep the row and
    column sums as they are. For an incoming gradient H this gives

    .. math:: \frac{\partial L}{\partial C} = \frac{P \circ (u \oplus v - H)}{\mathrm{reg}}, \quad
        \begin{pmatrix} \mathrm{diag}(P 1) & P \\ P^\top & \mathrm{diag}(P^\top 1) \end{pmatrix}
        \begin{pmatrix} u \\ v \end{pmatrix} =
        \begin{pmatrix} (P \circ H) 1 \\ (P \circ H)^\top 1 \end{pmatrix}

    solved for v by its Schur complement, (m, m), in float64: n m^2 + m^3 / 3 operations.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: SolvedProblem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(cost)  # torch then refuses a cost that was changed in between
        return problem.plan()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        problem: SolvedProblem = ctx.problem
        (cost,) = ctx.saved_tensors
        if problem.status == "invalid":
            return torch.where(incoming == 0, 0.0, torch.nan).to(cost), None
        plan = torch.cat([block for _, block in problem.blocks()])
        weighted = torch.where(plan == 0, 0.0, plan * incoming.double())
        u, v = _keep_marginals(plan, weighted.sum(1), weighted.sum(0))
        gradient = (plan * (u[:, None] + v) - weighted) / problem.reg
        return gradient.to(problem.cost.dtype), None


class _DifferentiableValue(torch.autograd.Function):
    """``min <C, P> + reg sum P log P``: by the envelope theorem its gradient is the plan."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: SolvedProblem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(cost)
        return torch.tensor(problem.values[1], dtype=torch.float64)  # on the CPU, as all values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        problem: SolvedProblem = ctx.problem
        (cost,) = ctx.saved_tensors
        return (problem.plan() * incoming).to(cost.dtype), None


def _keep_marginals(plan: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and v with ``P1 * u + P v = rows`` and ``P'u + P'1 * v = columns``."""
    # A row or column without mass has no equation: 1 on the diagonal gives it 0.
    a, b = (torch.where(mass > 0, mass, 1.0) for mass in (plan.sum(1), plan.sum(0)))
    scaled = plan / a[:, None]
    # In each part of the plan that exchanges no mass with the rest, u + t and v - t do the same:
    # the ridge picks one, and what it adds to the others is below their rounding.
    schur = torch.diag(b * (1 + _RIDGE)) - plan.T @ scaled
    factor = torch.linalg.cholesky(schur)
    v = torch.cholesky_solve((columns - scaled.T @ rows)[:, None], factor)[:, 0]
    return (rows - plan @ v) / a, v
