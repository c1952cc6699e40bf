"""Sinkhorn on one backend: the problems were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dotresize import reference
from dotresize.ops.backends import BackendError, choose, cpp
from dotresize.ops.result import STATUS_WORDS, _Problem

STORAGES = ("exact", "u16")
_Solution = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Group(NamedTuple):
    """Problems that are solved together, of one dtype and device."""

    labels: Sequence[int]  # the caller's numbers
    costs: list[Tensor]  # (n, m) each, as the caller gave them
    whole: Tensor | None  # the same as one (B, n, m), if the caller gave that
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
            None,
            torch.cat([group.a for group in groups]),
            torch.cat([group.b for group in groups]),
            torch.cat([group.g for group in groups]),
        )


def solve(
    group: Group, reg: Tensor, tol: Tensor, max_iter: int, storage: str, backend: str
) -> list[_Problem]:
    """reg and tol: float64 (B,) on the CPU. Raises BackendError for what cannot run here."""
    device = group.costs[0].device
    chosen = choose(backend, device)
    if storage != "exact" and chosen != "triton":
        raise BackendError(f"storage {storage!r} is built for triton, not for {chosen}")
    if storage != "exact" and group.costs[0].dtype == torch.float64:
        raise ValueError(f"storage {storage!r}: the cost is float64, which this would not keep")
    if chosen == "triton":
        from dotresize.kernels import sinkhorn as kernel

        works = [_unit_stride(cost) for cost in group.costs]
        f, g, n_iter, error, status = kernel.sinkhorn(
            *(works, reg, group.a, group.b, max_iter, tol, group.g, storage, group.labels)
        )
    else:
        whole = torch.stack(group.costs) if group.whole is None else group.whole.detach()
        batch, n, m = whole.shape
        work = whole if whole.dtype == torch.float64 else whole.float()
        a, b, start = group.a.view(batch, n), group.b.view(batch, m), group.g.view(batch, m)
        launch = _launch_cpp if chosen == "cpp" else reference.sinkhorn
        f, g, n_iter, error, status = launch(work.contiguous(), reg, a, b, max_iter, tol, start)
        f, g = f.flatten(), g.flatten()
    problems = zip(
        *(group.costs, reg.tolist()),
        f.split([cost.shape[0] for cost in group.costs]),
        g.split([cost.shape[1] for cost in group.costs]),
        *(n_iter.tolist(), error.tolist(), status.tolist()),
        strict=True,
    )
    return [
        _Problem(cost, reg_i, f_i, g_i, iterations, error_i, STATUS_WORDS[code], chosen)
        for cost, reg_i, f_i, g_i, iterations, error_i, code in problems
    ]


def _unit_stride(cost: Tensor) -> Tensor:
    work = cost if cost.dtype == torch.float64 else cost.float()
    return work if work.stride(1) == 1 else work.contiguous()


def _launch_cpp(
    cost: Tensor, reg: Tensor, a: Tensor, b: Tensor, max_iter: int, tol: Tensor, g: Tensor
) -> _Solution:
    batch, n, m = cost.shape
    f = torch.empty(batch, n, dtype=torch.float64)
    n_iter = torch.empty(batch, dtype=torch.int64)
    error = torch.empty(batch, dtype=torch.float64)
    status = torch.empty(batch, dtype=torch.int64)
    problems = cpp().SinkhornProblems(
        batch=batch,
        n=n,
        m=m,
        cost=cost.data_ptr(),
        reg=reg.data_ptr(),
        tol=tol.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        n_iter=n_iter.data_ptr(),
        marginal_error=error.data_ptr(),
        status=status.data_ptr(),
    )
    cpp().sinkhorn(
        problems,
        use_float64=cost.dtype == torch.float64,
        max_iter=max_iter,
        num_threads=torch.get_num_threads(),
    )
    return f, g, n_iter, error, status
