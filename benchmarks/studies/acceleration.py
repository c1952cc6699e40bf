"""``python -m benchmarks.studies.acceleration``: iterations and time to a tolerance, on real costs.

The cost of the demo's model: L1 between 576 neurons and its 468 largest, over RMS-normalised tokens
of the demo's calibration text, averaged over all norms (what ``compress`` solves). Everyone works
in float64, from zero, until the L1 error of the marginals is at most the tolerance; peers that look
at an L2 norm are given the tolerance that guarantees it, and mdot-tnt, whose tolerance follows from
reg by an exponent, the exponent that gives it. Its iterations are passes over the cost. With
``--out FILE`` JSON lines are appended; times are medians of three after a warm-up, of one where
that takes over 2 s.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize import l1_cost, sinkhorn

from ..rows import append, where
from ..workload import NotHere, need
from .precision import real_activations

RATIOS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TOLERANCES = (1e-3, 1e-5, 1e-7)
KEPT = 468
MAX_ITER = 3000
# reg, tol -> iterations and the plan
Solver = Callable[[float, float], tuple[int, Tensor]]


def location_costs() -> Tensor:
    """Return the float32 costs of all norms, (L, 576, 468), between all and the largest neurons."""
    streams = [x / x.square().mean(1, keepdim=True).sqrt() for x in real_activations()]
    importance = torch.stack([x.abs().mean(0) for x in streams]).mean(0)
    kept = importance.topk(KEPT).indices.sort().values
    return torch.stack([l1_cost(x, targets=kept) for x in streams])


def real_costs() -> tuple[Tensor, Tensor]:
    """Return float64 costs: (576, 468), the mean over all norms, and (2, 576, 468) of two norms."""
    costs = location_costs().double()
    middle = len(costs) // 2
    return costs.mean(0), costs[middle : middle + 2]


def ours(cost: Tensor, **options: Any) -> Solver:
    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        result = sinkhorn(cost, reg, tol=tol, max_iter=MAX_ITER, **options)
        return result.n_iter, result.plan

    return solve


def warm(cost: Tensor, other: Tensor, times: float = 1.0) -> Solver:
    """Start from the solution of another cost, at so many times the reg, which is not counted."""
    starts: dict[float, Any] = {}

    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        if reg not in starts:
            starts[reg] = sinkhorn(other, times * reg, tol=1e-5, max_iter=MAX_ITER)
        result = sinkhorn(cost, reg, tol=tol, max_iter=MAX_ITER, init=starts[reg])
        return result.n_iter, result.plan

    return solve


def pot(cost: Tensor) -> Solver:
    ot, (n, m) = need("ot", "POT"), cost.shape
    a, b, costs = np.full(n, 1 / n), np.full(m, 1 / m), cost.numpy()
    options = {"method": "sinkhorn_log", "numItermax": MAX_ITER, "warn": False, "log": True}

    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        plan, log = ot.sinkhorn(a, b, costs, reg, stopThr=tol / math.sqrt(m), **options)
        return int(log["niter"]) + 1, torch.from_numpy(plan)

    return solve


def pot_batch(cost: Tensor) -> Solver:
    solve_batch, (n, m) = need("ot.batch", "POT").solve_batch, cost.shape
    a, b = cost.new_full((1, n), 1 / n), cost.new_full((1, m), 1 / m)

    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        options = {"max_iter": MAX_ITER, "tol": tol / math.sqrt(n), "grad": "detach"}
        result = solve_batch(cost[None], reg, a, b, **options)
        return int(result.log["n_iter"]) + 1, result.plan[0]

    return solve


def ott(cost: Tensor, **acceleration: Any) -> Solver:
    need("ott", "ott-jax")
    jax = need("jax", "jax")
    jax.config.update("jax_enable_x64", True)
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import acceleration as kinds
    from ott.solvers.linear.sinkhorn import Sinkhorn

    made = {name: getattr(kinds, kind)(**given) for name, (kind, given) in acceleration.items()}

    @jax.jit
    def run(c: Any, reg: Any, tol: Any) -> tuple[Any, Any]:
        solver = Sinkhorn(threshold=tol, max_iterations=MAX_ITER, inner_iterations=10, **made)
        out = solver(LinearProblem(Geometry(cost_matrix=c, epsilon=reg)))
        return out.n_iters, out.matrix

    costs = jax.numpy.asarray(cost.numpy())

    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        count, plan = run(costs, reg, tol)
        return int(count), torch.from_numpy(np.array(plan))

    return solve


def mdot(cost: Tensor) -> Solver:
    need("mdot_tnt", "mdot-tnt")
    from mdot_tnt.mdot import mdot as project

    n, m = cost.shape
    a, b, top = cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m), cost.max()
    scaled = cost / top

    def solve(reg: float, tol: float) -> tuple[int, Tensor]:
        gamma = float(top) / reg
        exponent = math.log(math.log(min(n, m)) / tol) / math.log(gamma)
        u, v, reached, count, _ = project(a, b, scaled, gamma, p=exponent)
        return count, (u[:, None] + v - reached * scaled).exp()

    return solve


def solvers(cost: Tensor, layers: Tensor) -> Iterator[tuple[str, Callable[[], Solver]]]:
    yield "momentum", lambda: ours(cost)
    yield "plain", lambda: ours(cost, acceleration="none")
    yield "plain, schedule", lambda: ours(cost, acceleration="none", schedule=(64, 8))
    yield "momentum, schedule", lambda: ours(cost, schedule=(64, 8))
    yield "momentum, from 2 reg", lambda: warm(cost, cost, 2)
    yield "momentum, one layer", lambda: ours(layers[1])
    yield "momentum, from the layer before", lambda: warm(layers[1], layers[0])
    # Built for the plain reference only, so its times say nothing about the others.
    yield "Anderson", lambda: ours(cost, backend="torch", acceleration="anderson")
    yield "POT sinkhorn_log", lambda: pot(cost)
    yield "POT ot.batch", lambda: pot_batch(cost)
    yield "OTT", lambda: ott(cost)
    adaptive = {"start": 100, "inner_iterations": 10}
    yield "OTT, adaptive momentum", lambda: ott(cost, momentum=("Momentum", adaptive))
    memory = {"memory": 5, "refresh_every": 1}
    yield "OTT, Anderson", lambda: ott(cost, anderson=("AndersonAcceleration", memory))
    yield "mdot-tnt", lambda: mdot(cost)


def error(plan: Tensor) -> float:
    """Return the larger L1 distance of the plan's marginals from uniform."""
    return max(float((plan.sum(d) - 1 / plan.shape[1 - d]).abs().sum()) for d in (0, 1))


def timed(solve: Solver, reg: float, tol: float) -> dict[str, Any]:
    took = []
    for _ in range(4):
        start = time.perf_counter()
        iterations, plan = solve(reg, tol)
        took.append(time.perf_counter() - start)
        if took[-1] > 2:
            break
    reached = error(plan)
    row: dict[str, Any] = {"iterations": iterations, "error": reached, "reached": reached <= tol}
    return row | {"seconds": statistics.median(took[1:] or took)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--only", default="", help="solvers whose name has this word")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    cost, layers = real_costs()
    mean, about = float(cost.mean()), where(torch.get_num_threads())
    rows = []
    for name, build in solvers(cost, layers):
        if arguments.only not in name:
            continue
        try:
            solve = build()
        except NotHere as reason:
            print(f"{name}: {reason}")
            continue
        for ratio in RATIOS:
            for tol in TOLERANCES:
                row = {"solver": name, "ratio": ratio, "tol": tol}
                row |= timed(solve, ratio * mean, tol)
                rows.append(about | row)
                print(*(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
                if not row["reached"]:
                    break  # nor is a smaller one
    if arguments.out is not None:
        append(arguments.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
