"""One solved Sinkhorn problem: its plan and its values; derivatives are in sinkhorn_gradient.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dotresize.ops.arguments import address
from dotresize.ops.backends import cpp, threads
from dotresize.ops.sinkhorn_gradient import plan_of, value_of

STATUS_WORDS = ("converged", "max_iter", "infeasible", "invalid")


@dataclass(frozen=True, eq=False)
class SolvedProblem:
    """One solved problem; the cost is the caller's tensor, not a copy."""

    source: Tensor  # (n, m); like a and b it may require a gradient
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
        return any(v.requires_grad for v in (self.source, self.a, self.b))

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
            f, g = self.f.contiguous(), self.g.contiguous()
            cpp().plan(
                n=self.cost.shape[0],
                m=self.cost.shape[1],
                cost=address(self.cost, self.dtype),
                stride=self.cost.stride(0),
                reg=self.reg,
                f=address(f, torch.float64),
                g=address(g, torch.float64),
                out=address(out, self.dtype),
                use_float64=self.dtype == torch.float64,
                num_threads=threads(),
            )
            return out
        for block, values in self.blocks():
            out[block] = values
        return out

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.source, self.a, self.b

    def differentiable_plan(self) -> Tensor:
        return plan_of(*self._inputs, self) if self.wants_gradient else self.plan()

    def differentiable_value(self) -> float | Tensor:
        return value_of(*self._inputs, self) if self.wants_gradient else self.values[1]

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
