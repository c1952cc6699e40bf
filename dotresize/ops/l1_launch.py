"""The L1 cost on one backend: shapes were checked by the callers."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize import reference
from dotresize.ops import halves, octets
from dotresize.ops.backends import BackendError, choose, cpp, threads

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OCTETS = 3  # Dtype::kOctets in csrc/kernels.hpp
_BUILT = {
    "fp32": ("triton", "cpp", "torch"),
    "fp16": ("triton", "torch"),
    "u8": ("cpp", "torch"),
}
PRECISIONS = tuple(_BUILT)


def choose_for(precision: str, backend: str, device: torch.device) -> str:
    """The backend to run on; BackendError if it cannot, or not with this precision."""
    chosen = choose(backend, device)
    built = _BUILT[precision]
    if chosen not in built:
        raise BackendError(
            f"precision {precision!r} is built for {' and '.join(built)}, not for {chosen}: "
            f"use {' or '.join(repr(p) for p, names in _BUILT.items() if chosen in names)}"
        )
    return chosen


def launch(
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    *,
    accumulate: bool,
    divisor: float | None,
    precision: str,
    backend: str,
) -> Tensor | None:
    """out (+)= sum over tokens, then out /= divisor if there is one.

    x (B, T, n), y (B, T, m) or index (B, m), out (B, n, m). With a divisor, returns the minimum,
    maximum and mean of each problem: float64 (B, 3), not finite if an entry is not.
    """
    chosen = choose_for(precision, backend, x.device)
    if out.numel() == 0:
        return None if divisor is None else out.new_full((len(out), 3), torch.nan).double()
    if precision == "fp16":
        return _launch_halves(chosen, x, y, index, out, accumulate, divisor)
    if chosen == "triton":
        from dotresize.kernels import l1_cost as kernel

        return kernel.l1_cost(x, y, index, out, accumulate=accumulate, divisor=divisor)
    scale = 1.0 if divisor is None else divisor
    if precision == "u8":
        _launch_octets(chosen, x, y, index, out, accumulate, scale)
    elif chosen == "cpp":
        _launch_cpp(x, y, index, out, accumulate, scale)
    else:
        _launch_torch(x, y, index, out, accumulate, scale)
    return None if divisor is None else statistics(out)


def statistics(cost: Tensor) -> Tensor:
    """Minimum, maximum and mean of each problem: float64 (B, 3), not finite if an entry is not."""
    flat = cost.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    return torch.stack([low.double(), high.double(), flat.mean(1, dtype=torch.float64)], 1)


def _launch_halves(
    backend: str,
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    accumulate: bool,
    divisor: float | None,
) -> Tensor | None:
    """float16 copies of a few tokens at a time, added into out."""
    found = None
    columns = 0 if y is None and index is None else out.shape[2]
    step = halves.chunk_tokens(len(x), x.shape[2] + columns, 2)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        last = divisor if part.stop >= x.shape[1] else None
        xs, ys = x[:, part], None if y is None else y[:, part]
        scale = halves.scales(xs, ys)
        half_x, half_y = halves.halve(xs, scale), None
        if ys is not None or index is not None:
            half_y = halves.halve(xs if ys is None else ys, scale, index)
        if backend == "triton":
            from dotresize.kernels import l1_cost as kernel

            found = kernel.l1_cost(
                half_x, half_y, None, out, accumulate=accumulate, divisor=last, scale=scale
            )
        else:
            wide = scale.repeat_interleave(halves.GROUP, 1)[:, :, None]
            half_y = None if half_y is None else half_y * wide
            _launch_torch(half_x * wide, half_y, None, out, accumulate, last or 1.0)
            found = None if last is None else statistics(out)
        accumulate = True
    return found


def _launch_torch(
    x: Tensor, y: Tensor | None, index: Tensor | None, out: Tensor, accumulate: bool, scale: float
) -> None:
    x = x.float()
    if y is not None:
        columns = y.float()
    elif index is not None:
        columns = x.gather(2, index[:, None, :].expand(-1, x.shape[1], -1))
    else:
        columns = x
    out.copy_(reference.l1_cost(x, columns, out.clone() if accumulate else None))
    if scale != 1.0:
        divide(out, scale)


def divide(cost: Tensor, divisor: float) -> None:
    """In place and rounded correctly: by a number, CUDA would multiply with its reciprocal."""
    cost /= torch.full((), divisor, device=cost.device)


def _launch_octets(
    backend: str,
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    accumulate: bool,
    scale: float,
) -> None:
    """Bytes for most tokens and float32 for the few of widest range, both added into out."""
    for start in range(0, x.shape[1], octets.CHUNK):
        part = slice(start, start + octets.CHUNK)
        last = part.stop >= x.shape[1]
        xs, ys = x[:, part], None if y is None else y[:, part]
        plan = octets.plan(xs, ys)
        if plan.token.shape[1]:
            if backend == "cpp":
                words_y = None if ys is None else _words(ys, plan)
                _sum_cpp(_words(xs, plan), words_y, index, out, accumulate, 1.0, plan.steps)
            else:
                bytes_y = None if ys is None else octets.quantize(ys, plan)
                _launch_torch(octets.quantize(xs, plan), bytes_y, index, out, accumulate, 1.0)
            accumulate = True
        exact_x = octets.take(xs, plan.exact)
        exact_y = None if ys is None else octets.take(ys, plan.exact)
        sum_exact = _launch_cpp if backend == "cpp" else _launch_torch
        sum_exact(exact_x, exact_y, index, out, accumulate, scale if last else 1.0)
        accumulate = True


def _launch_cpp(
    x: Tensor, y: Tensor | None, index: Tensor | None, out: Tensor, accumulate: bool, scale: float
) -> None:
    x = x if x.stride(2) == 1 else x.contiguous()
    if y is not None:
        y = y if y.stride(2) == 1 else y.contiguous()
    _sum_cpp(x, y, index, out, accumulate, scale, None)


def _words(x: Tensor, plan: octets.Plan) -> Tensor:
    """int64 (B, ceil(quantised / 8), n): eight tokens of a neuron as the bytes of a word."""
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens = plan.token.shape[1]
    words = torch.empty(x.shape[0], -(-tokens // 8), x.shape[2], dtype=torch.int64)
    cpp().quantize(
        batch=x.shape[0],
        x=_operand(x, None),
        tokens=tokens,
        token=plan.token.data_ptr(),
        low=plan.low.data_ptr(),
        dither=plan.dither.data_ptr(),
        steps=plan.steps.data_ptr(),
        out=words.data_ptr(),
        num_threads=threads(),
    )
    return words


def _operand(value: Tensor, columns: Tensor | None) -> object:
    return cpp().Activations(
        data=value.data_ptr(),
        dtype=_OCTETS if value.dtype == torch.int64 else DTYPES.index(value.dtype),
        batch_stride=value.stride(0),
        token_stride=value.stride(1),
        count=value.shape[2] if columns is None else columns.shape[1],
        index=0 if columns is None else columns.data_ptr(),
    )


def _sum_cpp(
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    accumulate: bool,
    scale: float,
    steps: Tensor | None,
) -> None:
    order, mirrored = None, x.shape[2] if y is None and index is None else 0
    if index is not None:
        order, mirrored = _targets_first(index, x.shape[2])
    cpp().l1_cost(
        batch=x.shape[0],
        rows=x.shape[1],
        x=_operand(x, order),
        y=_operand(x if y is None else y, index),
        out=out.data_ptr(),
        mirrored=mirrored,
        accumulate=accumulate,
        scale=scale,
        steps=0 if steps is None else steps.data_ptr(),
        num_threads=threads(),
    )


def _targets_first(index: Tensor, n: int) -> tuple[Tensor | None, int]:
    """Sources in the order targets, then the rest: (B, n), and how many lead.

    The targets' costs among themselves are then a symmetric block, of which one half is enough.
    None and 0 where a target occurs twice.
    """
    batch, m = index.shape
    chosen = torch.zeros(batch, n, dtype=torch.int64).scatter_add_(1, index, torch.ones_like(index))
    if (chosen > 1).any():
        return None, 0
    rest = (chosen == 0).nonzero()[:, 1].view(batch, n - m)
    return torch.cat([index, rest], 1), m
