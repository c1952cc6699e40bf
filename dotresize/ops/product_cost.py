r"""Costs between neurons that are matrix products: correlation and cosine distance, squared L2.

.. math:: 1 - \frac{\sum_t (x_{ti} - \bar x_i)(y_{tj} - \bar y_j)}
                   {\|x_i - \bar x_i\| \, \|y_j - \bar y_j\|}, \qquad
          1 - \frac{\sum_t x_{ti} \, y_{tj}}{\|x_i\| \, \|y_j\|}, \qquad
          \frac{1}{T} \sum_t (x_{ti} - y_{tj})^2

Each follows from the products and the squares of neurons, which torch's matrix products sum on
every backend: no kernel of ours would be faster. Before them comes off what would cancel in them:
a neuron's mean for the correlation, and what all neurons of a token have in common for squared
distances, which changes none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("correlation", "cosine", "sqeuclidean")
# Tokens whose products are summed in float32, before sums of float64.
BLOCK = 4096
# A neuron whose deviation is at most this share of its mean does not change: that is rounding.
STILL = 1e-6


def differentiable(metric: str, x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Return a cost through which gradients pass to x and y.

    x: (B, T, n), y: (B, T, m) -> float32 (B, n, m). divisor: of squared distances.
    """
    x, y = x.float(), y.float()
    if metric == "sqeuclidean":
        common = _common(x).detach()  # no distance depends on it, and so no gradient
        x, y = x - common, y - common
        return _distance(x.mT @ y, x.square().sum(1), y.square().sum(1), divisor)
    x, y = (_unit(metric, value) for value in (x, y))
    return (1.0 - x.mT @ y).clamp_min(0.0)


def _common(x: Tensor) -> Tensor:
    return x.mean(2, keepdim=True) if x.shape[2] else x.new_zeros(())


def _unit(metric: str, x: Tensor) -> Tensor:
    """Return neurons of length 1; 0 for one that has no direction."""
    # A distance does not depend on the scale, which keeps squares from leaving float32.
    x = x / _scale(x).detach()
    still = torch.zeros_like(x[:, :1])
    if metric == "correlation":
        mean = x.mean(1, keepdim=True)
        still = (STILL * mean).square() * x.shape[1]
        x = x - mean
    square = x.square().sum(1, keepdim=True)
    moving = square > still
    return x * torch.where(moving, square, 1.0).rsqrt() * moving


def _scale(x: Tensor) -> Tensor:
    """Return the largest magnitude of each neuron, (B, 1, n); 1 where all are 0."""
    largest = x.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _distance(product: Tensor, x_square: Tensor, y_square: Tensor, divisor: float) -> Tensor:
    apart = x_square[:, :, None] + y_square[:, None, :] - 2.0 * product
    return (apart / divisor).clamp_min(0.0)


class ProductSums:
    """The sums over tokens that a cost follows from, of activations that arrive in chunks.

    Products of ``BLOCK`` tokens are summed in float32, and those sums in float64. What comes off a
    neuron, and its scale, are those of the first chunk: they need not be exact.
    """

    def __init__(self, metric: str, shape: tuple[int, int, int], device: torch.device) -> None:
        """Begin with no token. shape: (B, n, m)."""
        batch, n, m = shape
        self._metric = metric
        self._product = torch.zeros(shape, dtype=torch.float64, device=device)
        # Sum and sum of squares of each neuron of x and of y.
        self._moments = [
            torch.zeros(2, batch, count, dtype=torch.float64, device=device) for count in (n, m)
        ]
        self._first: list[tuple[Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None, targets: Tensor | None) -> None:
        """Add a chunk: x (B, T, n), and y (B, T, m), or targets (B, m) that y is, or neither."""
        for start in range(0, x.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            self._add(x[:, block].float(), None if y is None else y[:, block].float(), targets)
        self.tokens += x.shape[1]

    def _add(self, x: Tensor, y: Tensor | None, targets: Tensor | None) -> None:
        if self._metric == "sqeuclidean":
            common = _common(x)
            x, y = x - common, None if y is None else y - common
        else:
            if not self._first:
                self._first = [self._taken_off(value) for value in (x, y) if value is not None]
            x = (x - self._first[0][0]) / self._first[0][1]
            y = None if y is None else (y - self._first[1][0]) / self._first[1][1]
        if targets is not None:
            y = x.gather(2, targets[:, None, :].expand(-1, x.shape[1], -1))
        y = x if y is None else y
        self._product += x.mT @ y
        for moments, value in zip(self._moments, (x, y), strict=True):
            moments[0] += value.sum(1, dtype=torch.float64)
            moments[1] += value.square().sum(1, dtype=torch.float64)

    def _taken_off(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what comes off each neuron, and by what it is then divided."""
        shift = value.new_zeros(())
        if self._metric == "correlation":
            shift = value.mean(1, keepdim=True)
        return shift, _scale(value)

    def result(self, divisor: float, targets: Tensor | None = None) -> Tensor:
        """Return the cost over the tokens so far, float32 (B, n, m)."""
        (x_sum, x_square), (y_sum, y_square) = self._moments
        product = self._product
        if self._metric == "sqeuclidean":
            return _distance(product, x_square, y_square, divisor).float()
        if self._metric == "correlation":
            product = product - x_sum[:, :, None] * y_sum[:, None, :] / self.tokens
            x_first, *others = (shift / scale for shift, scale in self._first)
            y_first = others[0] if others else x_first
            if targets is not None:
                y_first = y_first.gather(2, targets[:, None, :])
            x_square = self._deviations(x_sum, x_square, x_first)
            y_square = self._deviations(y_sum, y_square, y_first)
        lengths = (
            torch.where(square > 0, square, torch.inf).rsqrt() for square in (x_square, y_square)
        )
        x_length, y_length = lengths
        return (1.0 - product * x_length[:, :, None] * y_length[:, None, :]).clamp_min(0.0).float()

    def _deviations(self, total: Tensor, square: Tensor, first: Tensor) -> Tensor:
        """Return the squares around the mean; 0 for a neuron that does not change."""
        mean = total / self.tokens
        found = square - total * mean
        still = (STILL * (mean + first[:, 0])).square() * self.tokens
        return torch.where(found > still, found, 0.0)
