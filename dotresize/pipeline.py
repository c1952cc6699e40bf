"""The pipeline: calibrate, find a width map, absorb it, refit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from dotresize import distributed, maps, shelves
from dotresize.absorb import absorb, is_tied
from dotresize.accounting import STAGES, check_weights, count_parameters, peak_memory, versions
from dotresize.calibration import check_tokens
from dotresize.inner_width import narrow_inner
from dotresize.memory import place_of
from dotresize.models import architecture_of
from dotresize.narrowing import (
    basis,
    correct_weights,
    narrow_locations,
    split_budget,
    width_map,
)
from dotresize.ops.backends import choose
from dotresize.options import Options
from dotresize.refit import RIDGE, Correction
from dotresize.resident import device_of, shelf_of
from dotresize.self_text import sample
from dotresize.statistics import Statistics, collect
from dotresize.targets import Targets, check_kept, kept_set
from dotresize.width import (
    check_config,
    check_residual,
    choose_inner_width,
    choose_width,
    residual_share,
    width_for_energy,
)

logger = logging.getLogger("dotresize")


def compress(
    model: Any,
    tokens: Tensor | Iterable[Tensor],
    *,
    width: float | None = None,
    energy: float | None = None,
    params: float | None = None,
    params_count: str = "total",
    method: str = "pca",
    targets: Targets = None,
    scope: str = "global",
    ff_width: float | None = None,
    ff_method: str = "eliminate",
    refit: bool = True,
    ridge: float = RIDGE,
    reg: float = 3.0,
    steps: int = 1,
    factor: str = "polar",
    untie: bool = False,
    self_windows: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    batch_windows: int = 4,
    figures: bool = False,
    statistics: Statistics | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Narrow the residual width, and the feed-forward width, of a causal language model.

    Args:
        model: a transformers model of a supported architecture, on any device; not changed.
        tokens: int64 (windows, length), calibration text without padding, or an iterable of such.
        width: residual width, a fraction up to 1, rounded to what loaders accept, or an exact
            number of channels. 0.8 if nothing else says how narrow to get.
        energy: instead of width: the share of the activations' variance to keep.
        params: instead of both widths: the share of the parameters to keep, split over them by
            measured sensitivity (dotresize.budget).
        params_count: "total", or "non_embedding": without embedding and head.
        method: "pca", "dot" (transport), "magnitude" (selection), or "slicegpt" (see sliced).
        targets: the neurons onto which the others are transported ("dot"), or which alone are
            kept ("magnitude"): int64 indices, or a callable of (Statistics, k) that returns them.
            The largest mean magnitudes if not given.
        scope: "global": one map for every location, hence a plain checkpoint; "location": one for
            each, with adapters (dotresize.sliced), for comparison.
        ff_width: inner width of the feed-forward blocks, as ``width``; unchanged if not given.
        ff_method: how that is done, see dotresize.feed_forward.
        refit: correct the weights by least squares on the same tokens (dotresize.refit).
        ridge: weight of the uncorrected weights in the refit, relative to the mean Gram diagonal.
        reg: entropic regularisation in units of the mean cost ("dot").
        steps: transports in a row ("dot"); beyond the first, of all neurons onto all neurons.
        factor: "polar" or "qr" ("dot"; see dotresize.factorize).
        untie: give a tied head its own weights: exact, but adds vocabulary x width parameters.
        self_windows: calibrate on so many windows more, which the model writes itself
            (dotresize.self_text); a third of those given by default.
        seed: of those.
        backend: of the solvers, see dotresize.backends().
        batch_windows: windows per forward pass.
        figures: put what a page shows of the map into the report (dotresize.page).
        statistics: what ``pipeline.calibrate`` returned with these tokens, to share one
            calibration between several calls; the model then writes nothing itself.

    Returns:
        the narrowed model, of the same class and dtype, and a report (a JSON-able dict).

    Raises:
        ValueError: unsupported architecture; a width no loader accepts; a collapsed span; weights
            or activations that are not finite; unknown options.
    """
    options = Options(
        width=width, energy=energy, params=params, params_count=params_count, method=method,
        targets=targets, scope=scope, ff_width=ff_width, ff_method=ff_method, refit=refit,
        ridge=ridge, reg=reg, steps=steps, factor=factor, untie=untie, self_windows=self_windows,
        seed=seed, backend=backend, batch_windows=batch_windows, figures=figures,
    )  # fmt: skip
    options.check()
    architecture = architecture_of(model.config)
    architecture.check(model)
    check_weights(model)
    check_residual(model.config, options)
    windows = check_tokens(tokens, model.config.vocab_size)
    divisor = architecture.divisor(model.config)
    split: dict[str, Any] | None = None
    if energy is None and params is None:
        width = residual_share(width, ff_width)
        new_width = choose_width(width, model.config.hidden_size, divisor)
        check_config(model.config, new_width)
    inner = choose_inner_width(ff_width, model.config)
    if isinstance(targets, Tensor):
        check_kept(targets, model.config.hidden_size, new_width)
    if statistics is None:
        windows, statistics = calibrate(model, windows, options)
    if not architecture.fixed_residual:
        _check_statistics(statistics, options)
    if energy is not None:
        new_width = width_for_energy(statistics, energy, divisor)
        logger.info("width %d -> %d (energy %g)", model.config.hidden_size, new_width, energy)
    seconds = dict.fromkeys(STAGES, 0.0)
    if params is not None:
        start = time.perf_counter()
        new_width, inner, split = split_budget(model, windows, statistics, divisor, options)
        seconds["budget"] = time.perf_counter() - start
    for stage in ("own text", "calibration"):
        seconds[stage] = statistics.seconds.get(stage, 0.0)
    seconds["cost"] = statistics.seconds["cost"] if method == "dot" else 0.0
    narrow, found, q = _narrowed(model, windows, statistics, new_width, inner, options, seconds)
    report = _report(model, narrow, statistics, options, seconds)
    report["width"] |= {"asked": width, "multiple_of": divisor}
    report |= {"budget": split, "map": found.details}
    if figures and q is not None:
        moment = cast(Tensor, statistics.moment)
        shown = q if isinstance(q, list) else [q] * len(moment)
        report["figures"] = maps.figures_of(shown, moment, found.details)
    return narrow, report


