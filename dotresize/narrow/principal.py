"""Principal directions of the residual stream, as a width map."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dotresize.narrow.maps import WidthMap, largest

# Channels that PCA leaves on their axes. A few residual channels are tens of times larger than
# the rest; smeared over the basis they spoil the final norm of a tied model (perplexity six per
# cent off on SmolLM2-135M without this, two with it).
KEPT_AXES = 16


def pca(
    moment: Tensor, selection: Tensor, importance: Tensor, *, kept_axes: int = KEPT_AXES
) -> WidthMap:
    """Return principal directions of the second moment; the largest channels stay as they are.

    The moment is not centred.

    Args:
        moment: (D, D) mean of x'x.
        selection: int64 (k,), the axes that a tied model's basis is turned towards.
        importance: (D,) mean magnitudes; names the channels that stay on their axes.
        kept_axes: how many do (at most k).
    """
    start = time.perf_counter()
    width, k = len(importance), len(selection)
    kept = min(kept_axes, k)
    axes = largest(importance, kept)
    mask = torch.ones(width, dtype=torch.bool, device=moment.device)
    mask[axes] = False
    rest = mask.nonzero().flatten()
    q = torch.zeros(width, k, dtype=torch.float64, device=moment.device)
    q[axes, torch.arange(kept, dtype=torch.int64, device=q.device)] = 1.0
    vectors = torch.linalg.eigh(moment.double()[rest][:, rest]).eigenvectors
    others = torch.arange(kept, k, dtype=torch.int64, device=q.device)
    q[rest[:, None], others] = vectors[:, len(rest) - (k - kept) :]
    return WidthMap(
        q, selection, {"kept_axes": kept}, {"factorisation": time.perf_counter() - start}
    )
