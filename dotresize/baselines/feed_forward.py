"""Other ways to choose the inner neurons of a feed-forward, to compare backward elimination with.

With h (tokens, n) the inner activations, W (n, out) the writer, G = h'h and S the kept neurons, the
top ones by |h_j| |w_j|:

magnitude   W_S as it is
nystrom     W_S = (G_SS + lam)^-1 (G_S W + lam W_S)
transport   W_S = R' W, R the transport plan's rows
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dotresize.least_squares import FLOAT
from dotresize.narrow.feed_forward import recombined
from dotresize.narrow.maps import largest
from dotresize.narrow.options import FeedForwardMethod
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ops.transport_map import transport_map

# The ridge, in units of the mean diagonal of G.
NYSTROM_RIDGE = 1e-4
# The transport's reg, in units of the mean cost. It is small: what a neuron wrote goes to those
# most alike, not to all.
TRANSPORT_REG = 0.03


class KeepLargest(FeedForwardMethod):
    """The neurons that write most stay, and write what they wrote."""

    name = "magnitude"

    def choose(
        self, gram: Tensor, cross: Tensor, writer: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        kept = largest(gram.diagonal().sqrt() * writer.norm(dim=1), count)
        return kept, self.written(gram, writer, kept)

    def written(self, gram: Tensor, writer: Tensor, kept: Tensor) -> Tensor:
        """Return the writer of the kept neurons, (count, out) float64."""
        return writer[kept]


class Nystrom(KeepLargest):
    """The same neurons write what comes nearest to what all wrote."""

    name = "nystrom"

    def written(self, gram: Tensor, writer: Tensor, kept: Tensor) -> Tensor:
        return recombined(gram, writer, kept, NYSTROM_RIDGE)


class HandOn(KeepLargest):
    """The same neurons also write what is transported to them from the others."""

    name = "transport"

    def written(self, gram: Tensor, writer: Tensor, kept: Tensor) -> Tensor:
        return _handed_on(gram, kept).mT @ writer


def _handed_on(gram: Tensor, kept: Tensor) -> Tensor:
    """Return R (n, count): the share of each neuron's signal that each kept one stands for.

    Transport between neurons of unit length, at the cost 1 - |correlation|; the sign and the ratio
    of lengths go into R, and a kept neuron stands for itself alone.
    """
    length = gram.diagonal().sqrt().clamp_min(torch.finfo(FLOAT).tiny)
    correlation = (gram / length[:, None] / length)[:, kept]
    cost = 1.0 - correlation.abs()
    plan = sinkhorn(cost.float(), TRANSPORT_REG * max(float(cost.mean()), 1e-6)).plan
    shares = transport_map(cast(Tensor, plan).to(gram).mT).mT
    # Times the projection of the one neuron onto the other.
    shares = shares * correlation * length[:, None] / length[kept]
    shares[kept] = torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    return shares
