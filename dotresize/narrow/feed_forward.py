"""The choice of a feed-forward's inner neurons that stay, and of what the block then writes.

An inner neuron sits behind a non-linearity: its input weights cannot be merged without changing
the function, so kept neurons keep theirs, and only the output side is recombined. With h (tokens,
n) the inner activations, W (n, out) the writer, G = h'h and S the kept neurons, what is written is

    W_S = (G_SS + lam)^-1 (G_S W + lam W_S)

Backward elimination drops the neurons whose loss hurts least once the others have made up for it:
with V = (G + lam)^-1 and B = V h'y, dropping j costs |b_j|^2 / V_jj (the optimal brain surgeon of
Hassibi and Stork, 1993, for a least-squares problem), after which V and B are updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dotresize.least_squares import solve
from dotresize.narrow.options import FeedForwardMethod

# The ridge, in units of the mean diagonal of G: all of G is inverted, and few tokens fix its
# smallest directions.
RIDGE = 1e-2
# Neurons dropped between two updates, of those that are left. Each update costs as much as one
# that drops a single neuron.
BLOCK_SHARE = 1 / 64


class Eliminate(FeedForwardMethod):
    """Backward elimination, as in the module's header."""

    name = "eliminate"
    default = True

    def choose(
        self, gram: Tensor, cross: Tensor, writer: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        kept = eliminate(gram, cross, count)
        return kept, recombined(gram, writer, kept, RIDGE)


def recombined(gram: Tensor, writer: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return W_S of the module's header: ridge regression towards the weights that S had."""
    return solve(gram[kept][:, kept], gram[kept] @ writer, writer[kept], ridge)


def eliminate(gram: Tensor, cross: Tensor, count: int, *, ridge: float = RIDGE) -> Tensor:
    """Return the ``count`` inputs that backward elimination leaves: int64 (count,), ascending."""
    dropped = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    for drop, _ in _eliminated(gram, cross, count, ridge):
        dropped[drop] = True
    return (~dropped).nonzero().flatten()


class Elimination(NamedTuple):
    """The course of an elimination.

    Attributes:
        dropped: the inputs in the order in which they went.
        lost: [(inputs left, what was lost until then)], squares summed over the tokens.
    """

    dropped: Tensor
    lost: list[tuple[int, float]]

    def kept(self, count: int, inputs: int) -> Tensor:
        """Return the ``count`` of all inputs that were left at one time, ascending."""
        left = torch.ones(inputs, dtype=torch.bool, device=self.dropped.device)
        left[self.dropped[: inputs - count]] = False
        return left.nonzero().flatten()

    def lost_at(self, counts: Sequence[int]) -> list[float]:
        """Return what is lost with so many inputs left, between blocks in proportion."""
        left, lost = zip(*reversed(self.lost), strict=True)
        return [float(x) for x in numpy.interp(counts, left, lost)]


def elimination(gram: Tensor, cross: Tensor, count: int, *, ridge: float = RIDGE) -> Elimination:
    """Return how inputs are eliminated until ``count`` are left; see ``eliminate``."""
    order, lost = [], [(len(gram), 0.0)]
    for drop, more in _eliminated(gram, cross, count, ridge):
        order.append(drop)
        left, before = lost[-1]
        lost.append((left - len(drop), before + float(more)))
    return Elimination(torch.cat(order) if order else cross.new_empty(0).long(), lost)


def _inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric matrix, which rounding may have left indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if failed else torch.cholesky_inverse(factor)


def _eliminated(
    gram: Tensor, cross: Tensor, count: int, ridge: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs of each block that goes, and what is lost with them all."""
    lam = ridge * gram.diagonal().mean()
    inverse = gram.clone()
    inverse.diagonal().add_(lam)
    inverse = _inverse(inverse)
    solution = inverse @ cross
    dropped = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    left = len(gram)
    while left > count:
        loss = solution.square().sum(1) / inverse.diagonal()
        loss[dropped] = torch.inf
        block = min(max(1, int(BLOCK_SHARE * left)), left - count)
        drop = loss.topk(block, largest=False).indices
        column = inverse[:, drop]
        within = torch.linalg.inv(column[drop])
        yield drop, (solution[drop] * (within @ solution[drop])).sum()
        step = column @ within
        # In place, over all rows: to copy what is left takes longer than to update what is not.
        solution.addmm_(step, solution[drop], alpha=-1)
        inverse.addmm_(step, column.mT, alpha=-1)
        inverse[drop] = 0.0
        inverse[:, drop] = 0.0
        inverse.diagonal()[drop] = 1.0
        dropped[drop] = True
        left -= block
