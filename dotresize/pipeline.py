"""The pipeline: calibrate, find a width map, absorb it, refit."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

import dotresize
from dotresize import baselines, maps
from dotresize.absorb import absorb, is_tied
from dotresize.calibration import Statistics, check_tokens, collect
from dotresize.models import architecture_of
from dotresize.ops.backends import choose
from dotresize.refit import refit as refit_readers
from dotresize.width import choose_width

METHODS = ("dot", "pca", "magnitude")
STAGES = ("calibration", "cost", "sinkhorn", "factorisation", "absorption", "refit", "evaluation")


def compress(
    model: Any,
    tokens: Tensor | Iterable[Tensor],
    *,
    width: float = 0.8,
    method: str = "dot",
    scope: str = "global",
    refit: bool = True,
    reg: float = 3.0,
    factor: str = "polar",
    ridge: float = 0.1,
    untie: bool = False,
    backend: str = "auto",
    batch_windows: int = 4,
    statistics: Statistics | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Narrow the residual width of a causal language model.

    Args:
        model: a transformers model of a supported architecture, on any device; not changed.
        tokens: int64 (windows, length), calibration text without padding, or an iterable of such.
        width: fraction up to 1, rounded to what loaders accept, or an exact number of channels.
        method: "dot" (transport), "pca" or "magnitude".
        scope: "global": one map for every location, hence a plain checkpoint.
        refit: correct the readers by least squares on the same tokens (dotresize.refit).
        reg: entropic regularisation in units of the mean cost ("dot").
        factor: "polar" or "qr" ("dot"; see dotresize.factorize).
        ridge: weight of the uncorrected reader in the refit, relative to the mean Gram diagonal.
        untie: give a tied head its own weights: exact, but adds vocabulary x width parameters.
        backend: of the solvers, see dotresize.backends().
        batch_windows: windows per forward pass.
        statistics: what ``calibration.collect`` returned for the same model and tokens, to share
            one calibration between several calls.

    Returns:
        the narrowed model, of the same class and dtype, and a report (a JSON-able dict).

    Raises:
        ValueError: unsupported architecture; a width no loader accepts; a collapsed span; weights
            or activations that are not finite; unknown options.
    """
    check_options(method=method, scope=scope, reg=reg, factor=factor, ridge=ridge)
    check_weights(model)
    windows = check_tokens(tokens, model.config.vocab_size)
    divisor = architecture_of(model.config).divisor(model.config)
    old_width = model.config.hidden_size
    device = next(model.parameters()).device
    new_width = choose_width(width, old_width, divisor)
    if statistics is None:
        statistics = collect(
            model,
            windows,
            cost=method == "dot",
            moment=method == "pca",
            batch_windows=batch_windows,
            backend=backend,
        )
    seconds = dict.fromkeys(STAGES, 0.0)
    seconds["calibration"] = statistics.seconds["calibration"]
    seconds["cost"] = statistics.seconds["cost"] if method == "dot" else 0.0
    found = _width_map(statistics, method, new_width, reg, factor, backend)
    seconds.update(found.seconds)
    tied = is_tied(model) and not untie
    start = time.perf_counter()
    # Any basis of the span gives an untied model the same function; a tied one needs the basis
    # nearest to the axes (see absorb).
    q = maps.align(found.q, found.selection) if tied else found.q
    narrow = absorb(model, q, untie=untie)
    seconds["absorption"] = time.perf_counter() - start
    if refit:
        start = time.perf_counter()
        refit_readers(model, narrow, q, windows, ridge=ridge, batch_windows=batch_windows)
        seconds["refit"] = time.perf_counter() - start
    report = {
        "method": method,
        "scope": scope,
        "refit": {"ridge": ridge} if refit else None,
        "width": {"asked": width, "old": old_width, "new": new_width, "multiple_of": divisor},
        "tied": is_tied(narrow),
        "plain_checkpoint": True,
        "parameters": {"dense": count_parameters(model), "narrow": count_parameters(narrow)},
        "map": found.details,
        "calibration": {"tokens": statistics.tokens, "locations": len(statistics.locations)},
        "seconds": seconds,
        "device": str(device),
        "backend": choose(backend, device),
        "peak_memory_bytes": _peak_memory(),
        "versions": _versions(),
    }
    return narrow, report


def check_options(*, method: str, scope: str, reg: float, factor: str, ridge: float) -> None:
    """ValueError for the first option that ``compress`` would refuse whatever the model."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: must be one of {', '.join(METHODS)}")
    if scope != "global":
        raise ValueError(
            f"scope {scope!r}: must be global; maps per location need an adapter at every residual "
            "connection, which no plain checkpoint can hold"
        )
    if factor not in maps.FACTORS:
        raise ValueError(f"factor {factor!r}: must be one of {', '.join(maps.FACTORS)}")
    if not 0 < reg < float("inf"):
        raise ValueError(f"reg {reg:g}: must be positive and finite")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge {ridge:g}: must be positive and finite")


def _width_map(
    statistics: Statistics, method: str, k: int, reg: float, factor: str, backend: str
) -> maps.WidthMap:
    """The global map: every location weighs alike."""
    importance = statistics.importance.mean(0)
    if method == "magnitude":
        return baselines.magnitude(importance, k)
    if method == "pca":
        assert statistics.moment is not None
        return baselines.pca(statistics.moment.mean(0), importance, k)
    assert statistics.cost is not None
    return maps.transport(
        statistics.cost.mean(0), importance, k, reg=reg, factor=factor, backend=backend
    )


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of a model: ``total``, tied tensors once, and ``non_embedding``.

    Non-embedding leaves out the input embedding and the head, tied or not.
    """
    architecture = architecture_of(model.config)
    outer = {
        id(model.get_submodule(name).weight) for name in (architecture.embedding, architecture.head)
    }
    unique = {id(p): p.numel() for p in model.parameters()}
    total = sum(unique.values())
    return {
        "total": total,
        "non_embedding": total - sum(unique.get(key, 0) for key in outer),
    }


def check_weights(model: Any) -> None:
    """ValueError naming the first weight that holds NaN or Inf."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} of the model holds NaN or Inf")


def _peak_memory() -> dict[str, int]:
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _versions() -> dict[str, str]:
    import transformers

    return {
        "dotresize": dotresize.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
