"""The L1 cost over activations that arrive in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.arguments import check_dense, check_whole, exact, index_tensor, shown
from dotresize.ops.constants import TOKEN_BLOCK, L1Operands
from dotresize.ops.l1_cost import (
    batched_index,
    check_activations,
    check_options,
    check_targets,
    operands,
)
from dotresize.ops.l1_launch import choose_for, divide, launch


def _device(device: torch.device | str | None) -> torch.device:
    """Return a device with its number: "cuda" becomes "cuda:0"."""
    try:
        given = torch.device("cpu" if device is None else device)
        return torch.empty(0, dtype=torch.float32, device=given).device
    except (RuntimeError, TypeError, ValueError, OverflowError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {shown(device)}: {reason}") from None


class L1CostAccumulator:
    """``l1_cost`` over activations that arrive in chunks and are never all resident.

    Chunks may have any length: tokens are regrouped into blocks of 256, so the result is the one
    of a single call over all tokens, to the last bit. With "fp16" and "u8" a
    chunk is converted by itself and the result depends on the chunks; the error of "u8" is stated
    for chunks of thousands of tokens. Nothing is differentiable; chunks that require a gradient are
    refused.

    Args:
        n: number of source neurons.
        targets: int64 ``(m,)`` or ``(B, m)``: the targets are these sources.
        m: number of targets when ``update`` is given their activations.
        batch: number of problems B; None for 2-D chunks.
        reduction, precision, backend: as in ``l1_cost``.
        device: where the cost is kept; chunks must be there.

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
        check_options(reduction, precision)
        for name, value in (("n", n), ("m", m), ("batch", batch)):
            if value is not None or name == "n":
                check_whole(name, value, 0)
        if targets is not None and m is not None:
            raise ValueError("give targets or m, not both")
        self.reduction = reduction
        self.precision = precision
        self.backend = backend
        self.tokens = 0
        self._n, self._m, self._batch = n, m, batch
        self._device = _device(device)
        choose_for(precision, backend, self._device)
        self._targets = targets
        problems = 1 if batch is None else batch
        if targets is not None:
            targets = index_tensor("targets", targets)
            check_targets(targets, problems, n, batch is None)
            self._targets = targets.to(self._device)
        columns = m if m is not None else n if targets is None else targets.shape[-1]
        self._total = torch.zeros((problems, n, columns), dtype=torch.float32, device=self._device)
        # Tokens that do not fill a block yet, as views or copies: (x, y or None).
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._pending_tokens = 0
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
        self._add_chunk(x3, y3)
        self._broken = False
        self.tokens += x3.shape[1]

    def _check_whole(self) -> None:
        if self._broken:
            raise ValueError("an update was interrupted, and half of it counted: make a new one")

    def _add_chunk(self, x3: Tensor, y3: Tensor | None) -> None:
        start = 0
        if self._pending_tokens:
            start = min(TOKEN_BLOCK - self._pending_tokens, x3.shape[1])
            self._keep(x3[:, :start], None if y3 is None else y3[:, :start])
            if self._pending_tokens == TOKEN_BLOCK:
                self._flush()
        whole = (x3.shape[1] - start) // TOKEN_BLOCK * TOKEN_BLOCK
        stop = start + whole
        if whole:
            self._add(x3[:, start:stop], None if y3 is None else y3[:, start:stop], self._total)
        if stop < x3.shape[1]:
            self._keep(x3[:, stop:], None if y3 is None else y3[:, stop:])

    @exact
    def result(self) -> Tensor:
        """Return the cost over all tokens so far; more chunks may follow.

        Raises ValueError if there are none, or if an update was interrupted.
        """
        self._check_whole()
        if self.tokens == 0:
            raise ValueError("no tokens were added: a mean over none is undefined")
        total = self._total.clone()
        if self._pending_tokens:
            self._add(*self._joined(), total)
        if self.reduction == "mean":
            divide(total, float(self.tokens))
        if not torch.isfinite(total).all():
            raise ValueError("the sum of absolute differences overflows float32")
        return total[0] if self._batch is None else total

    def _keep(self, x: Tensor, y: Tensor | None) -> None:
        self._pending.append((x.clone(), None if y is None else y.clone()))
        self._pending_tokens += x.shape[1]

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        x = torch.cat([x for x, _ in self._pending], 1)
        ys = [y for _, y in self._pending if y is not None]
        return x, torch.cat(ys, 1) if ys else None

    def _flush(self) -> None:
        self._add(*self._joined(), self._total)
        self._pending, self._pending_tokens = [], 0

    def _add(self, x: Tensor, y: Tensor | None, total: Tensor) -> None:
        index = None if self._targets is None else batched_index(self._targets, x.shape[0])
        work = L1Operands(x, y, index, total, accumulate=True, divisor=None)
        launch(work, precision=self.precision, backend=self.backend)