def _narrowed(
    model: Any,
    windows: Tensor,
    statistics: Statistics,
    width: int,
    inner: int | None,
    options: Options,
    seconds: dict[str, float],
) -> tuple[Any, maps.WidthMap, Tensor | list[Tensor] | None]:
    """The narrowed model, its map, and the basis or bases, if any; adds times by stage."""
    if architecture_of(model.config).fixed_residual:
        start = time.perf_counter()
        correction = Correction(options.refit, options.ridge, inner, options.ff_method)
        batch, place = options.batch_windows, place_of(model, windows)
        narrow = narrow_inner(model, windows, correction, batch_windows=batch, place=place)
        if shelf_of(narrow) is not None:
            shelves.finish(narrow)
        seconds["refit"] = time.perf_counter() - start
        return narrow, maps.WidthMap(torch.empty(0, 0), torch.empty(0)), None
    check_config(model.config, width)
    selection = kept_set(options.targets, statistics, width)
    q: Tensor | list[Tensor]
    if options.per_location:
        narrow, found, q = narrow_locations(model, windows, statistics, selection, options)
        seconds.update(found.seconds)
    else:
        found = width_map(statistics.mean(), selection, options)
        seconds.update(found.seconds)
        start = time.perf_counter()
        q = basis(model, found, options)
        on_shelf = shelf_of(model) is not None
        make = shelves.narrowed if on_shelf else absorb
        narrow = make(model, q, untie=options.untie)
        seconds["absorption"] = time.perf_counter() - start
    if options.refit or inner is not None:
        start = time.perf_counter()
        correct_weights(model, narrow, q, windows, statistics, inner, options)
        seconds["refit"] = time.perf_counter() - start
    if shelf_of(narrow) is not None:
        start = time.perf_counter()
        shelves.finish(narrow)
        seconds["absorption"] += time.perf_counter() - start
    return narrow, found, q


def _report(
    model: Any, narrow: Any, statistics: Statistics, options: Options, seconds: dict[str, float]
) -> dict[str, Any]:
    device = device_of(model)
    architecture = architecture_of(model.config)
    old, new = (architecture.inner_width(m.config) for m in (model, narrow))
    return {
        "method": "feed-forward" if architecture.fixed_residual else options.method,
        "scope": "location" if options.per_location else "global",
        "refit": {"ridge": options.ridge} if options.refit else None,
        "width": {
            "energy": options.energy,
            "old": model.config.hidden_size, "new": narrow.config.hidden_size,
        },
        "feed_forward": {
            "asked": options.ff_width, "old": old, "new": new,
            "method": options.ff_method if new < old else None,
        },
        "tied": is_tied(narrow),
        "plain_checkpoint": not options.per_location,
        "parameters": {"dense": count_parameters(model), "narrow": count_parameters(narrow)},
        "calibration": {
            "tokens": statistics.tokens,
            "locations": len(statistics.locations),
            "self_windows": statistics.own_windows,
        },
        "seconds": seconds,
        "device": str(device),
        "backend": choose(options.backend, device),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
    }  # fmt: skip


def calibrate(model: Any, tokens: Tensor, *wanted: Options) -> tuple[Tensor, Statistics]:
    """The tokens, with those the model writes itself, and what any of the options will ask of them.

    tokens: int64 (windows, length). The first options say how many windows are written.
    """
    start = time.perf_counter()
    # Every token that it writes would read all weights from their files.
    own = 0 if shelf_of(model) is not None else wanted[0].own_windows(len(tokens))
    if own and distributed.rank() == 0:
        written = sample(model, own, tokens.shape[1], wanted[0].seed)
        tokens = torch.cat([tokens, written.to(tokens.device)])
    tokens = distributed.from_first(tokens)
    if len(tokens) < distributed.size():
        raise ValueError(f"{len(tokens)} windows are too few for {distributed.size()} processes")
    took = time.perf_counter() - start
    if architecture_of(model.config).fixed_residual:
        statistics = Statistics.none(tokens.numel(), model.config.hidden_size)
    else:
        statistics = collect(
            model,
            tokens,
            cost=any(_needs_cost(options) for options in wanted),
            moment=any(_needs_moment(options) for options in wanted),
            apart=any(_needs_apart(options) for options in wanted),
            batch_windows=wanted[0].batch_windows,
            backend=wanted[0].backend,
            place=place_of(model, tokens),
        )
    statistics.own_windows = own
    statistics.seconds["own text"] = took
    return tokens, statistics


def _needs_cost(options: Options) -> bool:
    return options.method == "dot"


def _needs_moment(options: Options) -> bool:
    by_variance = options.method == "pca" or options.energy is not None
    return by_variance or options.refit or options.figures


def _needs_apart(options: Options) -> bool:
    return options.per_location or options.figures or callable(options.targets)


def _check_statistics(statistics: Statistics, options: Options) -> None:
    for name, needs in (("cost", _needs_cost), ("moment", _needs_moment)):
        if needs(options) and getattr(statistics, name) is None:
            raise ValueError(f"statistics: collected without {name}, which these options need")
    if _needs_apart(options) and not statistics.apart:
        raise ValueError("statistics: locations were not kept apart, which these options need")
