"""Random problems against float64: ``python -m benchmarks.checks.fuzz --problems 20000 --seed 0``.

Shapes, strides, types, scales, marginals with zeros, forbidden pairs, bad entries and batches are
drawn at random; every problem is drawn from its own seed, which a difference is reported with. Each
promise of a result is checked in float64 from the potentials it returned.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from dotresize import assignment, l1_cost, sinkhorn

from ..rows import append, where

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return float(self.uniform(1)) < probability

    def one_of(self, *choices):
        return choices[self.integer(0, len(choices) - 1)]

    def strided(self, values: Tensor) -> Tensor:
        """Return the same numbers, at random strides."""
        kind = self.integer(0, 3)
        if kind == 0:
            return values.mT.contiguous().mT
        if kind == 1:
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan)
            wide[..., 1::2] = values
            return wide[..., 1::2]
        if kind == 2:
            wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), torch.nan)
            wide[..., 3:] = values
            return wide[..., 3:]
        return values

    def marginal(self, size: int) -> Tensor:
        weight = self.uniform(size) ** self.one_of(0, 1, 8) + 1e-6
        weight[self.uniform(size) < self.one_of(0.0, 0.0, 0.3)] = 0
        weight[self.integer(0, size - 1)] += 0.5
        return weight / weight.sum() * self.one_of(1.0, 1.0, 7.5)


def check_l1(draw: Draw) -> str | None:
    tokens, n, m = draw.integer(1, 300), draw.integer(1, 40), draw.integer(1, 40)
    dtype = draw.one_of(torch.float32, torch.float16, torch.bfloat16)
    scale = draw.one_of(1e-3, 1.0, 1e3)
    x, y = (draw.strided((draw.uniform(2, tokens, k) * scale).to(dtype)) for k in (n, m))
    found = l1_cost(x, y, backend=draw.one_of("cpp", "torch")).double()
    truth = torch.cdist(x.double().mT, y.double().mT, p=1) / tokens
    worst = float((found - truth).abs().max() / truth.max().clamp(min=1e-300))
    # float32 sums of up to 256 tokens: 1.1e-6 was the worst of 8000 problems.
    return None if worst <= 2e-6 else f"l1 cost off by {worst:.2g} of the largest"


def check_assignment(draw: Draw) -> str | None:
    n = draw.integer(1, 40)
    dtype = draw.one_of(torch.float32, torch.float64)
    score = draw.uniform(n, n) * draw.one_of(1e-4, 1.0, 1e5)
    if draw.chance(0.4):
        score = (draw.uniform(n, n) * draw.one_of(3, 50, 1e6)).floor()
    score = draw.strided((score - draw.one_of(0.0, 0.3)).to(dtype))
    maximize = draw.chance(0.5)
    columns, proof = assignment(score, maximize=maximize, certificate=True)
    wide = score.double().numpy()
    rows, theirs = linear_sum_assignment(wide, maximize=maximize)
    apart = abs(wide[rows, columns.numpy()].sum() - wide[rows, theirs].sum())
    allowed = 1e-12 * abs(wide).sum()
    if len(set(columns.tolist())) < n or apart > allowed:
        return f"assignment worse by {apart:.3g}"
    return None if abs(float(proof.gap)) <= allowed else f"certificate has a gap of {proof.gap}"


def check_sinkhorn(draw: Draw) -> str | None:
    """Check a single problem, or one of a ragged list whose others are whatever they are."""
    n, m = draw.integer(1, 40), draw.integer(1, 40)
    dtype = draw.one_of(torch.float32, torch.float64)
    scale = draw.one_of(1e-6, 1.0, 1e6)
    cost = draw.uniform(n, m) ** draw.one_of(1, 4)
    cost += draw.uniform(n, 1) * draw.one_of(0, 3) + draw.uniform(1, m) * draw.one_of(0, 3)
    cost *= scale
    cost[draw.uniform(n, m) < draw.one_of(0.0, 0.0, 0.2, 0.8)] = torch.inf
    if draw.chance(0.05):
        cost[draw.integer(0, n - 1), draw.integer(0, m - 1)] = draw.one_of(torch.nan, -torch.inf)
    cost = draw.strided(cost.to(dtype))
    a, b = draw.marginal(n), draw.marginal(m)
    b *= a.sum() / b.sum()
    reg = scale * 10 ** (3.5 * float(draw.uniform(1)) - 2.5)
    tol = draw.one_of(0.0, 1e-3, 1e-5)
    options = {"backend": draw.one_of("cpp", "cpp", "torch"), "tol": tol, "max_iter": 200}
    if draw.chance(0.3):
        options["schedule"] = (8.0, 2.0)
    if draw.chance(0.5):
        result = sinkhorn(cost, reg, a, b, **options)
    else:
        bad = torch.full((draw.integer(1, 9), 3), draw.one_of(0.5, torch.nan, torch.inf)).to(dtype)
        uniform = [torch.full((k,), 1.0 / k, dtype=torch.float64) for k in bad.shape]
        results = sinkhorn([bad, cost], reg, [uniform[0], a], [uniform[1], b], **options)
        result = results[1]
    return judge(result, cost.double(), a, b, reg, tol, options)


def judge(
    result, cost: Tensor, a: Tensor, b: Tensor, reg: float, tol: float, options
) -> str | None:
    mass = float(a.sum())
    status = expected_status(cost, a, b)
    if status or result.status in ("invalid", "infeasible"):
        return None if result.status == status else f"status {result.status}, not {status}"
    f, g = (problem.double() for problem in (result._problems[0].f, result._problems[0].g))
    plan = (f[:, None] + g - cost / reg).exp()
    floor = mass * resolution(cost, a, b, reg, f, g, EPS[result.plan.dtype])
    rows, columns = (float(v.abs().sum()) for v in (plan.sum(1) - a, plan.sum(0) - b))
    if not rows <= floor:
        return f"rows off by {rows:.3g}, more than {floor:.3g}"
    if not abs(columns - result.marginal_error) <= floor:
        return f"column error {columns:.3g} reported as {result.marginal_error:.3g}"
    if result.converged != (tol > 0 and result.marginal_error <= tol):
        return f"converged {result.converged} at {result.marginal_error:.3g}, tol {tol:g}"
    if not float((result.plan.double() - plan).abs().sum()) <= floor:
        return "the plan is not that of the potentials"
    if (result.plan[a == 0] != 0).any() or (result.plan[:, b == 0] != 0).any():
        return "mass where there is none"
    if tol == 0 and "schedule" not in options:
        # The same plain iterations in float64.
        truth = sinkhorn(cost, reg, a, b, tol=0.0, max_iter=200, backend="torch")
        apart = float((truth.plan - plan).abs().sum())
        if result.n_iter != 200 or apart > 20 * floor:
            return (
                f"{result.n_iter} iterations, plan off by {apart:.3g}, more than {20 * floor:.3g}"
            )
    return None


def resolution(cost, a, b, reg: float, f: Tensor, g: Tensor, eps: float) -> float:
    """Return what the type cannot tell apart in a plan of mass 1, by rounding."""
    rest = cost - torch.where(b > 0, cost, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0)
    exponent = float(rest[rest.isfinite()].abs().max()) / reg
    if (cost == torch.inf).any():
        # Where no plan has that support, potentials grow without end, and lose digits as they do.
        exponent = max(exponent, float(g[b > 0].abs().max()))
    # The check itself adds up f, g and the whole cost in float64.
    terms = (f[a > 0], g[b > 0], cost[cost.isfinite()] / reg)
    largest = max(float(v.abs().max()) for v in terms)
    return eps * (4 * exponent + 40) + EPS[torch.float64] * 4 * largest


def expected_status(cost: Tensor, a: Tensor, b: Tensor) -> str | None:
    if (cost.isnan() | (cost == -torch.inf)).any():
        return "invalid"
    free = cost.isfinite()
    stuck_rows = (a > 0) & ~(free & (b > 0)).any(1)
    stuck_columns = (b > 0) & ~(free & (a > 0)[:, None]).any(0)
    return "infeasible" if (stuck_rows.any() or stuck_columns.any()) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the summary here as a JSON line")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the problems are small
    checks = (check_sinkhorn, check_sinkhorn, check_sinkhorn, check_l1, check_assignment)
    count, differences = Counter(), 0
    for i in tqdm(range(given.problems), disable=None):
        check, seed = checks[i % len(checks)], given.seed * 10**9 + i
        count[check.__name__.removeprefix("check_")] += 1
        found = check(Draw(seed))
        if found:
            differences += 1
            print(f"seed {seed}, {check.__name__}: {found}")
    summary = {"seed": given.seed, "problems": dict(count), "differences": differences}
    print(json.dumps(summary))
    if given.out:
        append(given.out, [where(threads=1) | summary])
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
