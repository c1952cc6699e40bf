"""Ridge regression from normal equations that are kept per calibration source.

    A = argmin sum_t |u_t A - v_t|^2 + lam |A - A0|^2,    lam = ridge x mean diagonal of sum u'u

Only the sums u'u, u'v and |v|^2 of each source are kept, so memory does not depend on the number
of tokens, and what a ridge does to a source that was left out costs one more solve and no pass
over its tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Normal equations square the condition number.
FLOAT = torch.float64

# Ridges that are tried; infinity leaves the prior as it is. On SmolLM2-135M sources left out ask
# for 0.1 to 3 where inputs are the residual, for more where they are inner neurons.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)


class NormalEquations:
    """Sums over the tokens of each source, in float64."""

    def __init__(self, sources: int, prior: Tensor) -> None:
        """prior: any (inputs, outputs) tensor on the device where the sums are to be kept."""
        inputs, outputs = prior.shape
        device = prior.device
        self.gram = torch.zeros(sources, inputs, inputs, dtype=FLOAT, device=device)
        self.cross = torch.zeros(sources, inputs, outputs, dtype=FLOAT, device=device)
        self.energy = torch.zeros(sources, dtype=FLOAT, device=device)

    def add(self, source: int, u: Tensor, v: Tensor) -> None:
        """Tokens of one source: u (..., inputs), v (..., outputs)."""
        u, v = u.flatten(0, -2).float(), v.flatten(0, -2).float()
        self.gram[source] += u.mT @ u
        self.cross[source] += u.mT @ v
        self.energy[source] += v.double().square().sum()

    def restrict(self, kept: Tensor) -> None:
        """Leave only some of the inputs. kept: int64 (inputs,)."""
        self.gram = self.gram[:, kept][:, :, kept]
        self.cross = self.cross[:, kept]

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """A for the tokens of all sources. prior: (inputs, outputs) float64; ridge may be inf."""
        return _solve(self.gram.sum(0), self.cross.sum(0), prior, ridge)

    def held_out_errors(self, prior: Tensor, ridge: float) -> Tensor:
        """Squared error on each source of A solved without it, relative to that of the prior."""
        gram = self.gram.sum(0) - self.gram
        cross = self.cross.sum(0) - self.cross
        error = self._errors(_solve(gram, cross, prior, ridge))
        base = self._errors(prior)
        return error / base.clamp_min(1e-12 * self.energy + torch.finfo(FLOAT).tiny)

    def _errors(self, a: Tensor) -> Tensor:
        fitted = ((self.gram @ a) * a - 2 * self.cross * a).sum((-2, -1))
        return (fitted + self.energy).clamp_min(0.0)


def _solve(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    if math.isinf(ridge):
        return prior.expand_as(cross)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # Inputs that are zero on every token leave the prior alone, whatever the ridge.
    lam = (ridge * mean).clamp_min(torch.finfo(FLOAT).tiny)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + lam * identity)
    return torch.cholesky_solve(cross + lam * prior, factor)


def choose_ridge(equations: NormalEquations, prior: Tensor, start: float = 1.0) -> float:
    """The ridge that serves unseen sources best: the least mean error over sources left out.

    A source's error counts relative to the prior's, so that none drowns the others; infinity, the
    prior itself, is among the candidates. The search goes downhill over ``RIDGES`` from ``start``,
    which is usually what a neighbour chose.
    """
    known: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in known:
            known[i] = float(equations.held_out_errors(prior, RIDGES[i]).mean())
        return known[i]

    best = RIDGES.index(start)
    while True:
        near = [i for i in (best - 1, best + 1) if 0 <= i < len(RIDGES)]
        better = min(near, key=error)
        if error(better) >= error(best):
            return RIDGES[best]
        best = better
