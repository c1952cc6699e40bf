"""Entropic optimal transport between neurons, as a width map.

With C (D, D) the L1 costs between all neurons and P the plan of all neurons onto all neurons under
uniform marginals, K = D (P + P') / 2 is doubly stochastic and positive semidefinite:
exp(-|x_i - x_j|_1 / reg) is a positive definite kernel, and Sinkhorn scales its rows and columns
alike. K moves every neuron's signal to the neurons that are like it. Moved on and on, from whatever
kept set, signals end in the span of the k leading eigenvectors of K: that is the map of
``steps=inf``, one solve and one symmetric eigendecomposition.

At a large reg, K is the constant direction and -J C J / (reg D), J the centring: classical scaling
(Torgerson, 1952) of the neurons under their L1 distance. Principal directions are the same of the
squared Euclidean distance, which grows with the square of a deviation where this grows linearly.

A number of steps q is the paper's transport onto the kept set (q = 1), or, from 2 on, the span of
K^q restricted to the kept set, orthonormalised between steps.

Source: DOTResize, arXiv 2507.04517 (one step); the limit is this project's.
"""

from __future__ import annotations

import logging
import math
import time
from typing import cast

import torch
from torch import Tensor

from dotresize.narrow.maps import WidthMap
from dotresize.ops.backends import choose
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ops.sinkhorn_result import SinkhornResult
from dotresize.ops.transport_map import factorize, transport_map

# Bytes of the costs that are solved together.
BATCH_BYTES = 2**30
# The share of the leading eigenvalue under which rounding hides what float32 costs tell apart.
LOST = 1e-9

logger = logging.getLogger("dotresize")


def transports(
    costs: Tensor,
    selections: list[Tensor],
    *,
    reg: float = 3.0,
    steps: float = math.inf,
    factor: str = "polar",
    backend: str = "auto",
) -> list[WidthMap]:
    """Return transport maps, each a basis of what the module's header says.

    The problems of all costs are solved in batches.

    Args:
        costs: (B, D, D) pairwise L1 costs of the neurons' activations.
        selections: int64 (k,) each: the kept set of a number of steps; of the limit only its size
            matters.
        reg: in units of the mean cost, so that it does not depend on the cost's scale.
        steps: transports in a row, or ``math.inf``.
        factor: method of ``factorize``, for a number of steps.

    Raises:
        ValueError: a map's span collapses; names the reg.
    """
    found = []
    each = costs.shape[1] * (costs.shape[1] if steps > 1 else len(selections[0])) * 8
    batch = max(1, BATCH_BYTES // each)
    for first in range(0, len(selections), batch):
        start = time.perf_counter()
        some, kept = costs[first : first + batch], selections[first : first + batch]
        # float64: at large reg the columns of T are nearly parallel, and what tells them apart is
        # what the span is made of.
        chosen = [c if steps > 1 else c[:, s] for c, s in zip(some, kept, strict=True)]
        problems = torch.stack(chosen).double()
        scales = problems.mean((1, 2))
        if (scales == 0).any():
            raise ValueError("all neurons are equal: every cost between them is 0")
        results = sinkhorn(problems, reg * scales, tol=1e-9, backend=backend)
        seconds = (time.perf_counter() - start) / len(kept)
        for i, selection in enumerate(kept):
            start = time.perf_counter()
            result = results[i]
            details: dict[str, object] = {
                "reg": reg,
                "steps": "inf" if steps == math.inf else int(steps),
                "mean_cost": float(scales[i]),
                "iterations": result.n_iter,
                "marginal_error": result.marginal_error,
                "status": result.status,
            }
            if not result.converged:
                logger.warning("transport at reg %g x mean cost: %s", reg, result.status)
            name = f"the transport map at reg {reg:g} x mean cost"
            if steps == math.inf:
                width_map = limit(cast(Tensor, result.plan), selection, name)
            else:
                width_map = _repeated(result, selection, int(steps), factor, name)
            width_map.details = details | width_map.details
            factorisation = time.perf_counter() - start
            width_map.seconds = {"sinkhorn": seconds, "factorisation": factorisation}
            found.append(width_map)
    return found


def rehearse(n: int, m: int, device: torch.device, backend: str = "auto") -> None:
    """Solve a problem of no meaning, (n, m), so that what ``transports`` will use is compiled."""
    if choose(backend, device) != "triton":
        return
    rows, columns = (torch.arange(k, dtype=torch.float64, device=device) / k for k in (n, m))
    sinkhorn((rows[:, None] - columns).abs()[None], 1.0, tol=1e-9, max_iter=2, backend=backend)


def limit(plan: Tensor, selection: Tensor, name: str) -> WidthMap:
    """Return the leading eigenvectors of a plan of all neurons onto all, (D, D) float64."""
    width, k = len(plan), len(selection)
    values, vectors = torch.linalg.eigh((plan + plan.mT) * (width / 2))
    spectrum = values.flip(0).clamp_min(0.0)
    # Beside the constant direction; others that are nothing are of neurons that are equal.
    if width > 1 and spectrum[1] < LOST * spectrum[0]:
        raise ValueError(f"{name}: its span has collapsed; use a smaller reg")
    return WidthMap(vectors[:, width - k :].flip(1), selection, spectrum=spectrum)


def _repeated(
    result: SinkhornResult, selection: Tensor, steps: int, factor: str, name: str
) -> WidthMap:
    """Return the map of a number of transports onto a kept set."""
    moved = transport_map(cast(Tensor, result.plan))
    factors = factorize(moved[:, selection] if steps > 1 else moved, factor, name=name)
    for _ in range(steps - 1):
        factors = factorize(moved @ factors.q, factor, name=name)
    figures = {"cond": factors.cond, "cond_deflated": factors.cond_deflated}
    return WidthMap(factors.q, selection, {"factor": factor, **figures})
