"""The sums of the L1 cost over activations that arrive in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.constants import TOKEN_BLOCK, L1Operands
from dotresize.ops.l1_launch import divide, launch


class L1Sums:
    """Absolute differences summed over tokens, as ``product_cost.ProductSums`` sums products.

    Tokens are regrouped into blocks, so the result is that of one call, to the last bit.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        targets: Tensor | None,
        device: torch.device,
        precision: str,
        backend: str,
    ) -> None:
        """Begin with no token. shape: (B, n, m); targets (B, m): which neurons of x are y."""
        self._targets, self._precision, self._backend = targets, precision, backend
        self._total = torch.zeros(shape, dtype=torch.float32, device=device)
        # Tokens that do not fill a block yet, as views or copies: (x, y or None).
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._pending_tokens = 0

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """Add a chunk: x (B, T, n), and y (B, T, m) where it is not x, or some of x."""
        start = 0
        if self._pending_tokens:
            start = min(TOKEN_BLOCK - self._pending_tokens, x.shape[1])
            self._keep(x[:, :start], None if y is None else y[:, :start])
            if self._pending_tokens == TOKEN_BLOCK:
                self._add(*self._joined(), self._total)
                self._pending, self._pending_tokens = [], 0
        whole = (x.shape[1] - start) // TOKEN_BLOCK * TOKEN_BLOCK
        stop = start + whole
        if whole:
            self._add(x[:, start:stop], None if y is None else y[:, start:stop], self._total)
        if stop < x.shape[1]:
            self._keep(x[:, stop:], None if y is None else y[:, stop:])

    def result(self, divisor: float) -> Tensor:
        """Return the cost over the tokens so far, float32 (B, n, m)."""
        total = self._total.clone()
        if self._pending_tokens:
            self._add(*self._joined(), total)
        if divisor != 1.0:
            divide(total, divisor)
        return total

    def _keep(self, x: Tensor, y: Tensor | None) -> None:
        self._pending.append((x.clone(), None if y is None else y.clone()))
        self._pending_tokens += x.shape[1]

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        x = torch.cat([x for x, _ in self._pending], 1)
        ys = [y for _, y in self._pending if y is not None]
        return x, torch.cat(ys, 1) if ys else None

    def _add(self, x: Tensor, y: Tensor | None, total: Tensor) -> None:
        work = L1Operands(x, y, self._targets, total, accumulate=True, divisor=None)
        launch(work, precision=self._precision, backend=self._backend)
