"""A cost between neurons over activations that arrive in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.activation_cost import check_metric
from dotresize.ops.arguments import check_dense, check_whole, exact, index_tensor, shown
from dotresize.ops.cost_operands import (
    OVERFLOW,
    batched_index,
    check_activations,
    check_targets,
    operands,
)
from dotresize.ops.l1_launch import choose_for
from dotresize.ops.l1_sums import L1Sums
from dotresize.ops.product_cost import ProductSums


def _device(device: torch.device | str | None) -> torch.device:
    """Return a device with its number: "cuda" becomes "cuda:0"."""
    try:
        given = torch.device("cpu" if device is None else device)
        return torch.empty(0, dtype=torch.float32, device=given).device
    except (RuntimeError, TypeError, ValueError, OverflowError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {shown(device)}: {reason}") from None


class ActivationCostAccumulator:
    """``activation_cost`` over activations that arrive in chunks and are never all resident.

    Chunks may have any length. Of "l1" tokens are regrouped into blocks of 256, so the result is
    the one of a single call over all tokens, to the last bit; with "fp16" and "u8" a chunk is
    converted by itself and the result depends on the chunks, and the error of "u8" is stated for
    chunks of thousands of tokens. Of the others products are summed in float32 over 4,096 tokens of
    a chunk, and then in float64, which takes twice the memory of an "l1" cost. Nothing is
    differentiable; chunks that require a gradient are refused.

    Args:
        n: number of source neurons.
        metric, reduction, precision, backend: as in ``activation_cost``.
        targets: int64 ``(m,)`` or ``(B, m)``: the targets are these sources.
        m: number of targets when ``update`` is given their activations.
        batch: number of problems B; None for 2-D chunks.
        device: where the cost is kept; chunks must be there.

    Attributes:
        tokens: how many were added.
        metric, reduction, precision, backend: as they were given.

    Example:
        >>> import torch
        >>> from dotresize import ActivationCostAccumulator, activation_cost
        >>> x = torch.randn(1000, 8)
        >>> total = ActivationCostAccumulator(8, metric="correlation")
        >>> for chunk in x.split(300):
        ...     total.update(chunk)
        >>> torch.allclose(total.result(), activation_cost(x, metric="correlation"), atol=1e-6)
        True
    """

    def __init__(
        self,
        n: int,
        *,
        metric: str = "l1",
        targets: Tensor | None = None,
        m: int | None = None,
        batch: int | None = None,
        reduction: str = "mean",
        precision: str = "fp32",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        check_metric(metric, reduction, precision)
        for name, value in (("n", n), ("m", m), ("batch", batch)):
            if value is not None or name == "n":
                check_whole(name, value, 0)
        if targets is not None and m is not None:
            raise ValueError("give targets or m, not both")
        self.metric = metric
        self.reduction = reduction
        self.precision = precision
        self.backend = backend
        self.tokens = 0
        self._n, self._m, self._batch = n, m, batch
        self._device = _device(device)
        choose_for(precision, backend, self._device)
        problems = 1 if batch is None else batch
        if targets is not None:
            targets = index_tensor("targets", targets)
            check_targets(targets, problems, n, batch is None)
            targets = batched_index(targets.to(self._device), problems)
        columns = m if m is not None else n if targets is None else targets.shape[-1]
        shape = (problems, n, columns)
        self._sums: L1Sums | ProductSums
        if metric == "l1":
            self._sums = L1Sums(shape, targets, self._device, precision, backend)
        else:
            self._sums = ProductSums(metric, shape, targets, self._device)
        self._dtype: torch.dtype | None = None
        self._broken = False  # an update has ended halfway

    @exact
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add a chunk: x ``(T, n)`` or ``(B, T, n)``, and y likewise if the cost was made with m.

        Raises ValueError for shapes, dtypes or devices that do not fit, for activations that are
        not finite and for those that require a gradient; the chunk is then not counted.
        """
        dims = 2 if self._batch is None else 3
        self._check_whole()
        check_dense("x", x)
        if y is not None:
            check_dense("y", y)
        if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, y)):
            raise ValueError("x or y requires a gradient: a sum over chunks has none; detach them")
        if (y is None) != (self._m is None):
            raise ValueError(f"y is {'missing' if y is None else 'unexpected'}: m={self._m}")
        for name, value, width in (("x", x, self._n), ("y", y, self._m)):
            if value is None:
                continue
            batch_fits = self._batch is None or value.shape[:1] == (self._batch,)
            if value.dim() != dims or not batch_fits or value.shape[-1] != width:
                wanted = f"(T, {width})" if dims == 2 else f"({self._batch}, T, {width})"
                raise ValueError(f"{name} has shape {tuple(value.shape)}: must be {wanted}")
            if value.device != self._device:
                raise ValueError(f"{name} is on {value.device}, the cost on {self._device}")
        if self._dtype not in (None, x.dtype):
            raise ValueError(f"x has dtype {x.dtype}, earlier chunks {self._dtype}")
        x3, y3, _ = operands(x, y, None)
        for value in (x3, y3):
            if value is not None:
                check_activations(value, "y" if value is y3 else "x")
        self._dtype = x.dtype
        # What ends halfway, by Ctrl-C or for want of memory, leaves some entries with the chunk.
        self._broken = True
        self._sums.add(x3, y3)
        self._broken = False
        self.tokens += x3.shape[1]

    def _check_whole(self) -> None:
        if self._broken:
            raise ValueError("an update was interrupted, and half of it counted: make a new one")

    @exact
    def result(self) -> Tensor:
        """Return the cost over all tokens so far; more chunks may follow.

        Raises ValueError if there are none, or if an update was interrupted.
        """
        self._check_whole()
        if self.tokens == 0:
            raise ValueError("no tokens were added: a mean over none is undefined")
        divisor = float(self.tokens) if self.reduction == "mean" else 1.0
        total = self._sums.result(divisor)
        if not torch.isfinite(total).all():
            raise ValueError(OVERFLOW)
        return total[0] if self._batch is None else total


class L1CostAccumulator(ActivationCostAccumulator):
    """``l1_cost`` over activations that arrive in chunks: the metric "l1" of its base class.

    Args:
        n, targets, m, batch, reduction, precision, device, backend: as of
            ``ActivationCostAccumulator``.

    Example:
        >>> import torch
        >>> from dotresize import L1CostAccumulator, l1_cost
        >>> x = torch.randn(1000, 8)
        >>> total = L1CostAccumulator(8)
        >>> for chunk in x.split(300):
        ...     total.update(chunk)
        >>> torch.equal(total.result(), l1_cost(x))
        True
    """

    def __init__(
        self,
        n: int,
        *,
        targets: Tensor | None = None,
        m: int | None = None,
        batch: int | None = None,
        reduction: str = "mean",
        precision: str = "fp32",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            n,
            targets=targets,
            m=m,
            batch=batch,
            reduction=reduction,
            precision=precision,
            device=device,
            backend=backend,
        )
