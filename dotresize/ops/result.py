"""What a Sinkhorn solve returns."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dotresize.ops.backends import cpp, threads
from dotresize.ops.gradient import Plan, Value

STATUS_WORDS = ("converged", "max_iter", "infeasible", "invalid")


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """Solution of one entropic transport problem, of a batch, or of a ragged list of them.

    A single problem has plain numbers and 2-D tensors; a batch has tensors and tuples with one
    entry per problem; a ragged list has tuples of tensors. ``result[i]`` is problem i by itself.

    Attributes:
        potentials: ``(f, g)``, dimensionless, in POT's gauge:
            ``plan = exp(f_i + g_j - cost_ij / reg)``. Like the plan, in the cost's dtype, or
            float32 for half-precision costs.
        n_iter: iterations done (updates of g).
        marginal_error: ``max(|P1 - a|_1, |P'1 - b|_1)`` from the last pass over the plan. Rows
            are exact at exit, so this is the columns' error, up to the rounding of
            ``cost / reg`` (about 6e-8 of its range in float32).
        converged: marginal_error reached ``tol``.
        status: "converged", "max_iter", "infeasible" (a row or column of positive mass whose
            every cost is +inf; the plan is 0) or "invalid" (NaN or -inf in the cost; the plan
            is NaN).
        reason: why a problem has not converged, in one line that names the entry, row or column;
            "" where it has.
        plan: computed when first asked for, from float64 potentials and the caller's cost, which
            must not have been changed in place by then.
        value_linear: ``<C, P>``; float64, a batch's on the CPU.
        value: ``<C, P> + reg * sum P log P``, as POT's ``solve_batch`` with reg_type "entropy".

    If the cost requires a gradient, the plan and both values pass one back to it (and a single
    problem's values are tensors): through the fixed point, exact to the marginal error, at the
    price of one (m, m) solve in float64 for the plan and none for ``value`` (ops/gradient.py). The
    potentials are constants.
    """

    potentials: tuple
    n_iter: int | Tensor
    marginal_error: float | Tensor
    converged: bool | Tensor
    status: str | tuple[str, ...]
    _problems: tuple[_Problem, ...]
    _layout: str  # "single", "batch" or "ragged"

    @classmethod
    def collect(cls, problems: list[_Problem], layout: str) -> SinkhornResult:
        """From solved problems, in the layout of the caller's cost."""
        if layout == "single":
            only = problems[0]
            return cls(
                only.potentials,
                only.n_iter,
                only.marginal_error,
                only.status == "converged",
                only.status,
                (only,),
                layout,
            )
        potentials: tuple
        if layout == "ragged":
            potentials = tuple(zip(*(problem.potentials for problem in problems), strict=True))
        else:
            dtype = problems[0].dtype
            rows = torch.stack([problem.f for problem in problems])
            columns = torch.stack([problem.g for problem in problems])
            potentials = rows.to(dtype), columns.to(dtype)
        return cls(
            potentials,
            torch.tensor([problem.n_iter for problem in problems], dtype=torch.int64),
            torch.tensor([problem.marginal_error for problem in problems], dtype=torch.float64),
            torch.tensor([problem.status == "converged" for problem in problems]),
            tuple(problem.status for problem in problems),
            tuple(problems),
            layout,
        )

    def __getitem__(self, index: int) -> SinkhornResult:
        return SinkhornResult.collect([self._problems[operator.index(index)]], "single")

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[SinkhornResult]:
        return (self[i] for i in range(len(self)))

    def _gather(self, values: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        if self._layout == "single":
            return values[0]
        return tuple(values) if self._layout == "ragged" else torch.stack(values)

    @property
    def potential_a(self) -> Tensor | tuple[Tensor, ...]:
        """f; POT's name for it."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Tensor | tuple[Tensor, ...]:
        """g; POT's name for it."""
        return self.potentials[1]

    @property
    def reason(self) -> str | tuple[str, ...]:
        reasons = tuple(problem.reason() for problem in self._problems)
        return reasons[0] if self._layout == "single" else reasons

    @property
    def plan(self) -> Tensor | tuple[Tensor, ...]:
        wanted = any(problem.wants_gradient for problem in self._problems)
        return self._plan_with_graph if wanted and torch.is_grad_enabled() else self._plan

    @cached_property
    def _plan_with_graph(self) -> Tensor | tuple[Tensor, ...]:
        return self._gather([problem.differentiable_plan() for problem in self._problems])

    @cached_property
    def _plan(self) -> Tensor | tuple[Tensor, ...]:
        if self._layout != "batch":
            return self._gather([problem.plan() for problem in self._problems])
        first = self._problems[0]
        plans = first.cost.new_empty(len(self), *first.cost.shape, dtype=first.dtype)
        for problem, out in zip(self._problems, plans, strict=True):
            problem.plan(out)
        return plans

    @property
    def value_linear(self) -> float | Tensor:
        return self._numbers([problem.differentiable_value_linear() for problem in self._problems])

    @property
    def value(self) -> float | Tensor:
        return self._numbers([problem.differentiable_value() for problem in self._problems])

    def _numbers(self, values: list[float | Tensor]) -> float | Tensor:
        if self._layout == "single":
            return values[0]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Problem:
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
        """The plan in float64, by blocks of rows.

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
        """The plan in the result's dtype, into ``out`` if there is one."""
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
        return Plan.apply(self.source, self) if self.wants_gradient else self.plan()

    def differentiable_value(self) -> float | Tensor:
        return Value.apply(self.source, self) if self.wants_gradient else self.values[1]

    def differentiable_value_linear(self) -> float | Tensor:
        if not self.wants_gradient:
            return self.values[0]
        plan = self.differentiable_plan().double()
        # A forbidden pair has no mass, and 0 times its infinite cost is nothing.
        return (plan * torch.where(plan == 0, 0.0, self.source.double())).sum().cpu()

    @cached_property
    def values(self) -> tuple[float, float]:
        """value_linear and value."""
        linear = entropy = 0.0
        for block, plan in self.blocks():
            # A pair without mass costs nothing, also where it is forbidden; NaN stays NaN.
            paid = torch.where(plan == 0, 0.0, plan * self.cost[block].double())
            linear += float(paid.sum())
            entropy += float(torch.special.xlogy(plan, plan).sum())
        return linear, linear + self.reg * entropy
