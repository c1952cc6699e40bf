"""``python -m benchmarks.studies.kept_plan``: what a plan kept in 16 bits does to Sinkhorn.

The costs of every norm of the demo's model (benchmarks.studies.acceleration), each at reg 1e-4 to
10 times its mean, with momentum, from zero, to marginal error 1e-5 or MAX_ITER: by the GPU's
resident kernel with the cost in float32, and with the kept plan. A row has the iterations of both,
the sweeps among them that read the cost, the marginal errors of the plans that the potentials give
in float64, and how far those plans are apart. Without a GPU, TRITON_INTERPRET=1 runs the same
kernel with every problem in one program. With ``--out FILE`` JSON lines are appended; with
``--every N`` only every N-th norm is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor

from dotresize.kernels import resident
from dotresize.kernels.resident_phases import EXACT_COST, KEPT_PLAN
from dotresize.kernels.sinkhorn_device import device_of
from dotresize.kernels.sinkhorn_sheet import O_ERROR, O_EXACT, O_ITERATIONS, O_STATUS
from dotresize.ops.constants import MOMENTUM, SinkhornBatch

from ..interpreter import patch_once
from ..rows import append, where
from .acceleration import location_costs

RATIOS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0)
TOLERANCE, MAX_ITER = 1e-5, 300


def solved(cost: Tensor, reg: Tensor, store: int) -> tuple[Tensor, Tensor]:
    """Return the plans, float64 (L, n, m), and the outcomes (L, OUTCOME) of sinkhorn_sheet."""
    count, n, m = cost.shape
    place = device_of(cost.device)
    if cost.device.type == "cpu":  # the interpreter has no limits, and long blocks are quick in it
        place = dataclasses.replace(place, shared=1 << 30, shared_program=1 << 30)
        resident._THREAD_ENTRIES = 512
        patch_once()
    shapes = [(n, m)] * count
    division = resident.divide(shapes, store, place)
    assert division is not None, f"{place} holds no problem of {n} x {m}"
    vectors = [torch.full((count * k,), 1 / k).double().to(cost.device) for k in (n, m)]
    batch = SinkhornBatch(
        labels=range(count),
        costs=list(cost),
        a=vectors[0],
        b=vectors[1],
        g=torch.zeros_like(vectors[1]),
        reg=reg,
        tol=torch.full((count,), TOLERANCE, dtype=torch.float64),
        acceleration=torch.full((count,), MOMENTUM),
        max_iter=MAX_ITER,
    )
    f, g = torch.empty_like(batch.a), torch.empty_like(batch.b)
    solver = resident.Resident(shapes, place, division, momentum=True)
    outcome = solver.solve(batch, (f, g))
    assert outcome is not None
    exponent = f.view(count, n, 1) + g.view(count, 1, m) - cost.double() / reg.to(f)[:, None, None]
    return exponent.exp(), torch.from_numpy(outcome)


def rows_of(number: int, cost: Tensor) -> list[dict]:
    """Return a row for each reg of one norm."""
    regs = torch.tensor(RATIOS, dtype=torch.float64) * float(cost.double().mean())
    batch = cost.expand(len(RATIOS), *cost.shape)
    found = {name: solved(batch, regs, store.value) for name, store in STORES.items()}
    rows = []
    for i, ratio in enumerate(RATIOS):
        row = {"location": number, "n": cost.shape[0], "m": cost.shape[1], "reg_over_mean": ratio}
        row |= {"tol": TOLERANCE, "max_iter": MAX_ITER}
        for name, (plans, outcome) in found.items():
            plan, one = plans[i], outcome[i]
            marginals = [1 / len(plan), 1 / plan.shape[1]]
            errors = [float((plan.sum(1 - axis) - marginals[axis]).abs().sum()) for axis in (0, 1)]
            row |= {
                f"{name}_iterations": int(one[O_ITERATIONS.value]),
                f"{name}_sweeps_of_the_cost": int(one[O_EXACT.value]),
                f"{name}_converged": bool(one[O_STATUS.value] == 0),
                f"{name}_error": float(one[O_ERROR.value]),
                f"{name}_true_errors": errors,
            }
        row["apart"] = float((found["exact"][0][i] - found["kept"][0][i]).abs().sum())
        rows.append(row)
    return rows


STORES = {"exact": EXACT_COST, "kept": KEPT_PLAN}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--every", type=int, default=1, help="take every N-th norm (1)")
    arguments = parser.parse_args()
    if arguments.every < 1:
        parser.error(f"--every {arguments.every}: must be at least 1")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("torch sees no GPU; set TRITON_INTERPRET=1 for the interpreter")
    os.environ["TQDM_DISABLE"] = "1"
    place = "cuda" if torch.cuda.is_available() else "cpu"
    about = where(torch.get_num_threads()) | {"interpreter": place == "cpu"}
    for number, cost in enumerate(location_costs()):
        if number % arguments.every:
            continue
        rows = rows_of(number, cost.to(place))
        for row in rows:
            print(
                f"{number:3d}  reg {row['reg_over_mean']:<7g} "
                f"exact {row['exact_iterations']:4d} ({row['exact_true_errors'][1]:.1e})  "
                f"kept {row['kept_iterations']:4d} ({row['kept_true_errors'][1]:.1e}), "
                f"{row['kept_sweeps_of_the_cost']:3d} of the cost  apart {row['apart']:.1e}",
                flush=True,
            )
        if arguments.out is not None:
            append(arguments.out, [about | row for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
