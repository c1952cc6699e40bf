"""Batched pairwise L1 cost between neurons, from token-major activations."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from dotresize.ops.arguments import (
    check_dense,
    check_flag,
    check_tensor,
    check_word,
    exact,
    index_tensor,
)
from dotresize.ops.constants import L1Operands
from dotresize.ops.l1_gradient import with_gradient
from dotresize.ops.l1_launch import DTYPES, PRECISIONS, choose_for, launch

_REDUCTIONS = ("mean", "sum")


class CostStatistics(NamedTuple):
    """Statistics of each problem's cost, to choose reg by: numbers, or float64 ``(B,)``.

    Example:
        >>> import torch
        >>> from dotresize import l1_cost
        >>> _, found = l1_cost(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), statistics=True)
        >>> found.maximum, found.mean
        (0.5, 0.25)
    """

    minimum: float | Tensor
    maximum: float | Tensor
    mean: float | Tensor


@overload
def l1_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def l1_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, CostStatistics]: ...


@exact
def l1_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, CostStatistics]:
    r"""Return the pairwise L1 distance between the activations of neurons.

    .. math:: C_{ij} = \frac{1}{T} \sum_{t=1}^{T} |x_{ti} - y_{tj}|

    Tokens may be anything that neurons are compared over, such as the inputs of their weights.

    Args:
        x: source activations, ``(T, n)`` or ``(B, T, n)``; float32, float16 or bfloat16.
        y: target activations, ``(T, m)`` or ``(B, T, m)``, of the same dtype and device.
        targets: int64 ``(m,)`` or ``(B, m)``, or a list or array of such, instead of y:
            ``y = x[..., targets]``; copied on a GPU only.
            With neither, y = x and only half of the pairs are computed.
        reduction: "mean" or "sum" over tokens.
        precision: "fp32": exact differences, float32 sums over blocks of 256 tokens and then over
            blocks; relative error about 1e-6 up to 1e5 tokens. "fp16" (triton and torch backends):
            activations in float16 after an exact scaling of every 16 tokens, whose differences are
            summed in float16 (``dotresize/ops/l1_fp16.py``). "u8": most tokens as bytes
            (``dotresize/ops/l1_u8.py``); on a CPU two to three times as fast. On the unnormalised
            residual stream of SmolLM2-135M, 4096 tokens, over its 61 norms, the worst median
            relative error of an entry was 4.9e-5 for "fp16" and 7.3e-4 for "u8", the largest of
            all 2.8e-4 and 8.1e-3 (``benchmarks/results/precision.jsonl``). Where one token carries
            nearly all of a cost, "fp16" is off by up to 2e-3. Costs of equal neurons are exactly 0.
            Both take a copy of some thousand tokens at a time.
        out: float32 tensor of the result's shape to write into; not if x or y requires a gradient.
        statistics: also return the cost's minimum, maximum and mean; on a GPU they come with the
            cost, without another pass.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        float32 ``(n, m)`` or ``(B, n, m)``, whatever torch's default dtype; with ``statistics``
        that and a CostStatistics. The cost is differentiable by x and y, once (``l1_gradient.py``):
        sums of the signs of exact differences, whatever the precision; equal activations have the
        subgradient 0. The statistics are constants.

    Raises:
        ValueError: wrong shapes, dtypes, devices or indices; no tokens; activations that are not
            finite (names the problem and the neuron).
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from dotresize import l1_cost
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])  # 2 tokens, 3 neurons
        >>> l1_cost(x, targets=torch.tensor([0]))
        tensor([[0.0000],
                [0.5000],
                [1.5000]])
    """
    check_options(reduction, precision)
    statistics = check_flag("statistics", statistics)
    check_tensor("x", x)
    choose_for(precision, backend, x.device)  # raises before anything is looked at
    check_dense("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: must be (T, n) or (B, T, n)")
    single = x.dim() == 2
    x3, y3, index = operands(x, y, targets)
    if x3.shape[1] == 0:
        raise ValueError("x has no tokens: there must be at least one")
    shape = (x3.shape[0], x3.shape[2], _count(x3, y3, index))
    if out is not None and _wants_gradient(x, y):
        raise ValueError("out: carries no gradient, and x or y requires one; leave out away")
    result = _check_out(out, shape, single, x.device)
    divisor = float(x3.shape[1]) if reduction == "mean" else 1.0
    work = L1Operands(x3, y3, index, result, accumulate=False, divisor=divisor)
    found = launch(work, precision=precision, backend=backend)
    assert found is not None  # there was a divisor
    # The cost is finite if the activations are; only if not, look for the neuron at fault.
    if result.numel() and not torch.isfinite(found).all():
        check_activations(x3, "x")
        if y3 is not None:
            check_activations(y3, "y")
        raise ValueError("the sum of absolute differences overflows float32")
    cost = out if out is not None else result[0] if single else result
    if _wants_gradient(x, y):
        cost = with_gradient(cost, x, y, index, divisor, backend)
    if not statistics:
        return cost
    return cost, CostStatistics(*(found[0].tolist() if single else found.unbind(1)))


def _wants_gradient(x: Tensor, y: Tensor | None) -> bool:
    wanted = x.requires_grad or (y is not None and y.requires_grad)
    return wanted and torch.is_grad_enabled()


def check_options(reduction: str, precision: str) -> None:
    """Raise ValueError for a word that is not an option."""
    check_word("reduction", reduction, _REDUCTIONS)
    check_word("precision", precision, PRECISIONS)


def operands(
    x: Tensor, y: Tensor | None, targets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return x and y as (B, T, neurons), targets as contiguous (B, m), all checked."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: must be float32, float16 or bfloat16")
    if y is not None and targets is not None:
        raise ValueError("give y or targets, not both")
    x3 = (x if x.dim() == 3 else x[None]).detach().resolve_neg()
    if y is not None:
        check_dense("y", y)
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"y is {y.dtype} on {y.device}, x is {x.dtype} on {x.device}")
        if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: all but the last axis must be as in x, "
                f"{tuple(x.shape)}"
            )
        return x3, (y if y.dim() == 3 else y[None]).detach().resolve_neg(), None
    if targets is None:
        return x3, None, None
    if not isinstance(targets, Tensor):
        targets = index_tensor("targets", targets).to(x.device)
    check_targets(targets, x3.shape[0], x3.shape[2], x.dim() == 2)
    if targets.device != x.device:
        raise ValueError(f"targets are on {targets.device}, x on {x.device}")
    return x3, None, batched_index(targets, x3.shape[0])


def batched_index(targets: Tensor, batch: int) -> Tensor:
    """Return targets as contiguous (B, m)."""
    return (targets if targets.dim() == 2 else targets.expand(batch, -1)).contiguous()


def check_targets(targets: Tensor, batch: int, n: int, single: bool) -> None:
    """Raise ValueError unless targets are int64 (m,) or, for a batch, (batch, m), within 0..n-1."""
    check_dense("targets", targets)
    shapes: tuple[int, ...] = (1,) if single else (1, 2)
    wrong_batch = targets.dim() == 2 and targets.shape[0] != batch
    if targets.dtype != torch.int64 or targets.dim() not in shapes or wrong_batch:
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 (m,)"
            + ("" if single else f" or ({batch}, m)")
        )
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= n):
        bad = targets[(targets < 0) | (targets >= n)][0].item()
        raise ValueError(f"targets hold {bad}: must be from 0 to {n - 1}")


def _check_out(
    out: Tensor | None, shape: tuple[int, int, int], single: bool, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    check_dense("out", out)
    wanted = shape[1:] if single else shape
    if (
        tuple(out.shape) != wanted
        or out.dtype != torch.float32
        or out.device != device
        or not out.is_contiguous()
        or out.is_neg()
        or (out.requires_grad and torch.is_grad_enabled())
    ):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}: must be contiguous "
            f"float32 of shape {wanted} on {device}, without a gradient of its own"
        )
    return out[None] if single else out


def _count(x: Tensor, y: Tensor | None, index: Tensor | None) -> int:
    return y.shape[2] if y is not None else x.shape[2] if index is None else index.shape[1]


def check_activations(value: Tensor, name: str) -> None:
    """Raise ValueError naming the first problem and neuron that are not finite.

    value: (B, T, n).
    """
    finite = torch.isfinite(value)
    if finite.all():
        return
    problem, neuron = (~finite.all(1)).nonzero()[0].tolist()
    raise ValueError(f"activations {name} of problem {problem}, neuron {neuron} are not finite")
