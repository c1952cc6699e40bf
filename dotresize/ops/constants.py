"""What every backend of an operator agrees on; also in csrc/kernels.hpp and csrc/momentum.hpp.

The kernels import this module and nothing else of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Activations have one of these.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tokens per partial sum of the L1 cost.
TOKEN_BLOCK = 256
# Tokens summed in float16 by the packed L1 cost: of activations up to 1024, 2 * 1024 * 16 < 65504.
GROUP = 16
# Bytes of copied activations at a time.
CHUNK_BYTES = 1 << 28

# Kernels take powers of two.
LOG2E = math.log2(math.e)
# How a Sinkhorn problem ended.
CONVERGED, MAX_ITER, INFEASIBLE, INVALID = range(4)
# What follows a column update.
PLAIN, MOMENTUM, ANDERSON = range(3)
# Momentum starts again where an error is below this share of the one before: plain steps that fall
# so fast need no help.
FAST_ENOUGH = 0.4


def far_potential(dtype: torch.dtype) -> float:
    """Return the potential beyond which an exponent in powers of two is no better than 2^-10."""
    return 2.0**-10 / torch.finfo(dtype).eps


def chunk_tokens(problems: int, neurons: int, size: int) -> int:
    """Return the tokens to copy at a time, a multiple of TOKEN_BLOCK; ``size`` bytes a neuron."""
    per_token = size * problems * neurons
    return max(TOKEN_BLOCK, CHUNK_BYTES // max(1, per_token) // TOKEN_BLOCK * TOKEN_BLOCK)


def neurons_of(x: Tensor, targets: Tensor) -> Tensor:
    """Return some neurons of activations: x (B, T, n), targets int64 (B, m) -> (B, T, m)."""
    return x.gather(2, targets[:, None, :].expand(-1, x.shape[1], -1))


class L1Operands(NamedTuple):
    """One L1 cost: ``out (+)= sum_t |x - y|``, then, unless more tokens follow, ``out /= divisor``.

    With neither y nor targets, y = x; with targets, y is these neurons of x.
    """

    x: Tensor  # (B, T, n)
    y: Tensor | None  # (B, T, m)
    targets: Tensor | None  # int64 (B, m)
    out: Tensor  # float32 (B, n, m)
    accumulate: bool
    divisor: float | None  # None: more tokens follow

    def chunks(self, tokens: int) -> Iterator[L1Operands]:
        """Yield the same cost by chunks of tokens; the last one alone is divided."""
        total = self.x.shape[1]
        for start in range(0, total, tokens):
            part = slice(start, start + tokens)
            yield self._replace(
                x=self.x[:, part],
                y=None if self.y is None else self.y[:, part],
                accumulate=self.accumulate or start > 0,
                divisor=self.divisor if part.stop >= total else None,
            )


class Quantisation(NamedTuple):
    """Says how tokens, by rising range, become bytes; the last ones stay exact.

    ``byte = floor((x - low) / step + dither)``: see l1_u8.py.
    """

    token: Tensor  # int64 (B, quantised)
    low: Tensor  # float32 (B, quantised): what byte 0 stands for
    dither: Tensor  # float32 (B, quantised)
    steps: Tensor  # float32 (B, blocks of TOKEN_BLOCK): the value of a byte's unit
    exact: Tensor  # int64 (B, the rest)


class L1Gradients(NamedTuple):
    """The gradients of one L1 cost by its activations; x, y and targets as in ``L1Operands``."""

    x: Tensor  # (B, T, n)
    y: Tensor | None  # (B, T, m)
    targets: Tensor | None  # int64 (B, m)
    gradient: Tensor  # float32 (B, n, m): what arrives at the cost
    divisor: float

    def index_of_tokens(self) -> Tensor:
        """Return the targets for every token: int64 (B, T, m)."""
        assert self.targets is not None
        return self.targets[:, None, :].expand(-1, self.x.shape[1], -1)

    def columns(self) -> Tensor:
        """Return y, be it given or neurons of x."""
        if self.y is not None:
            return self.y
        return self.x if self.targets is None else neurons_of(self.x, self.targets)


class SinkhornBatch(NamedTuple):
    """Sinkhorn problems that are solved together, of one dtype and device.

    Vectors of all problems are joined: with problems of n_i rows and m_i columns, ``a`` has
    sum n_i entries, ``b`` and ``g`` have sum m_i, all float64 on the costs' device. Numbers of a
    problem are float64 (B,), on the CPU.
    """

    labels: Sequence[int]  # the problems' numbers in the caller's list
    costs: Sequence[Tensor]  # (n_i, m_i), unit stride along rows
    a: Tensor
    b: Tensor
    g: Tensor  # column potentials to start from
    reg: Tensor
    tol: Tensor
    acceleration: Tensor  # int64 (B,): PLAIN, MOMENTUM or ANDERSON
    max_iter: int

    def part(self, members: Sequence[int]) -> SinkhornBatch:
        """Return some of the problems, by their places in this batch."""
        rows = self.a.split([len(cost) for cost in self.costs])
        columns = [v.split([cost.shape[1] for cost in self.costs]) for v in (self.b, self.g)]
        index = list(members)
        return SinkhornBatch(
            labels=[self.labels[i] for i in index],
            costs=[self.costs[i] for i in index],
            a=torch.cat([rows[i] for i in index]),
            b=torch.cat([columns[0][i] for i in index]),
            g=torch.cat([columns[1][i] for i in index]),
            reg=self.reg[index],
            tol=self.tol[index],
            acceleration=self.acceleration[index],
            max_iter=self.max_iter,
        )

    @classmethod
    def joined(cls, batches: Sequence[SinkhornBatch]) -> SinkhornBatch:
        """Return the problems of several batches as one."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            labels=[label for batch in batches for label in batch.labels],
            costs=[cost for batch in batches for cost in batch.costs],
            a=torch.cat([batch.a for batch in batches]),
            b=torch.cat([batch.b for batch in batches]),
            g=torch.cat([batch.g for batch in batches]),
            reg=torch.cat([batch.reg for batch in batches]),
            tol=torch.cat([batch.tol for batch in batches]),
            acceleration=torch.cat([batch.acceleration for batch in batches]),
            max_iter=batches[0].max_iter,
        )

    def masses(self) -> Tensor:
        """Return the mass of each problem, float64 (B,), on the costs' device."""
        return torch.stack(
            [part.sum() for part in self.a.detach().split([len(c) for c in self.costs])]
        )


class SinkhornSolution(NamedTuple):
    """What a backend returns of a ``SinkhornBatch``; numbers of a problem are (B,)."""

    f: Tensor  # float64, joined as ``a``
    g: Tensor  # float64, joined as ``b``
    n_iter: Tensor  # int64
    marginal_error: Tensor  # float64
    status: Tensor  # CONVERGED, MAX_ITER, INFEASIBLE or INVALID
