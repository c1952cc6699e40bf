"""What a Sinkhorn solve returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dotresize.ops.arguments import shown
from dotresize.ops.solved_problem import SolvedProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    The plan and both values are differentiable, once, by those of cost, a and b that require a
    gradient (a single problem's values are then tensors): through the fixed point, exact to the
    marginal error, at the price of one (m, m) solve in float64 for the plan and none for ``value``
    (sinkhorn_gradient.py). Gradients of a and b are those at which b's mass does not count, as it
    is scaled to a's; where a marginal is 0, they are 0. The potentials are constants.

    Example:
        >>> import torch
        >>> from dotresize import sinkhorn
        >>> result = sinkhorn([torch.rand(4, 3), torch.rand(5, 2)], reg=0.1)
        >>> len(result), result[1].plan.shape, result[1].converged
        (2, torch.Size([5, 2]), True)
    """

    potentials: tuple
    n_iter: int | Tensor
    marginal_error: float | Tensor
    converged: bool | Tensor
    status: str | tuple[str, ...]
    _problems: tuple[SolvedProblem, ...]
    _layout: str  # "single", "batch" or "ragged"

    @classmethod
    def collect(cls, problems: list[SolvedProblem], layout: str) -> SinkhornResult:
        """Return the result of solved problems, in the layout of the caller's cost."""
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
            _on_cpu([problem.n_iter for problem in problems], torch.int64),
            _on_cpu([problem.marginal_error for problem in problems], torch.float64),
            _on_cpu([problem.status == "converged" for problem in problems], torch.bool),
            tuple(problem.status for problem in problems),
            tuple(problems),
            layout,
        )

    def __getitem__(self, index: int) -> SinkhornResult:
        number = index if isinstance(index, Integral) else None
        count = len(self)
        if number is None:
            raise TypeError(f"problem {shown(index)}: must be an integer")
        if not -count <= number < count:
            raise IndexError(f"problem {shown(index)}: there are {count}")
        return SinkhornResult.collect([self._problems[int(number)]], "single")

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
        """The row potentials f, by POT's name."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Tensor | tuple[Tensor, ...]:
        """The column potentials g, by POT's name."""
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

    def plot(self) -> Figure:
        """Draw one problem: its plan, the errors of its marginals, and its convergence.

        Convergence is the marginal error after 1, 2, 4, ... ``n_iter`` iterations from zero,
        accelerated and plain, each a solve of its own: some four times the work of the solve.

        Returns:
            A matplotlib figure, which a notebook shows and ``savefig`` writes.

        Raises:
            ValueError: the result is of several problems (``result[i].plot()`` draws one), or has
                no plan.
            ImportError: matplotlib is not installed (``pip install 'dotresize[plot]'``).

        Example:
            >>> import torch
            >>> from dotresize import sinkhorn
            >>> figure = sinkhorn(torch.rand(6, 30, 20), reg=0.1)[2].plot()
            >>> [axis.get_xlabel() for axis in figure.axes[:3]]
            ['column', 'row, column', 'iterations']
        """
        from dotresize.ops.sinkhorn_plot import draw

        if self._layout != "single":
            raise ValueError(f"a result of {len(self)} problems: result[i].plot() draws one")
        return draw(self._problems[0])

    def _numbers(self, values: list[float | Tensor]) -> float | Tensor:
        if self._layout == "single":
            return values[0]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack(
                [torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values]
            )
        return _on_cpu(values, torch.float64)


def _on_cpu(values: list, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")
