"""Correctness of the Triton kernels against float64, at sizes from odd to the largest timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dotresize import L1CostAccumulator, l1_cost, sinkhorn
from dotresize.least_squares import over_tokens
from dotresize.ops import reference
from dotresize.ops.l1_launch import PRECISIONS

# Rows of the cost that are computed in float64; they meet every tile of columns.
ROWS = 48
Check = Callable[[torch.device], tuple[float, float]]  # the error, and what is accepted

L1_SIZES = {
    "full": [(1, 255, 13, 17), (3, 257, 130, 201), (2, 1000, 577, 469), (1, 16384, 4096, 3072)],
    "tiny": [(2, 7, 5, 3)],
}
GRADIENT_SIZES = {"full": [(2, 300, 577, 469)], "tiny": [(2, 7, 5, 3)]}
L1_LARGEST = {"full": (1, 4096, 14336, 11469), "tiny": (1, 3, 33, 131)}
SINKHORN_SIZES = {
    "full": [(1, 31, 29), (3, 577, 469), (64, 576, 464), (2, 1000, 768), (1, 4096, 3072)],
    "tiny": [(2, 5, 9)],
}
SINKHORN_LARGEST = {"full": (1, 14336, 11469), "tiny": (1, 2, 70)}
# What problems solved otherwise are called; storage, what differs from the usual, reg, and how far
# the plan may be off: a kept plan and a cost in 16 bits change the way there.
LAUNCHED, OF_THE_COST = {"stay": False}, {"stay": False, "keep": False}
WAYS: tuple[tuple[str, str, dict[str, bool], float, float], ...] = (
    ("exact", "exact", {}, 0.02, 1e-3),
    ("exact, launched", "exact", LAUNCHED, 0.02, 1e-3),
    ("exact, launched, of the cost", "exact", OF_THE_COST, 0.02, 2e-4),
    ("u16", "u16", {}, 0.05, 2e-3),
    ("u16, launched", "u16", LAUNCHED, 0.05, 2e-3),
)


def checks(size: str) -> Iterator[tuple[str, Check]]:
    """Return names and checks for "full" or "tiny" sizes."""
    for shape in (*L1_SIZES[size], L1_LARGEST[size]):
        for operands in ("y", "targets", "self"):
            if operands == "self" and shape[1] * shape[2] ** 2 > 10**12:
                continue
            for precision in PRECISIONS:
                accepted = l1_accepted(precision, shape[1])
                yield (
                    f"l1 {precision}, {operands}, {shape}",
                    lambda d, s=shape, o=operands, p=precision, e=accepted: (_l1(s, o, p, d), e),
                )
    for shape in GRADIENT_SIZES[size]:
        yield f"gradient of l1, {shape}", lambda d, s=shape: (_gradient(s, d), 2e-6)
    yield "l1 in chunks equals one call", _chunks
    for shape in (*SINKHORN_SIZES[size], SINKHORN_LARGEST[size]):
        for name, storage, given, reg, accepted in WAYS:
            yield (
                f"sinkhorn {name}, {shape}, reg {reg}",
                lambda d, s=shape, k=storage, g=given, r=reg, e=accepted: (
                    _sinkhorn(s, r, k, d, g),
                    e,
                ),
            )
    yield (
        "sinkhorn float64",
        lambda d: (_sinkhorn((2, 67, 45), 0.02, "exact", d, {}, double=True), 1e-9),
    )
    yield "sinkhorn ragged, each stops by itself", _ragged
    yield "sinkhorn far columns, forbidden pairs, no mass", _hard
    yield "sinkhorn twice gives the same bits", _same_bits
    for a, b in ((torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)):
        names = " x ".join(str(kind).removeprefix("torch.") for kind in (a, b))
        yield f"products of activations, {names}", lambda d, a=a, b=b: (_product(a, b, d), 2e-5)


@contextlib.contextmanager
def solved_by(**given: bool) -> Iterator[None]:
    """Have Sinkhorn problems solved in another way than the usual one (kernels/sinkhorn.py)."""
    from dotresize.kernels.sinkhorn import sinkhorn as kernel

    usual = kernel.__kwdefaults__
    kernel.__kwdefaults__ = usual | given
    try:
        yield
    finally:
        kernel.__kwdefaults__ = usual


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def _l1(shape: tuple[int, ...], operands: str, precision: str, device: torch.device) -> float:
    batch, tokens, n, m = shape
    x = torch.randn(batch, tokens, n, device=device)
    y, index = None, None
    if operands == "y":
        y = torch.randn(batch, tokens, m, device=device)
    elif operands == "targets":
        index = torch.stack([torch.randperm(n, device=device)[:m] for _ in range(batch)])
    options: dict[str, Any] = {"precision": precision, "backend": "triton"}
    cost = l1_cost(x, y, targets=index, reduction="sum", **options)
    worst = 0.0
    rows = torch.linspace(0, n - 1, min(n, ROWS), device=device).long()
    for b in range(batch):
        columns = x[b] if y is None else y[b]
        columns = columns if index is None else columns[:, index[b]]
        truth = torch.cdist(x[b][:, rows].mT.double(), columns.mT.double(), p=1)
        worst = max(worst, relative(cost[b, rows], truth))
    return worst


def l1_accepted(precision: str, tokens: int) -> float:
    """Return the relative error of normal activations that is accepted.

    The rounding errors of float16 and bytes are independent from token to token.
    """
    always, alone = {"fp32": (1e-5, 0.0), "fp16": (5e-5, 2e-3), "u8": (5e-4, 3e-2)}[precision]
    return always + alone / tokens**0.5


def _gradient(shape: tuple[int, ...], device: torch.device) -> float:
    """Check the gradient of halves of integers, many of which are equal."""
    batch, tokens, n, m = shape
    x, y = (
        (3 * torch.randn(batch, tokens, k, device=device)).round().div(2).requires_grad_()
        for k in (n, m)
    )
    incoming = torch.randn(batch, n, m, device=device)
    cost = l1_cost(x, y, reduction="sum", backend="triton")
    found = torch.autograd.grad(cost, (x, y), incoming)
    truth = reference.l1_cost_backward(x.detach().double(), y.detach().double(), incoming.double())
    return max(relative(one, other) for one, other in zip(found, truth, strict=True))


def _chunks(device: torch.device) -> tuple[float, float]:
    # The interpreter takes 16 s for the size of a GPU.
    tokens, n = (700, 70) if device.type == "cuda" else (70, 20)
    x = torch.randn(2, tokens, n, device=device)
    accumulator = L1CostAccumulator(n, batch=2, device=device, backend="triton")
    for part in x.split(3 * tokens // 7, dim=1):
        accumulator.update(part)
    return float((accumulator.result() - l1_cost(x, backend="triton")).abs().max()), 0.0


def _sinkhorn(
    shape: tuple[int, int, int],
    reg: float,
    storage: str,
    device: torch.device,
    given: dict[str, bool],
    double: bool = False,
) -> float:
    cost = torch.rand(shape, device=device, dtype=torch.float64 if double else torch.float32)
    options: dict[str, Any] = {"tol": 0, "max_iter": 10 if device.type == "cuda" else 3}
    with solved_by(**given):
        result = sinkhorn(cost, reg, storage=storage, backend="triton", **options)
    worst = 0.0
    for i in sorted({0, len(cost) // 2, len(cost) - 1}):
        truth = sinkhorn(cost[i].double(), reg, backend="torch", **options)
        worst = max(worst, relative(result[i].plan, truth.plan))
    return worst


def _ragged(device: torch.device) -> tuple[float, float]:
    shapes = [(12, 20), (4, 130), (7, 20), (1, 1)]
    costs = [torch.rand(shape, device=device) for shape in shapes]
    reg = torch.tensor([0.1, 0.2, 0.3, 1.0])
    result = sinkhorn(costs, reg, tol=1e-5, backend="triton")
    if not result.converged.all():
        return float("inf"), 1e-3
    worst = 0.0
    for i, cost in enumerate(costs):
        truth = sinkhorn(cost.double(), float(reg[i]), tol=1e-9, backend="torch")
        worst = max(worst, relative(result[i].plan, truth.plan))
    return worst, 1e-3


def _hard(device: torch.device) -> tuple[float, float]:
    cost = torch.rand(3, 20, 13, device=device)
    cost[0, :, 3] += 60.0
    cost[1, 2, :9] = torch.inf
    a = torch.full((3, 20), 1 / 20, device=device)
    a[2, ::2] = 0
    a[2] /= a[2].sum()
    options: dict[str, Any] = {"tol": 0, "max_iter": 20}
    result = sinkhorn(cost, 0.1, a, backend="triton", **options)
    truth = sinkhorn(cost.double(), 0.1, a.double(), backend="torch", **options)
    return max(relative(result[i].plan, truth[i].plan) for i in range(3)), 1e-3


def _product(a: torch.dtype, b: torch.dtype, device: torch.device) -> float:
    """Check products of tokens whose mean is not 0: sums of one sign show how they are rounded."""
    tokens = 8192 if device.type == "cuda" else 64
    u, v = (torch.randn(tokens, 48, device=device).add(1).to(kind) for kind in (a, b))
    return relative(over_tokens(u, v), u.double().mT @ v.double())


def _same_bits(device: torch.device) -> tuple[float, float]:
    cost = torch.rand(2, 20, 33, device=device)
    options: dict[str, Any] = {"tol": 1e-4, "backend": "triton"}
    first, second = (sinkhorn(cost, 0.05, **options).plan for _ in range(2))
    return float((first - second).abs().max()), 0.0
