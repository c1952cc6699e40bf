r"""Derivatives of a solved Sinkhorn problem by its cost and its marginals.

They go through the fixed point, without unrolling the iterations: with
``P = exp(f_i + g_j - C_ij / reg)`` and its row sums a and column sums b,

.. math:: dP_{ij} = P_{ij} (df_i + dg_j - dC_{ij} / \mathrm{reg}), \quad
          dP \, 1 = da, \quad dP^\top 1 = db.

For a gradient H that arrives at the plan, u and v of the adjoint system

.. math:: \begin{pmatrix} \mathrm{diag}(a) & P \\ P^\top & \mathrm{diag}(b) \end{pmatrix}
          \begin{pmatrix} u \\ v \end{pmatrix} =
          \begin{pmatrix} (P \circ H) 1 \\ (P \circ H)^\top 1 \end{pmatrix}

are the gradients by a and b, and :math:`P \circ (u \oplus v - H) / \mathrm{reg}` is that by C. A
constant may pass from u to v, since no plan has marginals of different masses; it is the one with
``<b, v> = 0``. The system is solved for v by its Schur complement, (m, m), in float64:
n m^2 + m^3 / 3 operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The Schur complement's eigenvalues are scaled to lie in [0, 1]. Those below this belong to
# constants of parts of the plan that exchange no mass, and count as 0.
_SINGULAR = 1e-12


class Solved(Protocol):
    """What is asked of a solved problem (``solved_problem.py``)."""

    @property
    def reg(self) -> float: ...
    @property
    def f(self) -> Tensor: ...
    @property
    def g(self) -> Tensor: ...
    @property
    def status(self) -> str: ...
    def blocks(self) -> Iterator[tuple[slice, Tensor]]: ...
    def plan(self) -> Tensor: ...
    @property
    def values(self) -> tuple[float, float]: ...


def plan_of(cost: Tensor, a: Tensor, b: Tensor, solved: Solved) -> Tensor:
    """Return the plan; gradients pass from it to the cost and the marginals."""
    return _Plan.apply(cost, a, b, solved)


def value_of(cost: Tensor, a: Tensor, b: Tensor, solved: Solved) -> Tensor:
    """Return ``<C, P> + reg sum P log P``, float64 on the CPU, likewise.

    By the envelope theorem its gradients are the plan, ``reg (f + 1)`` and ``reg g``.
    """
    return _Value.apply(cost, a, b, solved)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, solved: Solved) -> Tensor:
        ctx.solved = solved
        ctx.save_for_backward(cost)  # torch then refuses a cost that was changed in between
        return solved.plan()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        solved: Solved = ctx.solved
        (cost,) = ctx.saved_tensors
        if solved.status == "invalid":
            unknown = torch.where(incoming == 0, 0.0, torch.nan)
            by_a, by_b = (unknown.sum(axis).double() for axis in (1, 0))
            return unknown.to(cost), by_a, by_b, None
        plan = torch.cat([block for _, block in solved.blocks()])
        weighted = torch.where(plan == 0, 0.0, plan * incoming.double())
        u, v = _adjoint(plan, weighted.sum(1), weighted.sum(0))
        by_cost = (plan * (u[:, None] + v) - weighted) / solved.reg
        return by_cost.to(cost.dtype), u, v, None


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, solved: Solved) -> Tensor:
        ctx.solved = solved
        ctx.save_for_backward(cost)
        return torch.tensor(solved.values[1], dtype=torch.float64, device="cpu")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        solved: Solved = ctx.solved
        (cost,) = ctx.saved_tensors
        # Without mass a potential is -inf; such entries get the gradient 0, as from the plan.
        f, g = (torch.where(v == -torch.inf, 0.0, v) for v in (solved.f + 1, solved.g))
        scale = incoming.to(f.device) * solved.reg
        return (solved.plan() * incoming).to(cost.dtype), scale * f, scale * g, None


def _adjoint(plan: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and v with ``a u + P v = rows`` and ``P'u + b v = columns``."""
    a, b = plan.sum(1), plan.sum(0)
    # A row or column without mass has no equation: 1 on the diagonal gives it 0.
    safe_a, safe_b = (torch.where(mass > 0, mass, 1.0) for mass in (a, b))
    scaled = plan / safe_a[:, None]
    total = b.sum()
    fixed = b[:, None] * b / torch.where(total > 0, total, 1.0)
    schur = torch.diag(safe_b) - plan.T @ scaled + fixed
    root = safe_b.rsqrt()
    schur = root[:, None] * schur * root
    right = (root * (columns - scaled.T @ rows))[:, None]
    factor, failed = torch.linalg.cholesky_ex(schur)
    if not failed and factor.diagonal().min() ** 2 > _SINGULAR:
        v = torch.cholesky_solve(right, factor)
    else:
        v = torch.linalg.pinv(schur, rtol=_SINGULAR, hermitian=True) @ right
    v = root * v[:, 0]
    return (rows - plan @ v) / safe_a, v
