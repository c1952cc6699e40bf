r"""Costs between neurons that are matrix products: correlation and cosine distance, squared L2.

.. math:: 1 - \frac{\sum_t (x_{ti} - \bar x_i)(y_{tj} - \bar y_j)}
                   {\|x_i - \bar x_i\| \, \|y_j - \bar y_j\|}, \qquad
          1 - \frac{\sum_t x_{ti} \, y_{tj}}{\|x_i\| \, \|y_j\|}, \qquad
          \frac{1}{T} \sum_t (x_{ti} - y_{tj})^2

Each follows from means, squares and products of neurons, which torch's matrix products sum on every
backend: no kernel of ours would be faster. What would cancel comes off first: a neuron's mean over
a block of tokens, and, of squared distances, what all neurons of a token have in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.constants import neurons_of

METRICS = ("correlation", "cosine", "sqeuclidean")
# Products of so many tokens are summed in float32, and these sums in float64.
BLOCK = 4096
# A neuron whose deviation is at most this share of its mean does not change: that is rounding.
STILL = 1e-6


def with_graph(value: Tensor, metric: str, x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Return a computed cost so that gradients pass from it to x (B, T, n) and y (B, T, m).

    divisor: of squared distances.
    """
    x, y = x.float(), y.float()
    if metric == "sqeuclidean":
        common = _common(x).detach()  # no distance depends on it, and so no gradient
        x, y = x - common, y - common
        squares = x.square().sum(1)[:, :, None] + y.square().sum(1)[:, None, :]
        graph = (squares - 2.0 * (x.mT @ y)) / divisor
    else:
        graph = 1.0 - _unit(metric, x).mT @ _unit(metric, y)
    return graph + (value - graph).detach()


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


class ProductSums:
    """What a cost follows from, of activations that arrive in chunks.

    For each neuron there are its mean and its squares around it, for each pair the products around
    both means, in float64. Each block of tokens is summed around means of its own, and joined to
    what there is (Chan, Golub and LeVeque): no block is more than any other.
    """

    def __init__(
        self,
        metric: str,
        shape: tuple[int, int, int],
        targets: Tensor | None,
        device: torch.device,
    ) -> None:
        """Begin with no token. shape: (B, n, m); targets (B, m): which neurons of x are y."""
        batch, n, m = shape
        self._metric, self._targets, self._tokens = metric, targets, 0
        self._product = torch.zeros(shape, dtype=torch.float64, device=device)
        # For x and for y these are the means and the squares.
        self._moments = [
            torch.zeros(2, batch, count, dtype=torch.float64, device=device) for count in (n, m)
        ]

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """Add a chunk: x (B, T, n), and y (B, T, m) where it is not x, or some of x."""
        for start in range(0, x.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            self._join(x[:, block].float(), None if y is None else y[:, block].float())

    def _join(self, x: Tensor, y: Tensor | None) -> None:
        if self._metric == "sqeuclidean":
            common = _common(x)
            x, y = x - common, None if y is None else y - common
        own = _Block(x)
        other = own if y is None else _Block(y)
        if self._targets is not None:
            other = own.some(self._targets)
        before, count = self._tokens, x.shape[1]
        self._tokens += count
        weight = before * count / self._tokens
        apart = []
        for i, block in enumerate((own, other)):
            mean, square = self._moments[i]
            off = block.mean - mean
            apart.append(off)
            square = square + block.square + weight * off.square()
            self._moments[i] = torch.stack([mean + off * (count / self._tokens), square])
        between = weight * apart[0][:, :, None] * apart[1][:, None, :]
        self._product = self._product + own.times(other) + between

    def result(self, divisor: float) -> Tensor:
        """Return the cost over the tokens so far, float32 (B, n, m), not negative."""
        if self._metric != "sqeuclidean":
            return (1.0 - self.similarity()).clamp_min(0.0).float()
        (x, x_square), (y, y_square) = self._moments
        apart = x_square[:, :, None] + y_square[:, None, :] - 2.0 * self._product
        apart = apart.clamp_min(0.0) + self._tokens * (x[:, :, None] - y[:, None, :]).square()
        return (apart / divisor).float()

    def similarity(self) -> Tensor:
        """Return the correlation or the cosine, float64 (B, n, m); 0 where there is none."""
        product = self._product
        (x, x_square), (y, y_square) = self._moments
        if self._metric == "cosine":
            product = product + self._tokens * x[:, :, None] * y[:, None, :]
            squares = [x_square + self._tokens * x.square(), y_square + self._tokens * y.square()]
        else:
            squares = [
                torch.where(square > (STILL * mean).square() * self._tokens, square, 0.0)
                for mean, square in self._moments
            ]
        x_length, y_length = (torch.where(s > 0, s, torch.inf).rsqrt() for s in squares)
        return product * x_length[:, :, None] * y_length[:, None, :]


class _Block:
    """A block of tokens around its means, in float32 at a scale that keeps squares within it.

    Attributes:
        mean, square: of each neuron (B, n), float64; the squares are around the mean.
    """

    def __init__(self, x: Tensor) -> None:
        """Take off the means. x: float32 (B, T, n)."""
        self.mean = x.mean(1, dtype=torch.float64)
        around = x - self.mean[:, None].float()
        scale = _scale(around)
        self._unit, self._scale = around / scale, scale[:, 0].double()
        self.square = self._unit.square().sum(1, dtype=torch.float64) * self._scale.square()

    def some(self, targets: Tensor) -> _Block:
        """Return the block of some of the neurons, int64 (B, m)."""
        found = object.__new__(_Block)
        found._unit = neurons_of(self._unit, targets)
        found._scale, found.mean, found.square = (
            value.gather(1, targets) for value in (self._scale, self.mean, self.square)
        )
        return found

    def times(self, other: _Block) -> Tensor:
        """Return the products around both means, float64 (B, n, m)."""
        product = (self._unit.mT @ other._unit).double()
        return product * self._scale[:, :, None] * other._scale[:, None, :]
