"""Sinkhorn on one backend: the problems were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dotresize import reference
from dotresize.ops.backends import BackendError, choose, cpp, threads
from dotresize.ops.result import STATUS_WORDS, _Problem

STORAGES = ("exact", "u16")
_Solution = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Group(NamedTuple):
    """Problems that are solved together, of one dtype and device."""

    labels: Sequence[int]  # the caller's numbers
    costs: list[Tensor]  # (n, m) each, as the caller gave them
    a: Tensor  # float64, those of all problems joined; so are b and g
    b: Tensor
    g: Tensor  # initial column potentials

    @classmethod
    def joined(cls, groups: list[Group]) -> Group:
        if len(groups) == 1:
            return groups[0]
        return cls(
            [label for group in groups for label in group.labels],
            [cost for group in groups for cost in group.costs],
            torch.cat([group.a for group in groups]),
            torch.cat([group.b for group in groups]),
            torch.cat([group.g for group in groups]),
        )

    def masses(self) -> Tensor:
        """float64 (B,)."""
        return torch.stack([part.sum() for part in self.a.split([len(c) for c in self.costs])])


class Settings(NamedTuple):
    """What holds for all problems of a call."""

    max_iter: int
    storage: str
    backend: str


def solve(
    group: Group, reg: Tensor, tol: Tensor, pace: Tensor, settings: Settings
) -> list[_Problem]:
    """reg, tol and pace: (B,) on the CPU. Raises BackendError for what cannot run here."""
    max_iter, storage, backend = settings
    chosen = choose(backend, group.costs[0].device)
    if storage != "exact" and chosen != "triton":
        raise BackendError(f"storage {storage!r} is built for triton, not for {chosen}")
    if storage != "exact" and group.costs[0].dtype == torch.float64:
        raise ValueError(f"storage {storage!r}: the cost is float64, which this would not keep")
    if chosen != "torch" and (pace == reference.ANDERSON).any():
        raise BackendError(f"acceleration 'anderson' is built for torch, not for {chosen}")
    costs = [_solved_as(cost.detach()) for cost in group.costs]
    common = (reg, group.a, group.b, max_iter, tol, group.g, pace)
    if chosen == "triton":
        from dotresize.kernels import sinkhorn as kernel

        solution = kernel.sinkhorn(costs, *common, storage, group.labels)
    elif chosen == "cpp":
        solution = _launch_cpp(costs, *common)
    else:
        solution = _launch_reference(costs, *common)
    f, g, n_iter, error, status = solution
    rows, columns = ([cost.shape[axis] for cost in costs] for axis in (0, 1))
    words = [STATUS_WORDS[code] for code in status.tolist()]
    return list(
        map(
            _Problem,
            *(group.costs, reg.tolist(), f.split(rows), g.split(columns)),
            *(group.a.split(rows), group.b.split(columns)),
            *(n_iter.tolist(), error.tolist(), words, [chosen] * len(costs)),
        )
    )


def _solved_as(cost: Tensor) -> Tensor:
    """In float32 or float64, entries of a row side by side."""
    work = (cost if cost.dtype == torch.float64 else cost.float()).resolve_neg()
    return work if work.stride(1) == 1 else work.contiguous()


def _launch_reference(
    costs: list[Tensor],
    reg: Tensor,
    a: Tensor,
    b: Tensor,
    max_iter: int,
    tol: Tensor,
    g: Tensor,
    pace: Tensor,
) -> _Solution:
    (n, m), count = costs[0].shape, len(costs)
    whole = torch.stack(costs)
    f, found, *rest = reference.sinkhorn(
        *(whole, reg, a.view(count, n), b.view(count, m)),
        *(max_iter, tol, g.view(count, m), pace),
    )
    n_iter, error, status = rest
    return f.flatten(), found.flatten(), n_iter, error, status


def _launch_cpp(
    costs: list[Tensor],
    reg: Tensor,
    a: Tensor,
    b: Tensor,
    max_iter: int,
    tol: Tensor,
    g: Tensor,
    pace: Tensor,
) -> _Solution:
    count = len(costs)
    lines = [(cost.data_ptr(), cost.stride(0), *cost.shape) for cost in costs]
    table, momentum = torch.tensor(lines), pace == reference.MOMENTUM
    f, g = torch.empty_like(a), g.clone()
    n_iter, status = torch.empty(2, count, dtype=torch.int64)
    error = torch.empty(count, dtype=torch.float64)
    vectors = {"reg": reg, "tol": tol, "momentum": momentum, "a": a, "b": b, "f": f, "g": g}
    results = {"n_iter": n_iter, "marginal_error": error, "status": status}
    cpp().sinkhorn(
        batch=count,
        table=table.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in (vectors | results).items()},
        use_float64=costs[0].dtype == torch.float64,
        max_iter=max_iter,
        num_threads=threads(),
    )
    return f, g, n_iter, error, status
