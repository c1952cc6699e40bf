"""Linear assignment on one backend: the score's shape and type were checked by the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops import reference
from dotresize.ops.arguments import address
from dotresize.ops.backends import BackendError, choose, cpp, threads
from dotresize.ops.sinkhorn import sinkhorn

# Types that float32 holds exactly; all others are solved from float64.
_NARROW = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *(torch.int8, torch.uint8, torch.int16, torch.uint16),
)
SOLVED, INFEASIBLE, INVALID = range(3)
# Of the Sinkhorn solve that precedes the exact one: reg as a share of the spread of the costs.
SINKHORN_REG = 5e-3
SINKHORN_ITERATIONS = 200
# Rows from which "auto" solves on a GPU first. Below, the search on the host alone is the shorter
# way, copy of the score included; ``benchmarks.gpu --sections assignment`` times both.
ROWS_ON_GPU = 4096

# A solution has, for each group, the columns (B, n) of its rows and the duals (B, m) of its
# columns, float64, None where a backend has none; then the codes above of all problems. All are on
# the CPU.
Solution = tuple[list[tuple[Tensor, Tensor | None]], Tensor]


def backend_for(backend: str, device: torch.device, rows: int) -> str:
    """Return the backend for scores of so many rows, as ``choose``.

    A solve on a GPU also needs the C++ extension, for its exact finish. "auto" takes that extension
    alone for a score of fewer than ROWS_ON_GPU rows, wherever the score lies.
    """
    chosen = choose(backend, device)
    if chosen != "triton":
        return chosen
    finishes = choose("auto", torch.device("cpu")) == "cpp"
    if backend == "auto":
        on_gpu = "triton" if rows >= ROWS_ON_GPU else "cpp"
        return on_gpu if finishes else "torch"
    if not finishes:
        try:
            choose("cpp", torch.device("cpu"))
        except BackendError as error:
            raise BackendError(f"triton's duals are finished by cpp: {error}") from None
    return chosen


def solve(groups: list[Tensor], maximize: bool, chosen: str) -> Solution:
    """Return the solution on one backend.

    groups: scores (B, n, m) with n <= m, each with entries.
    """
    sign = -1.0 if maximize else 1.0
    if chosen == "cpp":
        return finish(groups, sign, [None] * len(groups))
    bad = torch.cat([has_invalid(score, sign) for score in groups])
    if bad.any():
        return [(_no_columns(score), None) for score in groups], bad * INVALID
    if chosen == "triton":
        # Duals of columns that stay free are 0, which those of a transport are not. Beside a large
        # score, small ones are solved sooner on the host.
        square = [score.shape[1] if score.shape[1] == score.shape[2] else 0 for score in groups]
        least = ROWS_ON_GPU if max(square) >= ROWS_ON_GPU else 1
        starts = [
            sinkhorn_duals(score, sign) if rows >= least else None
            for score, rows in zip(groups, square, strict=True)
        ]
        return finish(groups, sign, starts)
    found = [reference.assignment(score, maximize) for score in groups]
    status = torch.cat([(columns < 0).any(1) * INFEASIBLE for columns in found])
    return [(columns, None) for columns in found], status


def _no_columns(score: Tensor) -> Tensor:
    return torch.full(score.shape[:2], -1, dtype=torch.int64, device="cpu")


def has_invalid(score: Tensor, sign: float) -> Tensor:
    """Return whether problems hold NaN, or the infinity that would always win: (B,) on the CPU."""
    if not score.is_floating_point():
        return torch.zeros(len(score), dtype=torch.bool, device="cpu")
    # A maximum is NaN where any entry is.
    best = score.flatten(1).amax(1) if sign < 0 else -score.flatten(1).amin(1)
    return ~(best < torch.inf).cpu()


def sinkhorn_duals(score: Tensor, sign: float) -> Tensor:
    """Return column duals of ``sign * score`` from entropic transport, all in one batch.

    The potentials of an entropic problem are duals of the assignment up to its regularisation.
    float64 (B, n), finite, on the score's device.
    """
    work = score if score.is_floating_point() and score.dtype.itemsize > 2 else score.float()
    cost = work * (sign / 2)  # half of it: the spread then cannot overflow
    low = cost.flatten(1).amin(1)
    high = torch.where(cost.isfinite(), cost, low[:, None, None]).flatten(1).amax(1)
    spread = torch.where(high > low, high - low, 1.0)[:, None, None]
    scaled = ((cost - low[:, None, None]) / spread).float()
    result = sinkhorn(
        scaled,
        SINKHORN_REG,
        tol=0,
        max_iter=SINKHORN_ITERATIONS,
        acceleration="momentum",
        backend="triton",
    )
    g = torch.nan_to_num(result.potentials[1].double(), nan=0.0, posinf=0.0, neginf=0.0)
    return g * (2 * SINKHORN_REG * spread[:, 0].double())


def finish(groups: list[Tensor], sign: float, starts: list[Tensor | None]) -> Solution:
    """Return the exact solution by C++, from any finite column duals or from none.

    A score on a GPU is copied to the CPU first.
    """
    narrow = all(score.dtype in _NARROW for score in groups)
    works, lines, found = [], [], []
    for score, start in zip(groups, starts, strict=True):
        work = score.detach().to("cpu", torch.float32 if narrow else torch.float64).resolve_neg()
        work = work if work.stride(2) == 1 else work.contiguous()
        if start is not None:
            start = start.to("cpu", torch.float64).contiguous()
        columns = _no_columns(score)
        v = torch.empty(len(score), score.shape[2], dtype=torch.float64, device="cpu")
        works.append((work, start))  # what the lines point to
        lines.append(_lines(work, start, columns, v))
        found.append((columns, v))
    table = torch.cat(lines)
    status = torch.empty(len(table), dtype=torch.int64, device="cpu")
    cpp().assignment(
        batch=len(table),
        table=address(table, torch.int64),
        sign=sign,
        status=address(status, torch.int64),
        use_float64=not narrow,
        num_threads=threads(),
    )
    return list(found), status


def _lines(score: Tensor, start: Tensor | None, columns: Tensor, v: Tensor) -> Tensor:
    """Return what the extension reads of each problem of a group, int64 (B, 7)."""
    batch, n, m = score.shape
    index = torch.arange(batch, dtype=torch.int64, device="cpu")

    def at(values: Tensor | None, dtype: torch.dtype) -> Tensor:
        if values is None:
            return torch.zeros_like(index)
        return address(values, dtype) + index * (values.stride(0) * values.element_size())

    def same(number: int) -> Tensor:
        return torch.full_like(index, number)

    whole, real = torch.int64, torch.float64
    return torch.stack(
        [
            *(at(score, score.dtype), same(score.stride(1)), same(n), same(m)),
            *(at(start, real), at(columns, whole), at(v, real)),
        ],
        1,
    ).contiguous()
