"""Batched pairwise costs between neurons by any metric, from token-major activations."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from dotresize.ops.arguments import check_flag, check_tensor, check_word, exact
from dotresize.ops.backends import choose
from dotresize.ops.constants import neurons_of
from dotresize.ops.cost_operands import CostStatistics, given, statistics_of
from dotresize.ops.cost_operands import statistics as measured
from dotresize.ops.l1_cost import check_options, l1_cost
from dotresize.ops.product_cost import METRICS as PRODUCTS
from dotresize.ops.product_cost import ProductSums, with_graph

METRICS = ("l1", *PRODUCTS)


@overload
def activation_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    metric: str = "l1",
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def activation_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    metric: str = "l1",
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, CostStatistics]: ...


@exact
def activation_cost(
    x: Tensor,
    y: Tensor | None = None,
    *,
    metric: str = "l1",
    targets: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    out: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, CostStatistics]:
    r"""Return the pairwise distance between the activations of neurons, by a metric.

    .. math::
        \text{l1} &= \frac{1}{T} \sum_t |x_{ti} - y_{tj}| \qquad
        \text{sqeuclidean} = \frac{1}{T} \sum_t (x_{ti} - y_{tj})^2 \\
        \text{cosine} &= 1 - \frac{\sum_t x_{ti} \, y_{tj}}{\|x_i\| \, \|y_j\|} \qquad
        \text{correlation} = 1 - \frac{\sum_t (x_{ti} - \bar x_i)(y_{tj} - \bar y_j)}
                                      {\|x_i - \bar x_i\| \, \|y_j - \bar y_j\|}

    Args:
        x, y, targets, out, statistics: as of ``l1_cost``.
        metric: "l1", "correlation", "cosine" or "sqeuclidean".
        reduction: "mean" or "sum" over tokens, of "l1" and "sqeuclidean"; the others do not depend
            on it, and take the default alone.
        precision: of "l1", as of ``l1_cost``; the others take "fp32" alone.
        backend: "auto", "triton", "cpp" or "torch". "l1" has kernels on each; the others are
            products of matrices, which torch's libraries sum on every backend.

    Returns:
        float32 ``(n, m)`` or ``(B, n, m)``, not negative; with ``statistics`` that and a
        CostStatistics. It is differentiable by x and y; of metrics but "l1" any number of times, by
        float32 products of all tokens, which an autocast around ``backward`` rounds. The cost
        itself is of float32 products of 4,096 tokens, by torch's settings of them: where those
        allow TF32, it is rounded with them. Otherwise correlation and cosine are off by some 1e-6,
        and "sqeuclidean" by some 1e-6 of the neurons' variances, after what all neurons of a token
        have in common is taken off. The cost of two neurons that are equal may be off by as much
        from 0. A neuron that never changes correlates with none, and one that is 0 has no
        direction: their cost is 1.

    Raises:
        ValueError, RuntimeError: as of ``l1_cost``; a reduction or a precision that a metric does
            not have.

    Example:
        >>> import torch
        >>> from dotresize import activation_cost
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 3.0, 1.0]])  # 2 tokens, 3 neurons
        >>> activation_cost(x, metric="correlation").round(decimals=3)
        tensor([[0., 0., 2.],
                [0., 0., 2.],
                [2., 2., 0.]])
    """
    check_metric(metric, reduction, precision)
    if metric == "l1":
        rule = {"targets": targets, "reduction": reduction, "precision": precision, "out": out}
        return l1_cost(x, y, **rule, statistics=statistics, backend=backend)  # type: ignore[call-overload]
    statistics = check_flag("statistics", statistics)
    check_tensor("x", x)
    choose(backend, x.device)
    work = given(x, y, targets, out)
    divisor = float(work.x.shape[1]) if reduction == "mean" else 1.0
    batch, n, m = work.result.shape
    sums = ProductSums(metric, (batch, n, m), work.targets, x.device)
    sums.add(work.x, work.y)
    cost = work.result.copy_(sums.result(divisor))
    found = measured(cost)
    work.check_finite(found)
    if work.gradient:
        cost = _with_graph(cost, metric, x, y, work.targets, divisor)
    result = out if out is not None else cost[0] if work.single else cost
    return (result, statistics_of(found, work.single)) if statistics else result


def _with_graph(
    cost: Tensor,
    metric: str,
    x: Tensor,
    y: Tensor | None,
    targets: Tensor | None,
    divisor: float,
) -> Tensor:
    x = x if x.dim() == 3 else x[None]
    if targets is not None:
        y = neurons_of(x, targets)
    elif y is None:
        y = x
    return with_graph(cost, metric, x, y if y.dim() == 3 else y[None], divisor)


def check_metric(metric: str, reduction: str, precision: str) -> None:
    """Raise ValueError for a word that is no option, or not of this metric."""
    check_word("metric", metric, METRICS)
    check_options(reduction, precision)
    if metric != "l1" and precision != "fp32":
        raise ValueError(f"precision {precision!r}: is of metric 'l1'; {metric!r} takes 'fp32'")
    if metric in ("correlation", "cosine") and reduction != "mean":
        raise ValueError(f"reduction {reduction!r}: {metric!r} depends on none; leave it out")
