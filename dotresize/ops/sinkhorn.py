"""Entropic optimal transport by log-domain Sinkhorn, one problem or many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dotresize.ops.arguments import (
    check_dense,
    check_number,
    check_tensor,
    check_whole,
    check_word,
    exact,
    shown,
)
from dotresize.ops.backends import choose
from dotresize.ops.constants import ANDERSON, MOMENTUM, PLAIN, SinkhornBatch
from dotresize.ops.sinkhorn_checks import Settings, checked, per_problem, rescaled
from dotresize.ops.sinkhorn_launch import STORAGES, solve
from dotresize.ops.sinkhorn_result import SinkhornResult
from dotresize.ops.solved_problem import SolvedProblem

ACCELERATIONS = {"none": PLAIN, "momentum": MOMENTUM, "anderson": ANDERSON}
# Problems on the way to a small reg are left at this marginal error, relative to their mass.
_STAGE_TOLERANCE = 0.05


@exact
def sinkhorn(
    cost: Tensor | Sequence[Tensor],
    reg: float | Tensor,
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | Sequence[Tensor] | None = None,
    *,
    max_iter: int = 1000,
    tol: float | Tensor = 1e-5,
    init: SinkhornResult | tuple | None = None,
    schedule: Sequence[float] | None = None,
    acceleration: str = "auto",
    storage: str = "exact",
    backend: str = "auto",
) -> SinkhornResult:
    r"""Solve entropic optimal transport problems in the log domain.

    .. math:: \min_P \langle C, P \rangle + \mathrm{reg} \sum_{ij} P_{ij} \log P_{ij}
              \quad \text{s.t.} \quad P 1 = a, \; P^\top 1 = b

    One iteration is a row update, then a column update. Each problem stops by itself, when after a
    row update its column error is at most ``tol``; a problem that has stopped costs nothing. Rows
    are exact at exit, up to rounding; columns are off by ``marginal_error``.

    Args:
        cost: ``(n, m)``, ``(B, n, m)``, or a list of 2-D tensors of different shapes. float32 or
            float64 (solved as such), float16 or bfloat16 (solved in float32). +inf forbids a pair.
        reg: > 0, in units of the cost; a number, or one per problem ``(B,)``. 0.02 of the mean cost
            is close to a matching, 3 times it mixes as DOTResize does.
        a: row marginals ``(n,)`` or ``(B, n)`` (for a list: a list); None = 1/n each. Zeros are
            allowed and give exact zero rows.
        b: column marginals, likewise.
        max_iter: largest number of iterations per problem.
        tol: marginal error to stop at, a number or one per problem ``(B,)``; 0 runs exactly
            ``max_iter`` iterations (after those of a schedule).
        init: what to start from: a result of like problems, whatever its reg (one for all, or one
            per problem), or potentials ``(f, g)`` of this reg. Only g is used, as the first row
            update follows from it.
        schedule: multiples of reg, falling to 1, solved roughly first, each from the one before,
            for example ``(64, 8)``. ``max_iter`` holds for each, ``n_iter`` counts all. It pays
            at some small regs (docs/sinkhorn.md).
        acceleration: what follows a column update. "none": nothing. "momentum": over-relaxation
            along the last change, by a factor that grows while that helps. "anderson": the
            combination of the last five updates that agrees best (torch only; for comparison).
            "auto": momentum, and nothing for problems with tol = 0, which ask for that many plain
            iterations.
        storage: "exact", or "u16" (triton): iterations read the cost as 65536 levels, half the
            bytes of float32. An exponent is then off by up to ``range / (131070 reg)``, where the
            range is the largest cost above its row's minimum; more than 0.02 is refused. ``tol``
            and ``marginal_error`` are then of the cost in levels. With "exact" they are of the cost
            itself, although on a GPU iterations of large float32 problems may work on a plan in 16
            bits: their first and last sweeps, and some between, read the cost.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        SinkhornResult. Bad numbers in a cost are that problem's ``status``, not an exception. Its
        plan and values are differentiable by cost, a and b, at convergence; not by reg.

    Raises:
        ValueError: wrong shapes, dtypes or devices; reg not positive and finite; marginals that
            are negative, not finite, or do not sum alike; a cost too coarse in 16 bits.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from dotresize import sinkhorn
        >>> cost = torch.rand(6, 30, 20)  # six problems
        >>> a = torch.full((30,), 1 / 30)
        >>> result = sinkhorn(cost, torch.linspace(0.05, 0.5, 6), a=a)
        >>> result.status[0], result.plan.shape
        ('converged', torch.Size([6, 30, 20]))
        >>> bool(torch.allclose(result.plan.sum(2), a.expand(6, 30), atol=1e-6))
        True

    References:
        M. Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
    """
    if not isinstance(cost, (Tensor, list, tuple)):
        kind = type(cost).__name__
        raise ValueError(f"cost is a {kind}: must be a torch tensor, or a list of them")
    max_iter = check_whole("max_iter", max_iter, 0)
    check_word("storage", storage, STORAGES)
    if not isinstance(acceleration, str) or acceleration not in ("auto", *ACCELERATIONS):
        known = ", ".join(ACCELERATIONS)
        raise ValueError(f"acceleration {shown(acceleration)}: must be auto or one of {known}")
    ragged = not isinstance(cost, Tensor)
    if isinstance(cost, Tensor):
        check_tensor("cost", cost)
        choose(backend, cost.device)  # raises before anything is looked at
        check_dense("cost", cost)
    count = 1 if isinstance(cost, Tensor) and cost.dim() < 3 else len(cost)
    regs = per_problem("reg", reg, count)
    if not (regs.numpy() > 0).all():  # as below: a tensor operation takes ten times as long
        raise ValueError(f"reg is {_first(regs, regs <= 0)}: must be positive and finite")
    tols = per_problem("tol", tol, count)
    if not (tols.numpy() >= 0).all():
        raise ValueError(f"tol is {_first(tols, tols < 0)}: must be finite and not negative")
    stages = _stages(schedule)
    if isinstance(init, SinkhornResult):
        init = rescaled(init, regs, ragged)
    named = np.full(count, ACCELERATIONS.get(acceleration, MOMENTUM), dtype=np.int64)
    if acceleration == "auto":
        named[tols.numpy() == 0] = PLAIN
    settings = Settings(regs, tols, torch.from_numpy(named), max_iter)
    solved: dict[int, SolvedProblem] = {}
    for batch in checked(cost, a, b, init, settings, backend):
        problems = _solve_stages(batch, stages, storage=storage, backend=backend)
        solved.update(zip(batch.labels, problems, strict=True))
    single = isinstance(cost, Tensor) and cost.dim() == 2
    layout = "ragged" if ragged else "single" if single else "batch"
    return SinkhornResult.collect([solved[i] for i in range(count)], layout)


def _first(values: Tensor, wrong: Tensor) -> str:
    return f"{float(values[wrong][0]):g}"


def _stages(schedule: Sequence[float] | None) -> list[float]:
    """Return the schedule and the 1 that ends it."""
    try:
        given = () if schedule is None else schedule
        factors = [check_number("schedule", factor, "a number") for factor in given]
    except (TypeError, ValueError, RuntimeError):
        factors = [0.0]
    if not all(1 <= later <= factor < math.inf for factor, later in pairwise([*factors, 1.0])):
        raise ValueError(
            f"schedule is {shown(schedule)}: must be falling multiples of reg, 1 or more"
        )
    return [*factors, 1.0]


def _solve_stages(
    batch: SinkhornBatch, stages: list[float], *, storage: str, backend: str
) -> list[SolvedProblem]:
    """Solve the batch at each multiple of its reg in turn, from the potentials of the last."""
    iterations = [0] * len(batch.costs)
    if len(stages) > 1:
        rough = torch.maximum(batch.tol, _STAGE_TOLERANCE * batch.masses().cpu())
        start = batch.g / stages[0]
        for factor, following in pairwise(stages):
            stage = batch._replace(reg=batch.reg * factor, tol=rough, g=start)
            solved = solve(stage, storage=storage, backend=backend)
            iterations = [i + problem.n_iter for i, problem in zip(iterations, solved, strict=True)]
            g = torch.cat([problem.g for problem in solved]) * (factor / following)
            start = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
        batch = batch._replace(g=start)
    solved = solve(batch, storage=storage, backend=backend)
    return [replace(p, n_iter=p.n_iter + i) for i, p in zip(iterations, solved, strict=True)]
