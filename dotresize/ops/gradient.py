"""Derivatives of a solved problem with respect to its cost, without unrolling the iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dotresize.ops.result import _Problem

_RIDGE = 1e-13


class Plan(torch.autograd.Function):
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
    def forward(ctx: Any, cost: Tensor, problem: _Problem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(cost)  # torch then refuses a cost that was changed in between
        return problem.plan()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        problem: _Problem = ctx.problem
        (cost,) = ctx.saved_tensors
        if problem.status == "invalid":
            return torch.where(incoming == 0, 0.0, torch.nan).to(cost), None
        plan = torch.cat([block for _, block in problem.blocks()])
        weighted = torch.where(plan == 0, 0.0, plan * incoming.double())
        u, v = _keep_marginals(plan, weighted.sum(1), weighted.sum(0))
        gradient = (plan * (u[:, None] + v) - weighted) / problem.reg
        return gradient.to(problem.cost.dtype), None


class Value(torch.autograd.Function):
    """``min <C, P> + reg sum P log P``: by the envelope theorem its gradient is the plan."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: _Problem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(cost)
        return torch.tensor(problem.values[1], dtype=torch.float64)  # on the CPU, as all values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        problem: _Problem = ctx.problem
        (cost,) = ctx.saved_tensors
        return (problem.plan() * incoming).to(cost.dtype), None


def _keep_marginals(plan: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """u and v with ``P1 * u + P v = rows`` and ``P'u + P'1 * v = columns``."""
    # A row or column without mass has no equation: 1 on the diagonal gives it 0.
    a, b = (torch.where(mass > 0, mass, 1.0) for mass in (plan.sum(1), plan.sum(0)))
    scaled = plan / a[:, None]
    # In each part of the plan that exchanges no mass with the rest, u + t and v - t do the same:
    # the ridge picks one, and what it adds to the others is below their rounding.
    schur = torch.diag(b * (1 + _RIDGE)) - plan.T @ scaled
    factor = torch.linalg.cholesky(schur)
    v = torch.cholesky_solve((columns - scaled.T @ rows)[:, None], factor)[:, 0]
    return (rows - plan @ v) / a, v
