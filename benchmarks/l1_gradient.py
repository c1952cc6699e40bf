"""The gradient of the L1 cost by its activations, beside the cost itself and torch.cdist's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dotresize import BackendError, l1_cost
from dotresize.ops import reference
from dotresize.ops.backends import choose

from .workload import Case, Competitor, NotHere, Workload

CHECKED_TOKENS = 64

# "of" says whose gradient is wanted: of x and y, of x alone, or of x compared with itself.
CASES = [
    Case("gradient", {"tokens": 4096, "n": n, "m": m}, kind)
    for kind, n, m in (
        ("of both", 576, 468),
        ("of x", 576, 468),
        ("of itself", 576, 576),
        ("of both", 1024, 1024),
        ("of x", 1024, 1024),
        ("of itself", 1024, 1024),
    )
]


def build(case: Case, *, peers: bool = True) -> Workload:
    """Return competitors over seeded normal activations and a seeded gradient of the cost."""
    torch.manual_seed(0)
    x, y = (torch.randn(case.sizes["tokens"], case.sizes[axis]) for axis in ("n", "m"))
    incoming = torch.randn(x.shape[1], y.shape[1])
    operands = (x,) if case.kind == "of itself" else (x, y)
    wanted = 2 if case.kind == "of both" else 1
    columns = x if case.kind == "of itself" else y
    few = slice(0, CHECKED_TOKENS)
    by_x, by_y = reference.l1_cost_backward(
        x[None, few].double(), columns[None, few].double(), incoming[None].double()
    )
    truth = by_x + by_y if case.kind == "of itself" else torch.cat([by_x, by_y][:wanted], 2)

    def error(result: Any) -> float:
        found = torch.cat([value[few] for value in result], 1)
        return float((found.double() - truth[0]).norm() / truth.norm())

    work = Workload(error)
    for backend in ("cpp", "triton", "torch") if peers else ("cpp",):
        make = functools.partial(_ours, operands, wanted, incoming, backend)
        work.add(f"dotresize {backend}", make)
    # For the factor between the two: it is no gradient.
    work.add("dotresize cpp, the cost", lambda: _cost(operands))
    if peers:
        work.add("torch.cdist(p=1), backward", lambda: _cdist(operands, wanted, incoming))
    return work


def _leaves(operands: tuple[Tensor, ...], wanted: int) -> list[Tensor]:
    return [v.clone().requires_grad_(i < wanted) for i, v in enumerate(operands)]


def _ours(operands: tuple[Tensor, ...], wanted: int, incoming: Tensor, backend: str) -> Competitor:
    try:
        choose(backend, incoming.device)
    except BackendError as error:
        raise NotHere(str(error)) from None
    leaves = _leaves(operands, wanted)
    cost = l1_cost(*leaves, reduction="sum", backend=backend)
    return _backward(cost, leaves[:wanted], incoming)


def _cost(operands: tuple[Tensor, ...]) -> Competitor:
    return Competitor(lambda: l1_cost(*operands, reduction="sum", backend="cpp"), checked=False)


def _cdist(operands: tuple[Tensor, ...], wanted: int, incoming: Tensor) -> Competitor:
    leaves = _leaves(operands, wanted)
    cost = torch.cdist(leaves[0].T.contiguous(), leaves[-1].T.contiguous(), p=1)
    return _backward(cost, leaves[:wanted], incoming)


def _backward(cost: Tensor, leaves: list[Tensor], incoming: Tensor) -> Competitor:
    """Return the backward pass alone, of a cost that was computed before."""
    return Competitor(lambda: torch.autograd.grad(cost, leaves, incoming, retain_graph=True), 1e-5)
