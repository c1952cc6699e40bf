"""The L1 cost on one backend: shapes were checked by the callers."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from dotresize.ops import l1_fp16, l1_u8, reference
from dotresize.ops.arguments import address
from dotresize.ops.backends import BackendError, choose, cpp, threads
from dotresize.ops.constants import (
    DTYPES,
    GROUP,
    L1Operands,
    Quantisation,
    chunk_tokens,
    neurons_of,
)
from dotresize.ops.cost_operands import statistics

_BYTES = 3  # Dtype::kU8 in csrc/kernels.hpp
_BUILT = {
    "fp32": ("triton", "cpp", "torch"),
    "fp16": ("triton", "torch"),
    "u8": ("triton", "cpp", "torch"),
}
PRECISIONS = tuple(_BUILT)


def choose_for(precision: str, backend: str, device: torch.device) -> str:
    """Return the backend to run on; BackendError if it cannot, or not with this precision."""
    chosen = choose(backend, device)
    built = _BUILT[precision]
    if chosen not in built:
        raise BackendError(
            f"precision {precision!r} is built for {' and '.join(built)}, not for {chosen}: "
            f"use {' or '.join(repr(p) for p, names in _BUILT.items() if chosen in names)}"
        )
    return chosen


def launch(work: L1Operands, *, precision: str, backend: str) -> Tensor | None:
    """Compute a cost, or add to it.

    With a divisor, returns the minimum, maximum and mean of each problem: float64 (B, 3), not
    finite if an entry is not.
    """
    chosen = choose_for(precision, backend, work.x.device)
    if work.out.numel() == 0:
        return None if work.divisor is None else statistics(work.out)
    if precision == "fp16":
        return _launch_fp16(chosen, work)
    if precision == "u8":
        return _launch_u8(chosen, work)
    return _launch_fp32(chosen, work)


def _launch_fp32(backend: str, work: L1Operands) -> Tensor | None:
    if backend == "triton":
        from dotresize.kernels import l1_cost as kernel

        return kernel.l1_cost(work)
    if backend == "cpp":
        _sum_cpp(work._replace(x=readable(work.x), y=readable(work.y)), None)
    else:
        _launch_torch(work)
    return None if work.divisor is None else statistics(work.out)


def _launch_fp16(backend: str, work: L1Operands) -> Tensor | None:
    """Add float16 copies of a few tokens at a time into out."""
    found = None
    columns = 0 if work.y is None and work.targets is None else work.out.shape[2]
    for part in work.chunks(chunk_tokens(len(work.x), work.x.shape[2] + columns, 2)):
        scale = l1_fp16.scales(part.x, part.y)
        x, y = l1_fp16.halve(part.x, scale), None
        if part.y is not None or part.targets is not None:
            y = l1_fp16.halve(part.x if part.y is None else part.y, scale, part.targets)
        if backend == "triton":
            from dotresize.kernels import l1_cost as kernel

            found = kernel.l1_cost(part._replace(x=x, y=y, targets=None), scale)
        else:
            wide = scale.repeat_interleave(GROUP, 1)[:, :, None]
            y = None if y is None else y * wide
            _launch_torch(part._replace(x=x * wide, y=y, targets=None))
            found = None if part.divisor is None else statistics(part.out)
    return found


def _launch_torch(work: L1Operands) -> None:
    x, out = work.x.float(), work.out
    if work.y is not None:
        columns = work.y.float()
    elif work.targets is not None:
        columns = neurons_of(x, work.targets)
    else:
        columns = x
    out.copy_(reference.l1_cost(x, columns, out.clone() if work.accumulate else None))
    if work.divisor not in (None, 1.0):
        divide(out, work.divisor)


def divide(cost: Tensor, divisor: float) -> None:
    """Divide in place, rounded correctly: CUDA would multiply with a number's reciprocal."""
    cost /= torch.full((), divisor, dtype=cost.dtype, device=cost.device)


def _launch_u8(backend: str, work: L1Operands) -> Tensor | None:
    """Add bytes for most tokens, and float32 for the few of widest range, into out."""
    found = None
    neurons = work.x.shape[2] + (work.out.shape[2] if work.y is not None else 0)
    fitting = chunk_tokens(len(work.x), neurons, 1)
    for part in work.chunks(max(l1_u8.LEAST_CHUNK, min(l1_u8.CHUNK, fitting))):
        part = part._replace(x=readable(part.x), y=readable(part.y))
        plan = _quantisation(backend, part.x, part.y)
        if plan.token.shape[1]:
            _sum_bytes(backend, part._replace(divisor=None), plan)
            part = part._replace(accumulate=True)
        rest = part._replace(
            x=l1_u8.take(part.x, plan.exact),
            y=None if part.y is None else l1_u8.take(part.y, plan.exact),
        )
        found = _launch_fp32(backend, rest)
    return found


