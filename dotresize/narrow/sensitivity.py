"""How much a map heeds what the output feels (calibration/gradients.py).

With C the second moment of the activations, H the Fisher matrix of the output, both divided by
their Frobenius norms, Q the map's basis and U that of what it leaves out, a map is judged by

    felt(Q) = tr(U'CU U'HU)

the squared change of the output to first order, as if activations and gradients were independent.
Maps are made with several weights of H beside C, and the one that is felt least is taken.

Source: arXiv 2609.35579, for principal directions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from dotresize.narrow.maps import WidthMap


def felt(q: Tensor, moment: Tensor, fisher: Tensor) -> float:
    """Return what the output feels of a map. q: (D, k) orthonormal; moment, fisher: (D, D)."""
    left_out = torch.eye(len(q), dtype=q.dtype, device=q.device) - q @ q.mT
    return float(((left_out @ unit(moment) @ left_out) * unit(fisher)).sum())


def unit(matrix: Tensor) -> Tensor:
    """Return a matrix divided by its Frobenius norm, float64."""
    wide = matrix.double()
    return wide / wide.norm().clamp_min(torch.finfo(torch.float64).tiny)


def least_felt(maps: Iterable[tuple[float, WidthMap]], moment: Tensor, fisher: Tensor) -> WidthMap:
    """Return the map that the output feels least, of those made with several weights."""
    start = time.perf_counter()
    tried = [(felt(found.q, moment, fisher), weight, found) for weight, found in maps]
    least, weight, best = min(tried, key=lambda one: one[0])
    best.details |= {"weight": weight, "felt": least}
    solving = sum(found.seconds.get("sinkhorn", 0.0) for _, _, found in tried)
    best.seconds = {
        "sinkhorn": solving,
        "factorisation": time.perf_counter() - start - solving,
    }
    return best
