"""Linear assignment, one problem or many at once, and the proof that a solution is optimal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

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
    ``<=``, so that no assignment is better than ``sum u + sum v``. With fewer rows than columns
    every v, and with fewer columns every u, must also be ``>= 0`` for maximize, for minimize
    ``<= 0``.

    Attributes:
        u: of each row, float64 ``(n,)`` or ``(B, n)``, on the score's device.
        v: of each column, float64 ``(m,)`` or ``(B, m)``.
        gap: how far ``sum u + sum v`` is from the assignment's sum, hence by how much that could be
            short of the optimum; 0 for integers, else up to rounding. A number, or float64 (B,).
        violation: the largest excess over an inequality, 0 up to rounding; likewise.

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


Scores = Tensor | Sequence[Tensor]


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


@overload
def assignment(
    score: Sequence[Tensor],
    *,
    maximize: bool = True,
    certificate: Literal[False] = False,
    backend: str = "auto",
) -> list[Tensor]: ...


@overload
def assignment(
    score: Sequence[Tensor],
    *,
    maximize: bool = True,
    certificate: Literal[True],
    backend: str = "auto",
) -> tuple[list[Tensor], list[AssignmentCertificate]]: ...


@exact
def assignment(
    score: Scores, *, maximize: bool = True, certificate: bool = False, backend: str = "auto"
) -> Any:
    r"""Match rows with columns of their own so that the sum of their scores is best.

    .. math:: \max_{x} \sum_{i} \mathrm{score}_{i, x_i}, \quad x_i \ne x_k \; (i \ne k)

    Exact: computed in float64 from the score as it is given. Where all scores are integers, or
    integers times one power of two, below ``2^53 / n``, nothing is rounded at all. Nothing of the
    result is differentiable.

    Args:
        score: ``(n, m)`` or ``(B, n, m)``, or a list of ``(n, m)`` of any shapes on one device;
            floating-point or integer (rounded to float64), in any layout. A pair is forbidden by
            -inf for maximize, by +inf for minimize.
        maximize: False for the smallest sum.
        certificate: also return the dual solution.
        backend: "auto", "triton", "cpp" or "torch". "cpp" solves one problem per thread and needs
            ``n m / 4`` bytes for each thread. "triton" solves a Sinkhorn problem on the GPU and
            finishes from its potentials by "cpp" on the CPU, where n = m; other shapes go to "cpp"
            at once. "torch" is scipy's solver. "auto" copies a score on a GPU to the CPU for "cpp"
            where it has fewer than 4096 rows, and takes "triton" from there on.

    Returns:
        int64 ``(n,)`` or ``(B, n)``, the column of each row, on the score's device; with more rows
        than columns -1 for the rows that are left over. A list of such for a list. With
        ``certificate`` that and an AssignmentCertificate, or a list of them. Where several
        assignments are optimal, backends may return different ones, each always the same.

    Raises:
        ValueError: wrong shape or dtype; NaN or the wrong infinity (names problem, row and
            column); forbidden pairs that leave no assignment (names the problem).
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from dotresize import assignment
        >>> assignment(torch.tensor([[1.0, 5.0], [4.0, 6.0]]))  # 5 + 4 is more than 1 + 6
        tensor([1, 0])
        >>> assignment(torch.tensor([[3.0], [7.0], [5.0]]))  # three rows want the one column
        tensor([-1,  0, -1])

    References:
        R. Jonker and A. Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear
        Assignment Problems, Computing 38, 1987.
    """
    named = _named(score)
    device = named[0][1].device if named else torch.device("cpu")
    rows = max((_rows(one) for _, one in named), default=0)
    chosen = backend_for(backend, device, rows)  # raises before anything is looked at
    maximize = check_flag("maximize", maximize)
    certificate = check_flag("certificate", certificate)
    for name, one in named:
        _check(name, one, device, batched=isinstance(score, Tensor))
    groups = [_Group(one) for _, one in named]
    full = [group for group in groups if group.score.numel()]
    if full:
        found, status = solve([group.score for group in full], maximize, chosen)
        for group, (columns, v) in zip(full, found, strict=True):
            group.columns, group.v = columns, v
        states = iter(status.tolist())
        for (name, _), group in zip(named, groups, strict=True):
            for k, one in enumerate(group.given if group.score.numel() else ()):
                state = next(states)
                if state != SOLVED:
                    place = f"score of problem {k}" if isinstance(score, Tensor) else name
                    _refuse(one, place, maximize, state)
    results = [group.result(device) for group in groups]
    proofs = [group.certificate(maximize, device) for group in groups] if certificate else []
    if isinstance(score, Tensor):
        return (results[0], proofs[0]) if certificate else results[0]
    return (results, proofs) if certificate else results


def _named(score: Scores) -> list[tuple[str, Tensor]]:
    """Return the scores that a caller gave, by name; ValueError for anything but tensors."""
    if not isinstance(score, (list, tuple)):
        return [("score", check_tensor("score", score))]
    return [(f"score {i}", check_tensor(f"score {i}", one)) for i, one in enumerate(score)]


def _rows(score: Tensor) -> int:
    """Return how many rows a Sinkhorn problem before the exact one would have; 0 for none."""
    if score.is_nested or score.dim() < 2 or score.shape[-1] != score.shape[-2]:
        return 0
    return score.shape[-1]


def _check(name: str, score: Tensor, device: torch.device, *, batched: bool) -> None:
    """Raise ValueError for what is no score. batched: whether it may be several of one shape."""
    check_dense(name, score)
    accepted = "(n, m) or (B, n, m)" if batched else "(n, m)"
    if score.dim() != 2 and not (score.dim() == 3 and batched):
        raise ValueError(f"{name} has shape {tuple(score.shape)}: must be {accepted}")
    if score.dtype not in (*FLOATS, *_INTEGERS):
        kinds = "float16 to float64 or an integer"
        raise ValueError(f"{name} has dtype {score.dtype}: must be {kinds}")
    if score.device != device:
        raise ValueError(f"{name} is on {score.device}, score 0 on {device}")


class _Group:
    """Problems of one shape, lying so that there are no more rows than columns.

    Attributes:
        given, score: (B, n, m), as it was given and as it is solved.
        columns, v: what was found.
    """

    def __init__(self, score: Tensor) -> None:
        self._single = score.dim() == 2
        self.given = score.detach()[None] if self._single else score.detach()
        self._turned = self.given.shape[1] > self.given.shape[2]
        self.score = self.given.mT if self._turned else self.given
        self.columns = torch.full(self.score.shape[:2], -1, dtype=torch.int64, device="cpu")
        self.v: Tensor | None = None

    def result(self, device: torch.device) -> Tensor:
        """Return the column of each row as it was given."""
        columns = self.columns
        if self._turned:  # these are the rows of each column
            batch, n, _ = self.given.shape
            places = torch.arange(columns.shape[1], dtype=torch.int64, device="cpu")
            own = torch.full((batch, n), -1, dtype=torch.int64, device="cpu")
            columns = own.scatter(1, columns, places.expand(batch, -1)) if places.numel() else own
        columns = columns.to(device)
        return columns[0] if self._single else columns

    def certificate(self, maximize: bool, device: torch.device) -> AssignmentCertificate:
        """Return the dual solution of the problems as they were given."""
        u, v, gap, violation = _certify(self.score.cpu(), self.columns, self.v, maximize)
        if self._turned:
            u, v = v, u
        found = [x.to(device) for x in (u, v, gap, violation)]
        if not self._single:
            return AssignmentCertificate(*found)
        return AssignmentCertificate(found[0][0], found[1][0], float(gap[0]), float(violation[0]))


def _refuse(score: Tensor, name: str, maximize: bool, status: int) -> None:
    """Raise ValueError that says what is wrong with a problem, and where."""
    allowed = "-inf" if maximize else "inf"
    if status == INVALID:
        worst = torch.inf if maximize else -torch.inf
        row, column = (score.isnan() | (score == worst)).nonzero()[0].tolist()
        raise ValueError(
            f"{name} is {score[row, column].item()} at row {row}, column "
            f"{column}: must be finite, or {allowed} for a forbidden pair"
        )
    raise ValueError(
        f"{name}: its forbidden pairs ({allowed}) leave no assignment of every "
        f"{'row to a column' if score.shape[0] <= score.shape[1] else 'column to a row'} of its own"
    )


def _certify(
    batch: Tensor, columns: Tensor, v: Tensor | None, maximize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u, v, gap and violation of each problem, from the score alone, in float64.

    Of a solver's duals only those of columns are taken.
    """
    sign = -1.0 if maximize else 1.0
    count, n, m = batch.shape
    u = torch.zeros(count, n, dtype=torch.float64, device="cpu")
    duals = torch.zeros(count, m, dtype=torch.float64, device="cpu")
    measures = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    for i in range(count if n else 0):
        if v is None:
            duals[i] = reference.assignment_duals(batch[i].double() * sign, columns[i])
        else:
            duals[i] = v[i]
        u[i], *found = _measure(batch[i], sign, columns[i], duals[i])
        measures[:, i] = torch.tensor(found, dtype=torch.float64, device="cpu")
    return u * sign, duals * sign, measures[0], measures[1]


def _measure(score: Tensor, sign: float, columns: Tensor, v: Tensor) -> tuple[Tensor, float, float]:
    """Return the rows' duals, the gap, and the largest violation.

    The duals are ``u_i = min_j sign * score_ij - v_j``; where columns are left over, no v is
    positive.
    """
    n, m = score.shape
    u, paid = (torch.empty(n, dtype=torch.float64, device="cpu") for _ in range(2))
    violation = max(0.0, float(v.max())) if n < m else 0.0
    rows = max(1, 2**16 // m)  # a block stays in the cache
    for start in range(0, n, rows):
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
