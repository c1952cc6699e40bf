"""Ridge regression from normal equations.

    A = argmin sum_t |u_t A - v_t|^2 + lam |A - A0|^2,    lam = ridge x mean diagonal of sum u'u

Only the sums u'u and u'v are kept, so memory does not depend on the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.products import over_tokens

# Normal equations square the condition number.
FLOAT = torch.float64


class NormalEquations:
    """Sums over tokens: products of a chunk in float32, added up in float64."""

    def __init__(self, prior: Tensor) -> None:
        """prior: A0, (inputs, outputs) float64."""
        self.prior = prior
        self.gram = prior.new_zeros(len(prior), len(prior))
        self.cross = prior.new_zeros(prior.shape)  # contiguous, as sums over processes must be

    def add(self, u: Tensor, v: Tensor) -> None:
        """Tokens: u (..., inputs), v (..., outputs)."""
        u, v = u.flatten(0, -2), v.flatten(0, -2)
        self.gram += over_tokens(u, u)
        self.cross += over_tokens(u, v)

    def total(self) -> None:
        """Add up the sums of all processes, once every token has been added."""
        distributed.total(self.gram, self.cross)

    def restrict(self, kept: Tensor, prior: Tensor) -> None:
        """Leave only some of the inputs, int64 (inputs,), with a prior of their own."""
        self.prior = prior
        self.gram = self.gram[kept][:, kept]
        self.cross = self.cross[kept]

    def solve(self, ridge: float) -> Tensor:
        """A, (inputs, outputs); the sums are spent with it."""
        return solve(self.gram, self.cross, self.prior, ridge)


def solve(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """A of the module's header from its sums: gram (inputs, inputs); the others (inputs, outputs).

    gram and cross are overwritten: a copy is the largest thing there is in a narrow memory.
    Not by Cholesky: products in float32 leave a rank-deficient gram slightly indefinite, which a
    small ridge does not always cover.
    """
    # Inputs that are zero on every token leave the prior alone, whatever the ridge.
    lam = (ridge * gram.diagonal().mean()).clamp_min(torch.finfo(FLOAT).tiny)
    gram.diagonal().add_(lam)
    cross.add_(prior * lam)
    return torch.linalg.solve(gram, cross)
