"""How long the limit of transport takes, beside twenty transports in a row.

    python -m benchmarks.studies.map_time --out FILE

Random activations of a heavy-tailed scale, four fifths of the channels kept. Both solve the same
plan of all neurons onto all neurons; then the limit takes one eigendecomposition, and each of the
twenty one product and one factorisation, which are all alike: one of them is timed, and counted
twenty times, as the largest would take an hour.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dotresize import factorize, l1_cost, sinkhorn, transport_map
from dotresize.narrow.transport import limit

from ..rows import append, where

STEPS = 20
TOKENS = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many, in turns (3)")
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    args = parser.parse_args()
    for width in args.widths:
        row = where(torch.get_num_threads()) | measured(width, args.rounds)
        append(args.out, [row])
        sys.stdout.write(f"{width}: {row['seconds']}\n")
        sys.stdout.flush()
    return 0


def measured(width: int, rounds: int) -> dict[str, object]:
    """Return the seconds of each part at a width."""
    generator = torch.Generator().manual_seed(width)
    scale = torch.randn(width, generator=generator).exp()
    cost = l1_cost(torch.randn(TOKENS, width, generator=generator) * scale).double()
    kept = torch.arange(width * 4 // 5)
    plans: list[Tensor] = []

    def solve() -> None:
        plans.append(sinkhorn(cost, 3.0 * float(cost.mean()), tol=1e-9).plan)  # type: ignore[arg-type]

    solve()
    plan = plans[-1]
    moved = transport_map(plan)
    q = factorize(moved[:, kept]).q
    parts: dict[str, Callable[[], object]] = {
        "plan": solve,
        "eigenvectors": lambda: limit(plan, kept, "the map"),
        "one transport": lambda: factorize(moved @ q),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
            plans.clear()
    seconds = {name: median(own) for name, own in times.items()}
    seconds["limit"] = seconds["plan"] + seconds["eigenvectors"]
    seconds["twenty"] = seconds["plan"] + STEPS * seconds["one transport"]
    return {"width": width, "kept": len(kept), "rounds": rounds, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
