"""Entropic optimal transport of all neurons onto a kept subset, as a width map."""

from __future__ import annotations

import logging
import time
from typing import cast

import torch
from torch import Tensor

from dotresize.narrow.maps import WidthMap
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ops.sinkhorn_result import SinkhornResult
from dotresize.ops.transport_map import factorize, transport_map

# Bytes of the costs that are solved together.
BATCH_BYTES = 2**30

logger = logging.getLogger("dotresize")


def transports(
    costs: Tensor,
    selections: list[Tensor],
    *,
    reg: float = 3.0,
    steps: int = 1,
    factor: str = "polar",
    backend: str = "auto",
) -> list[WidthMap]:
    """Return the transport maps from all neurons onto the selected ones, factorised.

    With ``steps`` q > 1 the plan P moves all neurons onto all neurons, and the span is that of
    ``(D P)^q`` restricted to the selection: a subspace iteration, orthonormalised between steps.
    The problems of all costs are solved in batches.

    Args:
        costs: (B, D, D) pairwise L1 costs of the neurons' activations.
        selections: int64 (k,) each, the targets.
        reg: in units of the mean cost, so that it does not depend on the cost's scale.
        steps: transports in a row.
        factor: method of ``factorize``.

    Raises:
        ValueError: a map's span collapses; names the reg.

    Reference: DOTResize, arXiv 2507.04517.
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
            found.append(_factorised(results[i], selection, float(scales[i]), reg, steps, factor))
            found[-1].seconds["sinkhorn"] = seconds
    return found


def _factorised(
    result: SinkhornResult, selection: Tensor, scale: float, reg: float, steps: int, factor: str
) -> WidthMap:
    start = time.perf_counter()
    if not result.converged:
        logger.warning("transport at reg %g x mean cost: %s", reg, result.status)
    name = f"the transport map at reg {reg:g} x mean cost"
    moved = transport_map(cast(Tensor, result.plan))
    factors = factorize(moved[:, selection] if steps > 1 else moved, factor, name=name)
    for _ in range(steps - 1):
        factors = factorize(moved @ factors.q, factor, name=name)
    return WidthMap(
        factors.q,
        selection,
        {
            "reg": reg,
            "steps": steps,
            "mean_cost": scale,
            "iterations": result.n_iter,
            "marginal_error": result.marginal_error,
            "status": result.status,
            "factor": factor,
            "cond": factors.cond,
            "cond_deflated": factors.cond_deflated,
        },
        {"factorisation": time.perf_counter() - start},
    )
