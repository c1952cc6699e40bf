"""A picture of a solved transport problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dotresize.ops.constants import MOMENTUM, PLAIN, SinkhornBatch
from dotresize.ops.sinkhorn_launch import solve
from dotresize.ops.solved_problem import SolvedProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (12.0, 3.6)  # inches


def draw(problem: SolvedProblem) -> Figure:
    """Draw the plan, the errors of its marginals, and how the error falls with iterations."""
    if problem.status in ("invalid", "infeasible"):
        raise ValueError(f"there is no plan to draw: {problem.reason()}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install 'dotresize[plot]'") from None
    figure = Figure(figsize=SIZE, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plan = problem.plan().double().cpu()
    image = left.imshow(plan, cmap="magma", aspect="auto", interpolation="nearest")
    left.set(title=f"plan, reg {problem.reg:.3g}", xlabel="column", ylabel="row")
    figure.colorbar(image, ax=left)
    for axis, name, wanted in ((1, "rows", problem.a), (0, "columns", problem.b)):
        middle.plot((plan.sum(axis) - wanted.detach().cpu()).abs(), label=name, linewidth=1)
    middle.set(title=f"marginal error {problem.marginal_error:.2g}", xlabel="row, column")
    middle.set(ylabel="absolute error")
    middle.legend()
    _draw_iterations(right, problem)
    return figure


def _draw_iterations(axis: Any, problem: SolvedProblem) -> None:
    """Draw the error after 1, 2, 4, ... iterations from zero, each a solve of its own."""
    counts = [2**i for i in range(max(1, problem.n_iter).bit_length())]
    counts += [problem.n_iter] if problem.n_iter > counts[-1] else []
    a, b = problem.a.detach(), problem.b.detach()
    both = SinkhornBatch(
        labels=(0, 1),
        costs=[problem.cost] * 2,
        a=a.repeat(2),
        b=b.repeat(2),
        g=torch.zeros_like(b).repeat(2),
        reg=torch.full((2,), problem.reg, dtype=torch.float64, device="cpu"),
        tol=torch.zeros(2, dtype=torch.float64, device="cpu"),
        acceleration=torch.tensor([MOMENTUM, PLAIN], dtype=torch.int64, device="cpu"),
        max_iter=0,
    )
    errors = []
    for count in counts:
        solved = solve(both._replace(max_iter=count), storage="exact", backend=problem.backend)
        errors.append([one.marginal_error for one in solved])
    for kind, own in zip(("momentum", "plain"), zip(*errors, strict=True), strict=True):
        axis.plot(counts, own, marker="o", markersize=3, label=kind)
    axis.set(title="error by acceleration", xlabel="iterations", ylabel="marginal error")
    axis.set(xscale="log", yscale="log")
    axis.grid(True, alpha=0.25)
    axis.legend()
