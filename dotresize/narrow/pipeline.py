"""The pipeline: calibrate, choose the widths, narrow by a method, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dotresize.accounting import (
    STAGES,
    check_weights,
    count_parameters,
    peak_memory,
    stage,
    versions,
)
from dotresize.calibration.given_tokens import check_tokens
from dotresize.calibration.statistics import MATRICES, Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import widths_left
from dotresize.models.in_use import alone
from dotresize.models.layer_widths import differ
from dotresize.narrow import maps
from dotresize.narrow.allocation import Allocation, allocation_of
from dotresize.narrow.calibrate import collect_for, first_token, with_own_text
from dotresize.narrow.choose_width import (
    announce_found,
    by_layer,
    choose_inner_width,
    choose_widths,
    default_size,
    residual_stays,
    width_for_energy,
)
from dotresize.narrow.curves import curves_of
from dotresize.narrow.feed_forward_only import narrow_feed_forwards
from dotresize.narrow.options import Calibrated, Narrowed, Options, Shape
from dotresize.narrow.refit import FIRST_WEIGHT, first_weight
from dotresize.narrow.search import split_budget
from dotresize.narrow.split import Split, shape_of
from dotresize.ops.backends import choose

logger = logging.getLogger("dotresize")


class Prepared(NamedTuple):
    """What comes before a model is narrowed, and which several methods can share.

    Attributes:
        tokens: int64 (windows, length), with those that the model wrote itself.
        statistics: of the residual stream; of no location where its width stays.
        split: of a budget; None without one.
        allocation: of feed-forward widths to the layers, where no budget makes it; None where all
            get the same.
    """

    tokens: Tensor
    statistics: Statistics
    split: Split | None
    allocation: Allocation | None = None


@alone
def prepare(model: CausalLM, tokens: Tensor, *wanted: Options) -> Prepared:
    """Write text, find the shape, and collect what any of the options needs.

    tokens: int64 (windows, length). The first options say how much is written, and have the budget.
    """
    sized = [default_size(model, one) for one in wanted]
    options, given = sized[0], len(tokens)
    tokens, seconds = with_own_text(model, tokens, options)
    split = None
    if options.params is not None:
        with stage("budget", seconds):
            split = split_budget(model, tokens, options, len(tokens) - given)
    allocation = None
    if options.layer_widths and split is None:
        with stage("layer widths", seconds):
            allocation = _allocation(model, tokens, options)
    narrowing = [one for one in sized if _asks_for_statistics(model, split, one)]
    if narrowing:
        with (
            stage("calibration", {}, f"on {len(tokens)} windows of {tokens.shape[1]}"),
            _rehearsed(model, narrowing, None if split is None else split.width),
        ):
            statistics = collect_for(model, tokens, *narrowing)
    else:
        statistics = Statistics.none(tokens.numel(), model.width)
    statistics.own_windows = len(tokens) - given
    statistics.seconds |= seconds
    return Prepared(tokens, statistics, split, allocation)


@contextmanager
def _rehearsed(model: CausalLM, wanted: list[Options], width: int | None) -> Iterator[None]:
    """Have the methods compile what they will use beside the block.

    What goes wrong with it will go wrong again, and is then reported. width: of a budget's split.
    """

    def rehearse() -> None:
        with torch.cuda.device(model.device if model.device.type == "cuda" else -1):
            for options in wanted:
                with suppress(Exception):
                    kept = width or choose_widths(model, options).residual or model.width
                    options.method.rehearse(model.width, kept, model.device, options)

    thread = Thread(target=rehearse, name="dotresize-compile", daemon=True)
    thread.start()
    yield
    thread.join()


def _allocation(model: CausalLM, tokens: Tensor, options: Options) -> Allocation | None:
    """Return a feed-forward width for each layer; None where all stay as they are."""
    equal = by_layer(model, choose_inner_width(model, options))
    if equal is None:
        return None
    first = FIRST_WEIGHT if residual_stays(model, options) else 1.0  # as it will be refitted
    share = sum(equal) / sum(model.inner_widths)
    curves = curves_of(model, tokens, share, options, first=first)
    found = allocation_of(curves, model, equal, sum(equal), options)
    logger.info(
        "layer widths: %d to %d of %d; %.3f nats lost by them is predicted, %.3f by equal ones",
        *(min(found.widths), max(found.widths), model.inner_width),
        *(found.predicted, found.predicted_equal),
    )
    return found


def _asks_for_statistics(model: CausalLM, split: Split | None, options: Options) -> bool:
    """Return whether what statistics are of will be narrowed."""
    if options.method.scope == "location":
        return not model.architecture.fixed_residual
    if options.params is not None and split is not None:
        return split.width < model.width
    return not residual_stays(model, options)


@alone
def narrow_model(
    model: CausalLM,
    tokens: Any,
    options: Options,
    prepared: Prepared | Statistics | None = None,
) -> tuple[CausalLM, dict[str, Any]]:
    """Narrow a model; see ``dotresize.compress``.

    tokens: int64 (windows, length), or an iterable of such. prepared: what ``prepare`` returned
    with tokens, to share one calibration between several calls; these are then its own. Or its
    statistics alone.
    """
    options.check()
    model.architecture.check(model.module)
    check_weights(model.module)
    options = default_size(model, options)
    widths = choose_widths(model, options)
    width, inner = widths.residual or model.width, widths.inner
    positions = getattr(model.config, "max_position_embeddings", None)
    windows = check_tokens(tokens, model.config.vocab_size, positions)
    if options.params is not None and widths.residual is None and windows.shape[1] < 2:
        raise ValueError(
            "tokens are windows of 1: a search is judged by next tokens, so they need 2 at least"
        )
    first = first_token(model, windows)
    unprepared = prepared is None  # who prepares before has said what was chosen
    if isinstance(prepared, Statistics):
        split = None
        if options.params is not None:
            split = split_budget(model, windows, options, prepared.own_windows)
        by_layer_alone = options.layer_widths and split is None
        allocation = _allocation(model, windows, options) if by_layer_alone else None
        prepared = Prepared(windows, prepared, split, allocation)
    if prepared is None:
        prepared = prepare(model, windows, options)
    _check_prepared(prepared, windows, options)
    windows, statistics, split, allocation = prepared
    if options.params is not None and split is not None:
        width, inner = split.width, split.inner if split.inner < model.inner_width else None
    cut = width < model.width or options.energy is not None
    of_statistics = cut or options.method.scope == "location"
    if of_statistics:
        _check_statistics(statistics, model, options)
    if options.energy is not None:
        width = width_for_energy(statistics, model, options)
        logger.info("width %d -> %d (energy %g)", model.width, width, options.energy)
    _warn_of_few(windows, model, width, inner, options)
    given = Calibrated(model, windows, statistics, options)
    seconds = dict.fromkeys(STAGES, 0.0)
    if unprepared or widths.residual is None:
        announce_found(model, width, None if options.layer_widths else inner)
    seconds["self-generated text"] = statistics.seconds.get("self-generated text", 0.0)
    heeds = bool(options.meant("sensitivity")) and cut
    asked_for = {"cost": cut and "cost" in options.needs, "sensitivity": heeds}
    asked_for["calibration"] = of_statistics
    asked_for["budget"] = options.params is not None
    asked_for["layer widths"] = options.layer_widths
    seconds |= {name: statistics.seconds.get(name, 0.0) * on for name, on in asked_for.items()}
    shape = Shape(width, by_layer(model, inner))
    if options.params is not None and split is not None:
        shape, allocation = shape_of(split, model), split.allocation
    elif options.layer_widths and shape.inner is not None:
        if allocation is None or allocation.equal != sum(shape.inner):
            raise ValueError("statistics: were not prepared for these layer_widths")
        shape = shape._replace(inner=allocation.widths)
    if options.pad and shape.inner is None and differ(model.inner_widths):
        shape = shape._replace(inner=widths_left(model, shape.dropped))
    made = _narrowed(given, shape, seconds)
    report = _report(model, made.model, statistics, options, shape, seconds)
    asked = options.width
    if asked is None and options.params is None and widths.residual is not None:
        asked = 1.0
    report["width"]["asked"] = asked
    report["calibration"] |= {
        "first_token": first,  # that all windows begin with, None for none
        # How often it counts in the map, and in least squares.
        "first_token_counts": {"map": 1.0, "least_squares": first_weight(model, made.model)},
    }
    report["budget"] = None
    if split is not None:
        count = {"asked": options.params, "count": options.params_count}
        report["budget"] = count | split.details()
    report["layer_widths"] = None
    if options.layer_widths and allocation is not None:
        report["layer_widths"] = vars(allocation)
    report["map"] = made.map.details
    # What the backward pass kept of the forward pass, in files or on the device, in this process.
    report["sensitivity"] = {"kept_bytes": statistics.kept_bytes} if heeds else None
    report["feed_forward_lost"] = list(made.lost)
    if options.figures and made.bases and width < model.width:
        moment = cast(Tensor, statistics.moment)
        shown = made.bases if len(made.bases) > 1 else made.bases * len(moment)
        report["figures"] = maps.figures_of(shown, moment, made.map)
    return made.model, report


def _warn_of_few(
    windows: Tensor, model: CausalLM, width: int, inner: int | None, options: Options
) -> None:
    """Warn where there are fewer tokens than unknowns in what is solved for."""
    solved = []
    if width < model.width or options.energy is not None:
        solved.append((model.width, "channels"))
    if inner is not None:
        solved.append((model.inner_width, "inner neurons"))
    most, what = max(solved, default=(0, ""))
    tokens, length = windows.numel(), windows.shape[1]
    if tokens < most:
        enough = -(-most // length)
        logger.warning(
            "%d calibration tokens for %d %s: give at least %d windows of %d",
            *(tokens, most, what, enough, length),
        )


def _narrowed(given: Calibrated, shape: Shape, seconds: dict[str, float]) -> Narrowed:
    model, options = given.model, given.options
    if model.architecture.fixed_residual:
        with stage("refit", seconds, "of feed-forwards"):
            made = narrow_feed_forwards(model, given.tokens, shape, options)
            made.model.finish()
        return made
    made = options.method.narrow(given, shape, seconds)
    if not made.model.store.whole:
        with stage("absorption", seconds, "of the rest"):
            made.model.finish()
    return made


def _report(
    model: CausalLM,
    narrow: CausalLM,
    statistics: Statistics,
    options: Options,
    shape: Shape,
    seconds: dict[str, float],
) -> dict[str, Any]:
    fixed, inner = model.architecture.fixed_residual, shape.inner
    cut = inner is not None and list(inner) != widths_left(model, shape.dropped)
    # Layers with adapters, of maps for each location, are all of one width.
    made = narrow.inner_widths if options.method.plain else []
    return {
        "method": "feed-forward" if fixed else options.method.name,
        "scope": options.method.scope,
        # Without a ridge it follows the number of tokens for each unknown (narrow/refit.py).
        "refit": {"ridge": options.ridge} if options.refit else None,
        "width": {"energy": options.energy, "old": model.width, "new": narrow.width},
        "feed_forward": {
            "asked": options.ff_width,
            "old": model.inner_width,
            "new": narrow.inner_width,  # the widest layer's
            "layers": next(
                (list(widths) for widths in (made, inner or ()) if differ(widths)), None
            ),
            "method": options.ff_method.name if cut else None,
        },
        "layers": {
            "old": len(model.layers),
            "new": len(narrow.layers),
            "dropped": list(shape.dropped),
        },
        "model_type": {"old": model.config.model_type, "new": narrow.config.model_type},
        "tied": narrow.tied,
        "plain_checkpoint": options.method.plain and not differ(made),
        "parameters": {"dense": count_parameters(model), "narrow": count_parameters(narrow)},
        "calibration": {
            "tokens": statistics.tokens,
            "locations": len(statistics.locations),
            "self_windows": statistics.own_windows,
        },
        "seconds": seconds,
        "device": str(model.device),
        "backend": choose(options.backend, model.device),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
    }


def _check_prepared(prepared: Prepared, windows: Tensor, options: Options) -> None:
    """Raise ValueError where something else was prepared than is asked for now."""
    tokens, statistics, split = prepared[:3]
    same = torch.equal(tokens[: len(windows)], windows.to(tokens.device))
    if not same or tokens.numel() != statistics.tokens:
        raise ValueError("statistics: were collected on other tokens")
    if options.params is None:
        return
    asked = (options.params, options.params_count, options.layer_widths, options.search)
    if split is None or (split.params, split.count, split.layer_widths, split.search) != asked:
        how = " with layer_widths" if options.layer_widths else ""
        how += "" if options.search is None else f" with search {options.search}"
        raise ValueError(
            f"statistics: were prepared for no budget of params {options.params:g}{how}"
        )


def _check_statistics(statistics: Statistics, model: CausalLM, options: Options) -> None:
    if not statistics.locations:
        raise ValueError("statistics: none were collected, as the residual was to keep its width")
    needed = options.needs | ({"final"} if options.chooses_table(model) else set())
    for name in (*MATRICES, "final"):
        if name in needed and getattr(statistics, name) is None:
            raise ValueError(f"statistics: collected without {name}, which these options need")
    moment = statistics.moment
    apart = moment is not None and len(moment) == len(statistics.locations)
    known = {"apart": statistics.apart, "moment_apart": apart}
    if any(name in options.needs and not found for name, found in known.items()):
        raise ValueError("statistics: locations were not kept apart, which these options need")
