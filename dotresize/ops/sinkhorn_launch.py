"""Sinkhorn on one backend: the problems were checked by the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops import reference
from dotresize.ops.arguments import address
from dotresize.ops.backends import BackendError, choose, cpp, threads
from dotresize.ops.constants import ANDERSON, MOMENTUM, SinkhornBatch, SinkhornSolution
from dotresize.ops.solved_problem import STATUS_WORDS, SolvedProblem

STORAGES = ("exact", "u16")


def solve(batch: SinkhornBatch, *, storage: str, backend: str) -> list[SolvedProblem]:
    """Solve the problems; their costs are as the caller gave them.

    Raises BackendError for what cannot run here.
    """
    chosen = choose(backend, batch.costs[0].device)
    if storage != "exact" and chosen != "triton":
        raise BackendError(f"storage {storage!r} is built for triton, not for {chosen}")
    if storage != "exact" and batch.costs[0].dtype == torch.float64:
        raise ValueError(f"storage {storage!r}: the cost is float64, which this would not keep")
    if chosen != "torch" and (batch.acceleration.numpy() == ANDERSON).any():
        raise BackendError(f"acceleration 'anderson' is built for torch, not for {chosen}")
    prepared = batch._replace(
        costs=[_solved_as(cost.detach()) for cost in batch.costs],
        a=batch.a.detach(),
        b=batch.b.detach(),
    )
    if chosen == "triton":
        from dotresize.kernels import sinkhorn as kernel

        solution = kernel.sinkhorn(prepared, storage)
    elif chosen == "cpp":
        solution = _launch_cpp(prepared)
    else:
        solution = reference.sinkhorn(prepared)
    rows, columns = ([cost.shape[axis] for cost in batch.costs] for axis in (0, 1))
    parts = zip(
        batch.costs,
        batch.reg.tolist(),
        solution.f.split(rows),
        solution.g.split(columns),
        batch.a.split(rows),
        batch.b.split(columns),
        solution.n_iter.tolist(),
        solution.marginal_error.tolist(),
        [STATUS_WORDS[code] for code in solution.status.tolist()],
        [chosen] * len(batch.costs),
        strict=True,
    )
    return [SolvedProblem(*part) for part in parts]


def _solved_as(cost: Tensor) -> Tensor:
    """Return a cost in float32 or float64, the entries of a row side by side."""
    work = (cost if cost.dtype == torch.float64 else cost.float()).resolve_neg()
    return work if work.stride(1) == 1 else work.contiguous()


def _launch_cpp(batch: SinkhornBatch) -> SinkhornSolution:
    count = len(batch.costs)
    kind = batch.costs[0].dtype
    lines = [(address(cost, kind), cost.stride(0), *cost.shape) for cost in batch.costs]
    table = torch.tensor(lines, dtype=torch.int64, device="cpu")
    momentum = batch.acceleration == MOMENTUM
    f, g = torch.empty_like(batch.a), batch.g.clone()
    n_iter, status = torch.empty(2, count, dtype=torch.int64, device="cpu")
    error = torch.empty(count, dtype=torch.float64, device="cpu")
    cpp().sinkhorn(
        batch=count,
        table=address(table, torch.int64),
        reg=address(batch.reg, torch.float64),
        tol=address(batch.tol, torch.float64),
        momentum=address(momentum, torch.bool),
        a=address(batch.a, torch.float64),
        b=address(batch.b, torch.float64),
        f=address(f, torch.float64),
        g=address(g, torch.float64),
        n_iter=address(n_iter, torch.int64),
        marginal_error=address(error, torch.float64),
        status=address(status, torch.int64),
        use_float64=kind == torch.float64,
        max_iter=batch.max_iter,
        num_threads=threads(),
    )
    return SinkhornSolution(f, g, n_iter, error, status)
