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

# (B, n) columns of each row; (B, n) float64 duals of the columns, None where a backend has none;
# (B,) the codes above. All on the CPU.
Solution = tuple[Tensor, Tensor | None, Tensor]


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


def solve(score: Tensor, maximize: bool, chosen: str) -> Solution:
    """Return the solution on one backend. score: (B, n, n) with entries."""
    sign = -1.0 if maximize else 1.0
    if chosen == "cpp":
        return finish(score, sign, None)
    bad = has_invalid(score, sign)
    if bad.any():
        return torch.empty(score.shape[:2], dtype=torch.int64, device="cpu"), None, bad * INVALID
    if chosen == "triton":
        return finish(score, sign, sinkhorn_duals(score, sign))
    columns = reference.assignment(score, maximize)
    return columns, None, (columns < 0).any(1) * INFEASIBLE


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


def finish(score: Tensor, sign: float, start: Tensor | None) -> Solution:
    """Return the exact solution by C++, from any finite column duals or from none.

    A score on a GPU is copied to the CPU first.
    """
    batch, n, _ = score.shape
    work = score.detach().to("cpu", torch.float32 if score.dtype in _NARROW else torch.float64)
    work = work.resolve_neg()
    if work.stride(2) != 1:
        work = work.contiguous()
    if start is not None:
        start = start.to("cpu", torch.float64).contiguous()
    columns = torch.empty(batch, n, dtype=torch.int64, device="cpu")
    v = torch.empty(batch, n, dtype=torch.float64, device="cpu")
    status = torch.empty(batch, dtype=torch.int64, device="cpu")
    cpp().assignment(
        batch=batch,
        n=n,
        score=address(work, work.dtype),
        batch_stride=work.stride(0),
        row_stride=work.stride(1),
        sign=sign,
        start=address(start, torch.float64),
        columns=address(columns, torch.int64),
        v=address(v, torch.float64),
        status=address(status, torch.int64),
        use_float64=work.dtype == torch.float64,
        num_threads=threads(),
    )
    return columns, v, status
