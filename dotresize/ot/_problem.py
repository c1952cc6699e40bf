"""One cost, one or several column marginals, solved as a method of POT's ``sinkhorn`` would."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize.ops.arguments import check_flag, check_whole, check_word
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ot._arrays import (
    Arrays,
    linear_loss,
    positive_reg,
    tolerance,
)

_log = logging.getLogger("dotresize.ot")

METHODS = (
    *("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"),
    *("greenkhorn", "sinkhorn_epsilon_scaling"),
)
# Their warm starts and logs hold potentials in units of the cost.
_IN_COST_UNITS = ("sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
# Plan entries that several marginals hold at once; more are solved in turns.
_ENTRIES = 2**24


@dataclass(frozen=True)
class Solved:
    """A solution, in tensors."""

    problem: Problem
    result: Tensor  # the plan (n, m), or for several column marginals the losses (k,)
    f: Tensor  # (k, n), dimensionless
    g: Tensor  # (k, m)
    error: Tensor  # POT's, 0-d
    last: int  # number of the last iteration, from 0
    status: tuple[str, ...]

    def loss(self) -> Tensor:
        if self.problem.several:
            return self.result
        return linear_loss(self.result[None], self.problem.cost)[0]

    def log(self) -> dict[str, Any]:
        """Return POT's keys for this method."""
        problem, method, back = self.problem, self.problem.method, self.problem.arrays.back
        f, g = (self.f.T, self.g.T) if problem.several else (self.f[0], self.g[0])
        scalings = {"u": back(f.exp()), "v": back(g.exp())}
        error = {"err": [back(self.error)]}
        if method == "sinkhorn":
            return {**error, "niter": self.last, **scalings}
        if method == "greenkhorn":
            return {**scalings, "n_iter": self.last}
        if method == "sinkhorn_log":
            logs = {"log_u": back(f), "log_v": back(g), **scalings}
            return logs if problem.several else {**error, "niter": self.last, **logs}
        alpha, beta = back(f * problem.reg), back(g * problem.reg)
        scaled = {**error, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}
        if method == "sinkhorn_epsilon_scaling":
            return {**scaled, "niter": self.last}
        return {**scaled, "n_iter": self.last, "logu": back(f), "logv": back(g)}


