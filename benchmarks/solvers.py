"""``python -m benchmarks.solvers``: the CPU operators against torch and POT, in one run.

Every competitor gets the same inputs and threads; they take turns round by round, and the median
of ROUNDS rounds is printed, after each result was checked against float64. With ``--out FILE`` one
JSON line per figure is appended to FILE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ot
import torch

import dotresize
from benchmarks.device import device_name
from dotresize import l1_cost, sinkhorn

ROUNDS = 7
ITERATIONS = 50


def take_turns(competitors: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every competitor in every round, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for round_ in range(ROUNDS + 1):
        for name, call in competitors.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check(name: str, value: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    error = float((value.double() - truth).norm() / truth.norm())
    if not error < tolerance:
        raise SystemExit(f"{name}: relative error {error:.1e}, accepted {tolerance:.0e}")


def l1_case(tokens: int, n: int, m: int) -> dict[str, list[float]]:
    x, y = torch.randn(tokens, n), torch.randn(tokens, m)
    rows, columns = x.T.contiguous(), y.T.contiguous()  # what cdist wants; not counted
    truth = torch.cdist(rows.double(), columns.double(), p=1)
    competitors = {
        "dotresize cpp": lambda: l1_cost(x, y, reduction="sum", backend="cpp"),
        "torch.cdist(p=1)": lambda: torch.cdist(rows, columns, p=1),
    }
    for name, call in competitors.items():
        check(name, call(), truth, 1e-5)
    return take_turns(competitors)


def sinkhorn_case(batch: int, n: int, m: int) -> dict[str, list[float]]:
    """ITERATIONS iterations at reg 0.05 x max cost, uniform marginals."""
    cost = torch.rand(batch, n, m)
    reg, options = 0.05, {"tol": 0.0, "max_iter": ITERATIONS}
    truth = sinkhorn(cost.double(), reg, backend="torch", **options).plan
    a, b = torch.full((batch, n), 1 / n), torch.full((batch, m), 1 / m)

    def pot() -> torch.Tensor:
        return ot.batch.solve_batch(
            cost, reg, a, b, max_iter=ITERATIONS, tol=0.0, grad="detach"
        ).plan

    competitors = {
        "dotresize cpp": lambda: sinkhorn(cost, reg, backend="cpp", **options).plan,
        "torch logsumexp loop": lambda: sinkhorn(cost, reg, backend="torch", **options).plan,
        "POT ot.batch.solve_batch": pot,
    }
    for name, call in competitors.items():
        check(name, call(), truth, 1e-4)
    return take_turns(competitors)


CASES: dict[str, Callable[[], dict[str, list[float]]]] = {
    "L1 cost, 4096 tokens, 1024 x 1024": lambda: l1_case(4096, 1024, 1024),
    "L1 cost, 4096 tokens, 576 x 468": lambda: l1_case(4096, 576, 468),
    f"Sinkhorn, {ITERATIONS} iterations, 1024 x 768": lambda: sinkhorn_case(1, 1024, 768),
    f"Sinkhorn, {ITERATIONS} iterations, 30 of 576 x 464": lambda: sinkhorn_case(30, 576, 464),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    out = parser.parse_args().out
    where = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "simd": dotresize.backends()["cpp"]["simd"],
        "versions": {
            "dotresize": dotresize.__version__,
            "torch": torch.__version__,
            "pot": ot.__version__,
        },
    }
    torch.manual_seed(0)
    for case, run in CASES.items():
        seconds = run()
        ours = statistics.median(seconds["dotresize cpp"])
        for name, rounds in seconds.items():
            low, median, high = statistics.quantiles(rounds, n=4)
            print(f"{case:45} {name:25} {median * 1e3:9.1f} ms   {median / ours:5.1f} x")
            row = where | {"case": case, "name": name, "rounds": len(rounds)}
            row |= {"median_s": median, "quartiles_s": [low, high], "ratio": median / ours}
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
