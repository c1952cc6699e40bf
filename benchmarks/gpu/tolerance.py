"""Time to a tolerance: whole solves to the potentials, each result checked in float64.

The costs are those of activations that share 32 factors and whose columns differ in scale: L1
between all neurons and the largest of them. Everyone starts from zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dotresize import l1_cost, sinkhorn

from .. import sinkhorn as solver
from ..workload import Competitor, Workload, need
from .times import Clock, Row

TOKENS, FACTORS = 1024, 32
MAX_ITER = 5000
CHECK_EVERY = 10  # iterations of a peer between two looks at its error
AT_ONCE = 1e6  # a tolerance that the first look finds reached: what is compiled is compiled by then
# What each one's tolerance, and its count of iterations, is.
MEANS = {
    "dotresize exact": "L1 error of the columns, rows exact, looked at in every iteration",
    "dotresize u16": "the same, of the cost in 16 bits; the error shown is of the cost itself",
    "torch loop, torch.compile": "L1 error of the columns, looked at every 10 iterations",
    "OTT-JAX, jit": "L1 error of the marginals, looked at every 10 iterations",
    "mdot-tnt": "L1 error of the rows, columns exact; its iterations are operations on the matrix, "
    "as it counts them",
}


class Solved(NamedTuple):
    n_iter: int
    dtype: torch.dtype
    plan: Callable[[int], Tensor]  # of one problem, in float64


Solve = Callable[[float], Solved]  # to a tolerance


def rows(
    shape: tuple[int, int, int], ratio: float, tol: float, clock: Clock, peers: bool
) -> list[Row]:
    """Return seconds, iterations and the marginal error of everyone, at reg = ratio * mean cost.

    In float32; in float64 and without 16-bit storage for a tolerance that float32 cannot reach.
    """
    double = tol < 1e-6
    cost = costs(shape, clock.device)
    cost = cost.double() if double else cost
    reg = ratio * float(cost.mean())
    builds: dict[str, Callable[[], Solve]] = {"dotresize exact": lambda: _ours(cost, reg, "exact")}
    if not double:
        builds["dotresize u16"] = lambda: _ours(cost, reg, "u16")
    for name, peer in PEERS.items() if peers else ():
        builds[name] = functools.partial(peer, cost, reg)
    solved: dict[str, Solved] = {}

    def prepared(name: str, build: Callable[[], Solve]) -> Competitor:
        solve = build()
        solve(AT_ONCE)

        def call() -> Solved:
            solved[name] = solve(tol)
            return solved[name]

        return Competitor(call, accepted=math.inf)

    work = Workload(lambda result: _marginal_error(result, shape))
    for name, build in builds.items():
        work.add(name, functools.partial(prepared, name, build))
    found = clock.race(work, prepared=True)
    for row in found:
        if "median_s" in row:
            result = solved[row["name"]]
            row |= {"iterations": result.n_iter, "reached": row["error"] <= tol}
            row["dtype"] = str(result.dtype).removeprefix("torch.")
            row["means"] = next(
                text for name, text in MEANS.items() if row["name"].startswith(name)
            )
    return found


def costs(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return float32 costs (problems, n, m) between neurons and their m largest."""
    problems, n, m = shape
    made = []
    for _ in range(problems):
        shared = torch.randn(TOKENS, FACTORS, device=device)
        x = shared @ torch.randn(FACTORS, n, device=device) / 6
        x = (x + 0.7 * torch.randn(TOKENS, n, device=device)) * (
            0.5 * torch.randn(n, device=device)
        ).exp()
        kept = x.abs().mean(0).topk(m).indices.sort().values
        made.append(l1_cost(x, targets=kept))
    return torch.stack(made)


def _marginal_error(result: Solved, shape: tuple[int, int, int]) -> float:
    """Return the largest L1 distance of a plan's marginals from uniform ones."""
    worst = 0.0
    for i in range(shape[0]):
        plan = result.plan(i)
        for d in (0, 1):
            error = float((plan.sum(d) - 1 / shape[2 - d]).abs().sum())
            worst = max(worst, error) if error == error else math.inf
        del plan
    return worst


def _from_potentials(cost: Tensor, reg: float, n_iter: int, f: Tensor, g: Tensor) -> Solved:
    """Return the solution of dimensionless potentials (problems, n) and (problems, m)."""

    def plan(i: int) -> Tensor:
        return (f[i].double()[:, None] + g[i].double() - cost[i].double() / reg).exp()

    return Solved(n_iter, f.dtype, plan)


def _ours(cost: Tensor, reg: float, storage: str) -> Solve:
    def solve(tol: float) -> Solved:
        options: dict[str, Any] = {"storage": storage, "backend": "triton"}
        result = sinkhorn(cost, reg, tol=tol, max_iter=MAX_ITER, **options)
        return Solved(int(result.n_iter.max()), cost.dtype, lambda i: result[i].plan.double())

    return solve


def _loop(cost: Tensor, reg: float) -> Solve:
    step = torch.compile(solver.update, dynamic=False)
    log_a, log_b = -math.log(cost.shape[1]), -math.log(cost.shape[2])

    def solve(tol: float) -> Solved:
        k, g = cost / reg, torch.zeros_like(cost[:, 0])
        for count in range(1, MAX_ITER + 1):
            before, g = g, step(k, g, log_a, log_b)
            # An update divides each column by its sum, which its change therefore tells.
            if count % CHECK_EVERY == 0 and float(_change(before, g)) <= tol:
                break
        f = log_a - torch.logsumexp(g[:, None, :] - k, 2)
        return _from_potentials(cost, reg, count, f, g)

    return solve


def _change(before: Tensor, g: Tensor) -> Tensor:
    return torch.expm1(before - g).abs().mean(1).max()


def _ott(cost: Tensor, reg: float) -> Solve:
    need("ott", "ott-jax")
    jax = need("jax", "jax")
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    jax.config.update("jax_enable_x64", cost.dtype == torch.float64)

    def one(c: Any, tol: Any) -> tuple[Any, Any, Any]:
        made = Sinkhorn(threshold=tol, max_iterations=MAX_ITER, inner_iterations=CHECK_EVERY)
        out = made(LinearProblem(Geometry(cost_matrix=c, epsilon=reg)))
        return out.n_iters, out.f, out.g

    single = len(cost) == 1
    run = jax.jit(one if single else jax.vmap(one, in_axes=(0, None)))
    given = jax.numpy.from_dlpack(cost[0] if single else cost)

    def solve(tol: float) -> Solved:
        count, *potentials = jax.block_until_ready(run(given, tol))
        f, g = (
            torch.from_numpy(np.array(v)).to(cost.device).view(len(cost), -1) / reg
            for v in potentials
        )
        return _from_potentials(cost, reg, int(np.max(count)), f, g)

    return solve


def _mdot(cost: Tensor, reg: float) -> Solve:
    run = solver.mdot(cost, reg)

    def solve(tol: float) -> Solved:
        count, f, g = run(tol)
        return _from_potentials(cost, reg, count, f, g)

    return solve


PEERS: dict[str, Callable[[Tensor, float], Solve]] = {
    "torch loop, torch.compile": _loop,
    "OTT-JAX, jit": _ott,
    "mdot-tnt": _mdot,
}
