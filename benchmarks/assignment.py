"""Linear assignment: this project's backends, and its peers.

Scores are uniform numbers, integers with many ties, or correlations between the activations of two
sets of neurons: noisy, permuted copies of one set, or sets that share nothing but their inputs.
Peers get float64 costs, already negated, as they solve those fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize import BackendError, assignment
from dotresize.ops.assignment_launch import backend_for

from .workload import Case, Competitor, NotHere, Workload, need

TOKENS, FACTORS = 2048, 256
GPU_PEER = "torch-linear-assignment"
EXACT = 1e-12  # relative to the optimum: float64's rounding of a sum


def _case(kind: str, problems: int, n: int, m: int | None = None) -> Case:
    return Case("assignment", {"problems": problems, "n": n, "m": n if m is None else m}, kind)


CASES = [
    _case("unrelated neurons", 1, 64),
    *(_case(kind, 1, 512) for kind in ("noisy copies", "unrelated neurons")),
    *(_case(kind, 1, 1536) for kind in ("uniform", "integers below 100")),
    *(_case(kind, 1, 1536) for kind in ("noisy copies", "unrelated neurons")),
    *(_case(kind, 1, 2048) for kind in ("uniform", "unrelated neurons")),
    *(_case(kind, 30, 1536) for kind in ("noisy copies", "unrelated neurons")),
    # A user of torch-linear-assignment reported that this took it 26.7 s of a GPU, and scipy 1.2 s.
    _case("uniform", 5, 1024),
    *(_case(kind, 30, 1024, 1536) for kind in ("noisy copies", "unrelated neurons")),
]


def build(case: Case, *, peers: bool = True) -> Workload:
    torch.manual_seed(0)
    n, m, problems = (case.sizes[name] for name in ("n", "m", "problems"))
    score = torch.stack([score_of(case.kind, max(n, m))[:n, :m] for _ in range(problems)])
    costs = [(-problem).double().numpy() for problem in score]
    some = sorted({0, len(costs) // 2, len(costs) - 1})
    solve = need("scipy.optimize", "scipy").linear_sum_assignment
    best = {i: costs[i][solve(costs[i])].sum() for i in some}

    def error(result: Any) -> float:
        worst = 0.0
        for i in some:
            columns = np.asarray(result[i])
            distinct = len(np.unique(columns)) == len(columns) == n
            if not distinct or columns.min() < 0 or columns.max() >= m:
                return float("inf")
            value = costs[i][np.arange(len(columns)), columns].sum()
            worst = max(worst, abs(value - best[i]) / abs(best[i]))
        return worst

    work = Workload(error)
    for backend in ("cpp", "triton") if peers else ("cpp",):  # torch is scipy, below
        work.add(f"dotresize {backend}", functools.partial(_ours, score, backend))
    if peers:
        for name, peer in PEERS.items():
            work.add(name, functools.partial(peer, costs))
    return work


def score_of(kind: str, n: int) -> Tensor:
    """Return an (n, n) score of a kind that CASES name."""
    if kind == "uniform":
        return torch.rand(n, n)
    if kind == "integers below 100":
        return torch.randint(0, 100, (n, n)).float()
    # Inputs of a decaying spectrum, random weights, noise, ReLU.
    inputs = torch.randn(TOKENS, FACTORS) * torch.arange(1, FACTORS + 1) ** -0.5
    first = inputs @ torch.randn(FACTORS, n) + 0.5 * torch.randn(TOKENS, n)
    second = inputs @ torch.randn(FACTORS, n) + 0.5 * torch.randn(TOKENS, n)
    if kind == "noisy copies":
        second = first[:, torch.randperm(n)] + torch.randn(TOKENS, n)
        first = first + torch.randn(TOKENS, n)
    sides = [side.relu() - side.relu().mean(0) for side in (first, second)]
    return (sides[0] / sides[0].norm(dim=0)).T @ (sides[1] / sides[1].norm(dim=0))


def _ours(score: Tensor, backend: str) -> Competitor:
    try:
        backend_for(backend, score.device, score.shape[-1])
    except BackendError as error:
        raise NotHere(str(error)) from None
    return Competitor(lambda: assignment(score, backend=backend), accepted=EXACT)


def _scipy(costs: list[np.ndarray]) -> Competitor:
    solve = need("scipy.optimize", "scipy").linear_sum_assignment
    return Competitor(lambda: [solve(cost)[1] for cost in costs], accepted=EXACT)


def _scipy_threads(costs: list[np.ndarray]) -> Competitor:
    solve = need("scipy.optimize", "scipy").linear_sum_assignment
    if len(costs) == 1:
        raise NotHere("one problem runs on one thread")
    pool = ThreadPoolExecutor(torch.get_num_threads())
    return Competitor(lambda: [found[1] for found in pool.map(solve, costs)], accepted=EXACT)


def _lapx(costs: list[np.ndarray]) -> Competitor:
    solve = need("lap", "lapx").lapjv
    given = {"return_cost": False, "extend_cost": costs[0].shape[0] != costs[0].shape[1]}
    return Competitor(lambda: [solve(cost, **given)[0] for cost in costs], accepted=EXACT)


def _lap_batch(package: str, costs: list[np.ndarray]) -> Competitor:
    """Call lapcpp or laprust, which are lapx's solvers in packages of their own, with threads."""
    solve, batch = need(package, package).lapjv_batch, np.stack(costs)
    given = {"extend_cost": True, "return_cost": False, "n_threads": torch.get_num_threads()}
    return Competitor(lambda: solve(batch, **given)[1], accepted=EXACT)


def _fastlap(costs: list[np.ndarray]) -> Competitor:
    solve, batch = need("fastlap", "fastlap").solve_lap_batch, np.stack(costs)
    threads = torch.get_num_threads()
    return Competitor(
        lambda: [found[1] for found in solve(batch, "lapjv", n_threads=threads)], accepted=EXACT
    )


def _torch_linear_assignment(costs: Sequence[np.ndarray | Tensor]) -> Competitor:
    """Call scipy on a CPU, and its own kernel on a GPU, one program for each problem."""
    solve = need("torch_linear_assignment", "torch-linear-assignment").batch_linear_assignment
    batch = torch.stack([torch.as_tensor(cost) for cost in costs])
    return Competitor(lambda: solve(batch), accepted=EXACT)


PEERS: dict[str, Callable[[list[np.ndarray]], Competitor]] = {
    "scipy": _scipy,
    "scipy, threads": _scipy_threads,
    "lapx lapjv": _lapx,
    "lapcpp": functools.partial(_lap_batch, "lapcpp"),
    "laprust": functools.partial(_lap_batch, "laprust"),
    "fastlap": _fastlap,
    GPU_PEER: _torch_linear_assignment,
}
