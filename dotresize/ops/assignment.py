"""Linear assignment, one problem or many at once, and the proof that a solution is optimal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from dotresize.ops import reference
from dotresize.ops.arguments import FLOATS, check_dense, check_flag, check_tensor, exact
from dotresize.ops.assignment_launch import INVALID, SOLVED, backend_for, solve

_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@dataclass(frozen=True, eq=False)
class AssignmentCertificate:
    """Dual solution of an assignment problem, or of each problem of a batch.

    With it anyone can check the optimum: for maximize ``u_i + v_j >= score_ij``, for minimize
    ``<=``, so that no assignment is better than ``sum u + sum v``.

    Attributes:
        u: of each row, float64 ``(n,)`` or ``(B, n)``, on the score's device.
        v: of each column, likewise.
        gap: how far ``sum u + sum v`` is from the assignment's sum, hence by how much that could be
            short of the optimum; 0 for integers, else up to rounding. A number, or float64 (B,).
        violation: the largest excess of an entry over its inequality, 0 up to rounding; likewise.

    Example:
        >>> import torch
        >>> from dotresize import assignment
        >>> score = torch.tensor([[1.0, 5.0], [4.0, 6.0]])
        >>> _, proof = assignment(score, certificate=True)
        >>> bool((proof.u[:, None] + proof.v >= score).all()), proof.gap
        (True, 0.0)
    """

    u: Tensor
    v: Tensor
    gap: float | Tensor
    violation: float | Tensor


@overload
def assignment(
    score: Tensor,
    *,
    maximize: bool = True,
    certificate: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def assignment(
    score: Tensor, *, maximize: bool = True, certificate: Literal[True], backend: str = "auto"
) -> tuple[Tensor, AssignmentCertificate]: ...


@exact
def assignment(
    score: Tensor, *, maximize: bool = True, certificate: bool = False, backend: str = "auto"
) -> Tensor | tuple[Tensor, AssignmentCertificate]:
    r"""Match every row with a column of its own so that the sum of their scores is best.

    .. math:: \max_{x \in S_n} \sum_{i=1}^{n} \mathrm{score}_{i, x_i}

    Exact: computed in float64 from the score as it is given. Where all scores are integers, or
    integers times one power of two, below ``2^53 / n``, nothing is rounded at all. Nothing of the
    result is differentiable.

    Args:
        score: ``(n, n)`` or ``(B, n, n)``, floating-point or integer (rounded to float64), in any
            layout. A pair is forbidden by -inf for maximize, by +inf for minimize.
        maximize: False for the smallest sum.
        certificate: also return the dual solution.
        backend: "auto", "triton", "cpp" or "torch". "cpp" solves one problem per thread and needs
            ``n^2 / 4`` bytes for each thread. "triton" solves a Sinkhorn problem on the GPU and
            finishes from its potentials by "cpp" on the CPU; "torch" is scipy's solver. "auto"
            copies a score on a GPU to the CPU for "cpp" where it has fewer than 4096 rows, and
            takes "triton" from there on.

    Returns:
        int64 ``(n,)`` or ``(B, n)``, the column of each row, on the score's device; with
        ``certificate`` that and an AssignmentCertificate. Where several assignments are optimal,
        backends may return different ones, each always the same.

    Raises:
        ValueError: wrong shape or dtype; NaN or the wrong infinity (names problem, row and
            column); forbidden pairs that leave no assignment (names the problem).
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from dotresize import assignment
        >>> assignment(torch.tensor([[1.0, 5.0], [4.0, 6.0]]))  # 5 + 4 is more than 1 + 6
        tensor([1, 0])

    References:
        R. Jonker and A. Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear
        Assignment Problems, Computing 38, 1987.
    """
    check_tensor("score", score)
    rows = score.shape[-1] if score.dim() else 0
    chosen = backend_for(backend, score.device, rows)  # raises before anything is looked at
    check_dense("score", score)
    maximize = check_flag("maximize", maximize)
    certificate = check_flag("certificate", certificate)
    if score.dim() not in (2, 3) or score.shape[-1] != score.shape[-2]:
        raise ValueError(f"score has shape {tuple(score.shape)}: must be (n, n) or (B, n, n)")
    if score.dtype not in (*FLOATS, *_INTEGERS):
        raise ValueError(f"score has dtype {score.dtype}: must be float16 to float64 or an integer")
    batch = score.detach()[None] if score.dim() == 2 else score.detach()
    if batch.numel() == 0:
        columns, v = torch.empty(batch.shape[:2], dtype=torch.int64, device="cpu"), None
    else:
        columns, v, status = solve(batch, maximize, chosen)
        for problem, state in enumerate(status.tolist()):
            if state != SOLVED:
                _refuse(batch[problem], problem, maximize, state)
    result = columns.to(score.device)
    result = result[0] if score.dim() == 2 else result
    if not certificate:
        return result
    return result, _certify(score, batch.cpu(), columns, v, maximize)


def _refuse(score: Tensor, problem: int, maximize: bool, status: int) -> None:
    """Raise ValueError that says what is wrong with a problem, and where."""
    allowed = "-inf" if maximize else "inf"
    if status == INVALID:
        worst = torch.inf if maximize else -torch.inf
        row, column = (score.isnan() | (score == worst)).nonzero()[0].tolist()
        raise ValueError(
            f"score of problem {problem} is {score[row, column].item()} at row {row}, column "
            f"{column}: must be finite, or {allowed} for a forbidden pair"
        )
    raise ValueError(
        f"score of problem {problem}: its forbidden pairs ({allowed}) leave no assignment of every "
        "row to a column of its own"
    )


def _certify(
    score: Tensor, batch: Tensor, columns: Tensor, v: Tensor | None, maximize: bool
) -> AssignmentCertificate:
    """Return the certificate, from the score alone, in float64.

    Of a solver's duals only those of columns are taken.
    """
    sign = -1.0 if maximize else 1.0
    count, n = columns.shape
    duals = torch.zeros(2, count, n, dtype=torch.float64, device="cpu")
    measures = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    for i in range(count if n else 0):
        if v is None:
            duals[1, i] = reference.assignment_duals(batch[i].double() * sign, columns[i])
        else:
            duals[1, i] = v[i]
        duals[0, i], *found = _measure(batch[i], sign, columns[i], duals[1, i])
        measures[:, i] = torch.tensor(found, dtype=torch.float64, device="cpu")
    u, v = (duals * sign).to(score.device)
    gap, violation = measures.to(score.device)
    if score.dim() == 3:
        return AssignmentCertificate(u, v, gap, violation)
    return AssignmentCertificate(u[0], v[0], float(gap[0]), float(violation[0]))


def _measure(score: Tensor, sign: float, columns: Tensor, v: Tensor) -> tuple[Tensor, float, float]:
    """Return the rows' duals, the gap, and the largest violation.

    The duals are ``u_i = min_j sign * score_ij - v_j``.
    """
    u, paid, violation = torch.empty_like(v), torch.empty_like(v), 0.0
    rows = max(1, 2**16 // len(v))  # a block stays in the cache
    for start in range(0, len(v), rows):
        block = slice(start, start + rows)
        cost = score[block].double() * sign
        u[block] = (cost - v).amin(1)
        paid[block] = cost.gather(1, columns[block, None])[:, 0]
        violation = max(violation, float((u[block, None] + v - cost).max()))
    try:
        # One rounding in all: the sums nearly cancel.
        gap = math.fsum([*paid.tolist(), *(-u).tolist(), *(-v).tolist()])
    except (OverflowError, ValueError):
        gap = math.inf  # costs near float64's largest prove nothing
    return u, gap, violation
