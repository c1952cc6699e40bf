"""Batched pairwise L1 cost between neurons, from token-major activations."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from dotresize.ops.arguments import check_flag, check_tensor, check_word, exact
from dotresize.ops.constants import L1Operands
from dotresize.ops.cost_operands import REDUCTIONS, CostStatistics, given, statistics_of
from dotresize.ops.l1_gradient import with_gradient
from dotresize.ops.l1_launch import PRECISIONS, choose_for, launch


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
    work = given(x, y, targets, out)
    divisor = float(work.x.shape[1]) if reduction == "mean" else 1.0
    operands = L1Operands(work.x, work.y, work.targets, work.result, False, divisor)
    found = launch(operands, precision=precision, backend=backend)
    assert found is not None  # there was a divisor
    work.check_finite(found)
    cost = out if out is not None else work.result[0] if work.single else work.result
    if work.gradient:
        cost = with_gradient(cost, x, y, work.targets, divisor, backend)
    return (cost, statistics_of(found, work.single)) if statistics else cost


def check_options(reduction: str, precision: str) -> None:
    """Raise ValueError for a word that is not an option."""
    check_word("reduction", reduction, REDUCTIONS)
    check_word("precision", precision, PRECISIONS)
