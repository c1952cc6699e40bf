"""Sinkhorn: this project's backends, and its peers, for a fixed number of iterations.

Uniform marginals, costs uniform in [0, 1), reg 0.05. Everyone returns the plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize import BackendError, sinkhorn
from dotresize.ops.backends import choose

from .workload import Case, Competitor, NotHere, Workload, need, need_installed

OURS = "dotresize cpp"
SINGLES = "dotresize cpp, one call each"
REG = 0.05
POINT_DIMENSIONS = 64
MDOT_TOLERANCE = 1e-5  # it counts no iterations, but stops by an error; 1e-4 is accepted of a plan


def _case(problems: int, n: int, m: int, iterations: int) -> Case:
    return Case("sinkhorn", {"problems": problems, "n": n, "m": m, "iterations": iterations})


CASES = [
    _case(1, 576, 468, 100),
    _case(1, 1024, 768, 100),
    _case(30, 576, 464, 20),
    _case(1, 2048, 1536, 20),
    _case(1, 4096, 3072, 20),
    _case(30, 1536, 1152, 10),
]


def build(case: Case, *, peers: bool = True) -> Workload:
    torch.manual_seed(0)
    s = case.sizes
    cost = torch.rand(s["problems"], s["n"], s["m"])
    some = sorted({0, len(cost) // 2, len(cost) - 1})
    truth = plain(cost[some].double(), s["iterations"])

    def error(result: Any) -> float:
        plan = result if isinstance(result, Tensor) else torch.from_numpy(np.array(result))
        plan = plan.reshape(cost.shape)[some].double()
        return float(((plan - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).max())

    work = Workload(error)
    for backend in ("cpp", "triton", "torch") if peers else ("cpp",):
        work.add(f"dotresize {backend}", functools.partial(_ours, cost, s["iterations"], backend))
    if len(cost) > 1:
        work.add(SINGLES, lambda: _singles(cost, s["iterations"]))
    if peers:
        for name, peer in PEERS.items():
            work.add(name, functools.partial(peer, cost, s["iterations"]))
    return work


def _ours(cost: Tensor, iterations: int, backend: str) -> Competitor:
    try:
        choose(backend, cost.device)
    except BackendError as error:
        raise NotHere(str(error)) from None
    return Competitor(
        lambda: sinkhorn(cost, REG, tol=0, max_iter=iterations, backend=backend).plan,
        temporaries=True,
    )


def _singles(cost: Tensor, iterations: int) -> Competitor:
    return Competitor(
        lambda: torch.stack(
            [sinkhorn(c, REG, tol=0, max_iter=iterations, backend="cpp").plan for c in cost]
        ),
        temporaries=True,
    )


def update(k: Tensor, g: Tensor, log_a: float, log_b: float) -> Tensor:
    """Return g after an update of the rows and one of the columns. k: costs over reg."""
    f = log_a - torch.logsumexp(g[:, None, :] - k, 2)
    return log_b - torch.logsumexp(f[:, :, None] - k, 1)


def plain(cost: Tensor, iterations: int, step: Callable[..., Tensor] = update) -> Tensor:
    """Run the textbook loop of two log-sum-exps."""
    k, g = cost / REG, torch.zeros_like(cost[:, 0])
    log_a, log_b = -math.log(cost.shape[1]), -math.log(cost.shape[2])
    for _ in range(iterations):
        g = step(k, g, log_a, log_b)
    f = log_a - torch.logsumexp(g[:, None, :] - k, 2)
    return (f[:, :, None] + g[:, None, :] - k).exp()


def _loop(cost: Tensor, iterations: int) -> Competitor:
    return Competitor(lambda: plain(cost, iterations), temporaries=True)


def _compiled_loop(cost: Tensor, iterations: int) -> Competitor:
    step = torch.compile(update, dynamic=False)
    return Competitor(lambda: plain(cost, iterations, step), temporaries=True)


def _pot(cost: Tensor, iterations: int, as_numpy: bool) -> Competitor:
    ot = need("ot", "POT")
    convert = (lambda v: v.numpy()) if as_numpy else (lambda v: v)
    a, b = (convert(torch.full((size,), 1 / size)) for size in cost.shape[1:])
    costs = [convert(c) for c in cost]
    options = {"method": "sinkhorn_log", "numItermax": iterations, "stopThr": 0, "warn": False}
    return Competitor(
        lambda: torch.stack([torch.as_tensor(ot.sinkhorn(a, b, c, REG, **options)) for c in costs]),
        temporaries=True,
    )


def _pot_batch(cost: Tensor, iterations: int) -> Competitor:
    solve = need("ot.batch", "POT").solve_batch
    a, b = (cost.new_full((len(cost), size), 1 / size) for size in cost.shape[1:])
    return Competitor(
        lambda: solve(cost, REG, a, b, max_iter=iterations, tol=0.0, grad="detach").plan,
        temporaries=True,
    )


def _geomloss(cost: Tensor, iterations: int) -> Competitor:
    ot = need("geomloss.ot", "geomloss")
    if len(cost) > 1:
        call = functools.partial(ot.solve_batch, cost, reg=REG, max_iter=iterations)
    else:
        call = functools.partial(ot.solve, cost[0], reg=REG, max_iter=iterations)
    # It anneals reg over max_iter, so that few iterations leave it further from the plan.
    return Competitor(lambda: call().plan, temporaries=True)


def _ott(cost: Tensor, iterations: int) -> Competitor:
    need("ott", "ott-jax")
    jax = need("jax", "jax")
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    # threshold -1 is never reached; all iterations between two checks, so that it checks once.
    options = {"threshold": -1.0, "min_iterations": iterations, "max_iterations": iterations}
    solver = Sinkhorn(inner_iterations=iterations, **options)

    def plan(c: Any) -> Any:
        return solver(LinearProblem(Geometry(cost_matrix=c, epsilon=REG))).matrix

    run, costs = jax.jit(jax.vmap(plan) if len(cost) > 1 else plan), jax.numpy.from_dlpack(cost)
    costs = costs if len(cost) > 1 else costs[0]

    return Competitor(lambda: run(costs).block_until_ready(), temporaries=True)


def mdot(cost: Tensor, reg: float) -> Callable[[float], tuple[int, Tensor, Tensor]]:
    """Return a solve by mdot-tnt: from a tolerance to its count of operations, f and g.

    Its tolerance follows from the last of its temperatures, gamma, and the exponent p, which its
    public functions fix: at their 1.5 it would be 2e-2 for reg 0.05 of the range. So p is chosen
    here. Uniform marginals are not changed by the smoothing that takes the other half. In float64:
    in float32 a batch that reaches 1e-5 after 1e3 operations may take 8e4, for the same tolerance.
    """
    cost = cost.double()
    solve = need("mdot_tnt.batched", "mdot-tnt")._batched_mdot
    a, b = (cost.new_full((len(cost), size), 1 / size) for size in cost.shape[1:])
    # Costs of at most 1, as it recommends; whole, as it waits for float32 to arrive there.
    gamma = float(max(16, math.ceil(float(cost.max()) / reg)))

    def run(tol: float) -> tuple[int, Tensor, Tensor]:
        p = math.log(math.log(min(cost.shape[1:])) / (2 * tol)) / math.log(gamma)
        f, g, _, count, _ = solve(a, b, cost / (reg * gamma), gamma, p=p)
        return count, f, g

    return run


def _mdot(cost: Tensor, iterations: int) -> Competitor:
    solve = mdot(cost, REG)

    def call() -> Tensor:
        _, f, g = solve(MDOT_TOLERANCE)
        return (f[:, :, None] + g[:, None, :] - cost / REG).exp()

    return Competitor(call, temporaries=True)


def _keops(cost: Tensor, iterations: int) -> Competitor:
    need_installed("pykeops")
    raise NotHere("computes costs from points by a formula; an explicit cost cannot be given")


def _flash(cost: Tensor, iterations: int) -> Competitor:
    need_installed("flash-sinkhorn")
    raise NotHere("computes squared Euclidean costs from points on a GPU; no explicit cost")


def flash_from_points(n: int, m: int, iterations: int, device: torch.device) -> Competitor:
    """Return another problem than the others': squared Euclidean costs of points, on a GPU.

    Compared with float64 here, as its truth is not the others'; no matrix is read or kept.
    """
    module = need("flash_sinkhorn.sinkhorn_solvers", "flash-sinkhorn")
    x, y = (torch.randn(size, POINT_DIMENSIONS, device=device) for size in (n, m))
    a, b = (torch.full((size,), 1 / size, device=device) for size in (n, m))
    cost = torch.cdist(x.double(), y.double()).square()[None]
    eps = REG * float(cost.mean())
    call = functools.partial(
        module.sinkhorn_flashstyle_alternating,
        *(x, y, a, b),
        **{"eps": eps, "n_iters": iterations, "allow_tf32": False},
    )
    f, g = call()
    plan = ((f.double()[:, None] + g.double() - cost[0]) / eps).exp() / (n * m)
    truth = plain(cost * (REG / eps), iterations)[0]
    error = float((plan - truth).norm() / truth.norm())
    if not error <= 0.1:  # as for all that end on another update
        raise ArithmeticError(f"relative error {error:.1e}")
    return Competitor(call, checked=False)


PEERS: dict[str, Callable[[Tensor, int], Competitor]] = {
    "torch logsumexp loop": _loop,
    "torch logsumexp loop, torch.compile": _compiled_loop,
    "POT sinkhorn_log, numpy": functools.partial(_pot, as_numpy=True),
    "POT sinkhorn_log, torch": functools.partial(_pot, as_numpy=False),
    "POT ot.batch": _pot_batch,
    "GeomLoss": _geomloss,
    "OTT-JAX, jit": _ott,
    "mdot-tnt": _mdot,
    "KeOps": _keops,
    "flash-sinkhorn": _flash,
}