@dataclass(frozen=True)
class Problem:
    """Checked arguments."""

    arrays: Arrays
    cost: Tensor  # (n, m)
    a: Tensor  # (n,) float64
    b: Tensor  # (k, m) float64
    reg: float
    method: str
    several: bool  # b was 2-D
    inner: int  # numInnerItermax

    @classmethod
    def checked(
        cls, a: Any, b: Any, M: Any, reg: Any, method: str, methods: tuple[str, ...], options: dict
    ) -> Problem:
        name = method.lower() if isinstance(method, str) else method
        check_word("unknown method", name, methods)
        arrays = Arrays.of(a=a, b=b, M=M)
        cost = arrays.tensor(M)
        if cost.dim() != 2 or cost.numel() == 0:
            raise ValueError(f"M has shape {tuple(cost.shape)}: must be (n, m), with entries")
        rows = _histogram("a", a, cost.shape[0], arrays)
        columns = _histogram("b", b, cost.shape[1], arrays, several=True)
        several = columns.dim() == 2
        if several and name not in METHODS[:3]:
            raise ValueError(f"b has shape {tuple(columns.shape)}: {name} takes one, (m,)")
        number = positive_reg(reg, "ot.emd(a, b, M)")
        inner = check_whole("numInnerItermax", options.get("numInnerItermax", 100), 1)
        columns = columns.T if several else columns[None]
        return cls(arrays, cost, rows, columns, number, name, several, inner)

    def solve(
        self, max_iter: int, stop: float, verbose: bool, warn: bool, warmstart: Any
    ) -> Solved:
        verbose, warn = check_flag("verbose", verbose), check_flag("warn", warn)
        max_iter, stop = check_whole("numItermax", max_iter, 1), tolerance("stopThr", stop)
        stages = [(stop, max_iter)]
        if self.method == "sinkhorn_epsilon_scaling":
            # As POT: 35 rounds at least, each as exact as stop asks; then rounds until the squares
            # are below it.
            more = (math.sqrt(stop / 2), max(0, max_iter - 35) * self.inner)
            stages = [(stop, 35 * self.inner), more]
        start, done = self._start(warmstart), 0
        for tol, iterations in stages:
            if iterations == 0:
                continue
            solved = self._run(start, tol, iterations, stop, done)
            start, done = solved.f, solved.last + 1
            exact = self._alike() and set(solved.status) == {"converged"}
            reached = exact or bool(solved.error < stop)
            if reached:
                break
        if verbose:
            _log.info("%s: error %.3e after iteration %d", self.method, solved.error, solved.last)
        self._warn(solved, stop, warn and not reached)
        return solved

    def _start(self, warmstart: Any) -> Tensor:
        """Return log u, (k, n)."""
        count, n = len(self.b), len(self.a)
        if warmstart is None:
            return self.a.new_zeros(count, n)
        if self.several and self.method == "sinkhorn_log":
            if not isinstance(warmstart, (tuple, list)) or len(warmstart) != count:
                raise ValueError(f"warmstart: must be a list of {count} pairs, one for each b")
            given = [None if pair is None else pair[0] for pair in warmstart]
            zero = self.a.new_zeros(n)
            u = torch.stack([zero if v is None else self.arrays.tensor(v) for v in given])
        else:
            if not isinstance(warmstart, (tuple, list)) or len(warmstart) != 2:
                raise ValueError("warmstart: must be a pair, potentials of a and of b")
            u = self.arrays.tensor(warmstart[0])
            u = u.T if u.dim() == 2 else u
        if u.shape not in ((n,), (count, n)):
            raise ValueError(
                f"warmstart has shape {tuple(u.shape)} for a: must hold {n} potentials"
            )
        u = u.detach().double().to(self.a.device)
        return (u / self.reg if self.method in _IN_COST_UNITS else u).expand(count, n)

    def _run(self, start: Tensor, tol: float, iterations: int, stop: float, done: int) -> Solved:
        """Run the iterations of all columns of b, as many at once as memory allows."""
        cost = self.arrays.working(self.cost, stop)
        step = max(1, _ENTRIES // max(1, cost.numel()))
        results, found, columns = [], [], []
        for k in range(0, len(self.b), step):
            b = self.b[k : k + step]
            scaled = b * (self.a.sum() / b.sum(1, keepdim=True))
            result = self._iterate(cost, scaled, start[k : k + step], tol, iterations)
            plan = result.plan
            found.append(linear_loss(plan, cost) if self.several else plan)
            columns.append(plan.detach().sum(1, dtype=torch.float64))
            results.append(result)
        return Solved(
            problem=self,
            result=torch.cat(found) if self.several else found[0][0],
            f=torch.cat([result.potential_a for result in results]).detach(),
            g=torch.cat([result.potential_b for result in results]).detach(),
            error=self._error(torch.cat(columns)),
            last=done + max(int(result.n_iter.max()) for result in results),
            status=tuple(word for result in results for word in result.status),
        )

    def _iterate(self, cost: Tensor, b: Tensor, u: Tensor, tol: float, iterations: int) -> Any:
        """Run ``iterations`` updates of v, then u; the solver starts with its rows, from v."""
        costs = cost.expand(len(b), *cost.shape)
        given = costs.detach().mT, self.reg, b.detach(), self.a.detach()
        first: Any = sinkhorn(*given, init=(None, u), max_iter=0, tol=0)
        init = (None, first.potential_a.detach())
        return sinkhorn(costs, self.reg, self.a, b, init=init, max_iter=iterations - 1, tol=tol)

    def _alike(self) -> bool:
        """Return whether a and every b have one mass, up to the rounding of their type."""
        mass, masses = self.a.detach().sum(), self.b.detach().sum(1)
        rounding = 1e-12 if self.arrays.dtype == torch.float64 else 1e-5
        return bool(((masses - mass).abs() <= rounding * mass).all())

    def _error(self, columns: Tensor) -> Tensor:
        """Return the norm that this method of POT compares with stopThr; rows are exact."""
        b = self.b.detach()
        if self._alike():
            b = b * (self.a.detach().sum() / b.sum(1, keepdim=True))
        if self.method == "greenkhorn":
            return (columns - b).abs().max()
        norm = torch.linalg.vector_norm(columns - b)
        return norm**2 if self.method == "sinkhorn_epsilon_scaling" else norm

    def _warn(self, solved: Solved, stop: float, warn: bool) -> None:
        level = 4  # the caller of ot.sinkhorn
        if "infeasible" in solved.status:
            text = "Sinkhorn has no solution: a row or column of positive mass has only infinite "
            warnings.warn(text + "costs. The plan is 0.", stacklevel=level)
        elif "invalid" in solved.status:
            text = "Sinkhorn has no solution: M holds NaN or -inf. The plan is NaN."
            warnings.warn(text, stacklevel=level)
        elif warn:
            text = (
                f"Sinkhorn did not converge: error {float(solved.error):.2e} after iteration "
                f"{solved.last}, stopThr={stop}. "
            )
            if self._alike():
                text += "A larger `numItermax` or a larger `reg` may help."
            else:
                masses = ", ".join(f"{mass:.9g}" for mass in self.b.sum(1).tolist()[:9])
                text += f"a sums to {float(self.a.sum()):.9g}, b to {masses}: make them equal."
            warnings.warn(text, stacklevel=level)


def _histogram(name: str, value: Any, length: int, arrays: Arrays, several: bool = False) -> Tensor:
    """Return a histogram, float64 (length,) or (length, k); empty and None are uniform."""
    sized = isinstance(value, (np.ndarray, Tensor))
    if value is None or (value.shape == (0,) if sized else value == []):
        uniform = 1 / max(1, length)
        return torch.full((length,), uniform, dtype=torch.float64, device=arrays.device)
    given = arrays.tensor(value).double()
    shape = tuple(given.shape)
    if shape[:1] != (length,) or given.dim() > (2 if several else 1) or 0 in shape:
        accepted = f"({length},) or ({length}, k)" if several else f"({length},)"
        raise ValueError(f"{name} has shape {shape}: must be {accepted}")
    mass = given.detach().sum(0)
    if not ((given >= 0).all() and (mass > 0).all() and mass.isfinite().all()):
        raise ValueError(f"{name}: entries must be finite and not negative, and some positive")
    return given