def _quantisation(backend: str, x: Tensor, y: Tensor | None) -> Quantisation:
    """Return how to quantise the tokens of x and y together."""
    ranges_of = l1_u8.ranges
    if backend == "triton":
        from dotresize.kernels import l1_quantize

        ranges_of = l1_quantize.ranges
    low, high = ranges_of(x)
    if y is not None:
        others = ranges_of(y)
        low, high = torch.minimum(low, others[0]), torch.maximum(high, others[1])
    return l1_u8.quantisation(low, high)


def _sum_bytes(backend: str, work: L1Operands, plan: Quantisation) -> None:
    """Add the cost of the tokens that become bytes."""
    if backend == "triton":
        from dotresize.kernels import l1_cost as kernel
        from dotresize.kernels.l1_quantize import quantize

        y = None if work.y is None else quantize(work.y, plan)
        kernel.l1_cost(work._replace(x=quantize(work.x, plan), y=y), plan.steps)
    elif backend == "cpp":
        y = None if work.y is None else _words(work.y, plan)
        _sum_cpp(work._replace(x=_words(work.x, plan), y=y), plan.steps)
    else:
        y = None if work.y is None else l1_u8.quantize(work.y, plan)
        _launch_torch(work._replace(x=l1_u8.quantize(work.x, plan), y=y))


@overload
def readable(value: Tensor) -> Tensor: ...


@overload
def readable(value: Tensor | None) -> Tensor | None: ...


def readable(value: Tensor | None) -> Tensor | None:
    """Return activations whose neurons lie side by side, as the C++ kernels read them."""
    return value if value is None or value.stride(2) == 1 else value.contiguous()


def _words(x: Tensor, plan: Quantisation) -> Tensor:
    """Return eight tokens of a neuron as the bytes of a word: int64 (B, ceil(quantised / 8), n)."""
    tokens = plan.token.shape[1]
    shape = x.shape[0], -(-tokens // 8), x.shape[2]
    words = torch.empty(shape, dtype=torch.int64, device="cpu")
    cpp().quantize(
        batch=x.shape[0],
        x=operand(x, None),
        tokens=tokens,
        token=address(plan.token, torch.int64),
        low=address(plan.low, torch.float32),
        dither=address(plan.dither, torch.float32),
        steps=address(plan.steps, torch.float32),
        out=address(words, torch.int64),
        num_threads=threads(),
    )
    return words


def operand(value: Tensor, columns: Tensor | None) -> object:
    """Return activations, or the neurons ``columns`` (B, count) of them, for a C++ kernel."""
    return cpp().Activations(
        data=address(value, value.dtype),
        dtype=_BYTES if value.dtype == torch.int64 else DTYPES.index(value.dtype),
        batch_stride=value.stride(0),
        token_stride=value.stride(1),
        count=value.shape[2] if columns is None else columns.shape[1],
        index=address(columns, torch.int64),
    )


def _sum_cpp(work: L1Operands, steps: Tensor | None) -> None:
    """Add a cost by the C++ kernel. steps: of bytes, which x and y then hold (``l1_u8``)."""
    x, targets = work.x, work.targets
    order, mirrored = None, x.shape[2] if work.y is None and targets is None else 0
    if targets is not None:
        order, mirrored = targets_first(targets, x.shape[2])
    cpp().l1_cost(
        batch=x.shape[0],
        rows=x.shape[1],
        x=operand(x, order),
        y=operand(x if work.y is None else work.y, targets),
        out=address(work.out, torch.float32),
        mirrored=mirrored,
        accumulate=work.accumulate,
        scale=1.0 if work.divisor is None else work.divisor,
        steps=address(steps, torch.float32),
        num_threads=threads(),
    )


def targets_first(index: Tensor, n: int) -> tuple[Tensor | None, int]:
    """Return the sources in the order targets, then the rest: (B, n), and how many lead.

    The targets' costs among themselves are then a symmetric block, of which one half is enough.
    None and 0 where a target occurs twice.
    """
    batch, m = index.shape
    chosen = torch.zeros(batch, n, dtype=torch.int64, device="cpu")
    chosen.scatter_add_(1, index, torch.ones_like(index))
    if (chosen > 1).any():
        return None, 0
    rest = (chosen == 0).nonzero()[:, 1].view(batch, n - m)
    return torch.cat([index, rest], 1), m
