"""The pipeline: calibrate, find a width map, absorb it, refit."""

from __future__ import annotations

import logging
import platform
import resource
import time
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

import dotresize
from dotresize import baselines, feed_forward, maps
from dotresize.absorb import absorb, is_tied
from dotresize.calibration import Statistics, check_tokens, collect
from dotresize.models import architecture_of
from dotresize.ops.backends import choose
from dotresize.refit import Correction, correct
from dotresize.targets import Targets, kept_set
from dotresize.width import choose_inner_width, choose_width, residual_share, width_for_energy

logger = logging.getLogger("dotresize")

METHODS = ("pca", "dot", "magnitude")
STAGES = ("calibration", "cost", "sinkhorn", "factorisation", "absorption", "refit", "evaluation")


def compress(
    model: Any,
    tokens: Tensor | Iterable[Tensor],
    *,
    width: float | None = None,
    energy: float | None = None,
    method: str = "pca",
    targets: Targets = None,
    scope: str = "global",
    ff_width: float | None = None,
    ff_method: str = "eliminate",
    refit: bool = True,
    ridge: float | None = None,
    reg: float = 3.0,
    steps: int = 1,
    factor: str = "polar",
    untie: bool = False,
    backend: str = "auto",
    batch_windows: int = 4,
    statistics: Statistics | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Narrow the residual width, and the feed-forward width, of a causal language model.

    Args:
        model: a transformers model of a supported architecture, on any device; not changed.
        tokens: calibration text without padding, an iterable of int64 (windows, length), one for
            each kind of text, or a single one.
        width: residual width, a fraction up to 1, rounded to what loaders accept, or an exact
            number of channels. 0.8 if nothing else says how narrow to get.
        energy: instead of width: the share of the activations' variance to keep.
        method: "pca", "dot" (transport) or "magnitude" (selection).
        targets: the neurons onto which the others are transported ("dot"), or which alone are
            kept ("magnitude"): int64 indices, or a callable of (Statistics, k) that returns them.
            The largest mean magnitudes if not given.
        scope: "global": one map for every location, hence a plain checkpoint.
        ff_width: inner width of the feed-forward blocks, as ``width``; unchanged if not given.
        ff_method: how that is done, see dotresize.feed_forward.
        refit: correct the weights by least squares on the same tokens (dotresize.refit).
        ridge: weight of the uncorrected weights in the refit, relative to the mean Gram diagonal;
            chosen on sources left out if not given.
        reg: entropic regularisation in units of the mean cost ("dot").
        steps: transports in a row ("dot"); beyond the first, of all neurons onto all neurons.
        factor: "polar" or "qr" ("dot"; see dotresize.factorize).
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
    check_options(
        method=method, scope=scope, ff_method=ff_method, reg=reg, steps=steps, factor=factor,
        ridge=ridge, width=width, energy=energy,
    )  # fmt: skip
    check_weights(model)
    sources = check_tokens(tokens, model.config.vocab_size)
    divisor = architecture_of(model.config).divisor(model.config)
    old_width = model.config.hidden_size
    device = next(model.parameters()).device
    if energy is None:
        width = residual_share(width, ff_width)
        new_width = choose_width(width, old_width, divisor)
    inner = choose_inner_width(ff_width, model.config)
    if statistics is None:
        statistics = collect(
            model,
            sources,
            cost=method == "dot",
            moment=method == "pca" or energy is not None,
            batch_windows=batch_windows,
            backend=backend,
        )
    if energy is not None:
        new_width = width_for_energy(statistics, energy, divisor)
        logger.info("width %d -> %d (energy %g)", old_width, new_width, energy)
    seconds = dict.fromkeys(STAGES, 0.0)
    seconds["calibration"] = statistics.seconds["calibration"]
    seconds["cost"] = statistics.seconds["cost"] if method == "dot" else 0.0
    selection = kept_set(targets, statistics, new_width)
    found = _width_map(statistics, method, selection, reg, steps, factor, backend)
    seconds.update(found.seconds)
    tied = is_tied(model) and not untie
    start = time.perf_counter()
    # Any basis of the span gives an untied model the same function; a tied one needs the basis
    # nearest to the axes (see absorb).
    q = maps.align(found.q, found.selection) if tied else found.q
    narrow = absorb(model, q, untie=untie)
    seconds["absorption"] = time.perf_counter() - start
    correction = Correction(refit, ridge, inner, ff_method)
    if refit or inner is not None:
        start = time.perf_counter()
        correct(model, narrow, q, sources, correction, batch_windows=batch_windows)
        seconds["refit"] = time.perf_counter() - start
    report = {
        "method": method,
        "scope": scope,
        "refit": {"ridge": ridge, "chosen": correction.chosen} if refit else None,
        "width": {
            "asked": width, "energy": energy, "old": old_width, "new": new_width,
            "multiple_of": divisor,
        },
        "feed_forward": {
            "asked": ff_width, "old": model.config.intermediate_size,
            "new": narrow.config.intermediate_size, "method": ff_method if inner else None,
        },
        "tied": is_tied(narrow),
        "plain_checkpoint": True,
        "parameters": {"dense": count_parameters(model), "narrow": count_parameters(narrow)},
        "map": found.details,
        "calibration": {
            "tokens": statistics.tokens,
            "locations": len(statistics.locations),
            "sources": len(sources),
        },
        "seconds": seconds,
        "device": str(device),
        "backend": choose(backend, device),
        "peak_memory_bytes": _peak_memory(),
        "versions": _versions(),
    }  # fmt: skip
    return narrow, report


def check_options(
    *,
    method: str,
    scope: str,
    ff_method: str,
    reg: float,
    steps: int,
    factor: str,
    ridge: float | None,
    width: float | None,
    energy: float | None,
) -> None:
    """ValueError for the first option that ``compress`` would refuse whatever the model."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: must be one of {', '.join(METHODS)}")
    if scope != "global":
        raise ValueError(
            f"scope {scope!r}: must be global; maps per location need an adapter at every residual "
            "connection, which no plain checkpoint can hold"
        )
    if ff_method not in feed_forward.METHODS:
        raise ValueError(
            f"ff_method {ff_method!r}: must be one of {', '.join(feed_forward.METHODS)}"
        )
    if factor not in maps.FACTORS:
        raise ValueError(f"factor {factor!r}: must be one of {', '.join(maps.FACTORS)}")
    if not 0 < reg < float("inf"):
        raise ValueError(f"reg {reg:g}: must be positive and finite")
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    if ridge is not None and not 0 < ridge < float("inf"):
        raise ValueError(f"ridge {ridge:g}: must be positive and finite")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy:g}: must be a share of the variance in (0, 1]")
    if energy is not None and width is not None:
        raise ValueError("give width or energy, not both")


def _width_map(
    statistics: Statistics,
    method: str,
    selection: Tensor,
    reg: float,
    steps: int,
    factor: str,
    backend: str,
) -> maps.WidthMap:
    """The global map: every location weighs alike."""
    if method == "magnitude":
        return baselines.selected(selection, statistics.importance.shape[1])
    if method == "pca":
        assert statistics.moment is not None
        return baselines.pca(statistics.moment.mean(0), selection, statistics.importance.mean(0))
    assert statistics.cost is not None
    return maps.transport(
        statistics.cost.mean(0), selection, reg=reg, steps=steps, factor=factor, backend=backend
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
