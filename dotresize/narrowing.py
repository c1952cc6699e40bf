"""The stages of a compression, each from its options: widths, map, locations, corrections."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dotresize import baselines, budget, distributed, maps, sliced
from dotresize.absorb import absorb, is_tied
from dotresize.memory import place_of
from dotresize.models import architecture_of
from dotresize.options import Options
from dotresize.refit import Correction, correct
from dotresize.statistics import Statistics
from dotresize.targets import kept_set
from dotresize.tied_head import choose_table
from dotresize.width import choose_inner_width

logger = logging.getLogger("dotresize")


def width_map(statistics: Statistics, selection: Tensor, options: Options) -> maps.WidthMap:
    """The map of one location, or of the mean over locations, all of which weigh alike."""
    return width_maps([statistics], [selection], options)[0]


def width_maps(
    statistics: list[Statistics], selections: list[Tensor], options: Options
) -> list[maps.WidthMap]:
    """The maps of several locations; transport's are solved together."""
    if options.method != "dot" or not statistics:
        pairs = zip(statistics, selections, strict=True)
        return [_plain_map(one, selection, options) for one, selection in pairs]
    return maps.transports(
        torch.cat([cast(Tensor, one.cost) for one in statistics]),
        selections,
        reg=options.reg,
        steps=options.steps,
        factor=options.factor,
        backend=options.backend,
    )


def _plain_map(statistics: Statistics, selection: Tensor, options: Options) -> maps.WidthMap:
    importance = statistics.importance[0]
    if options.method == "magnitude":
        return baselines.selected(selection, len(importance))
    return baselines.pca(cast(Tensor, statistics.moment)[0], selection, importance)


def basis(model: Any, found: maps.WidthMap, options: Options) -> Tensor:
    """The basis of a map's span that absorption takes, (D, k).

    Any gives an untied model the same function; a tied one needs the one nearest to the axes (see
    absorb), LayerNorm one that keeps the mean.
    """
    q = found.q
    if is_tied(model) and not options.untie:
        q = maps.align(q, found.selection)
    return maps.level(q) if architecture_of(model.config).layer_norm else q


def correct_weights(
    model: Any,
    narrow: Any,
    q: Tensor | list[Tensor],
    tokens: Tensor,
    statistics: Statistics,
    inner: int | None,
    options: Options,
) -> None:
    """Refit and feed-forward narrowing of what absorption made, in place."""
    has_weight = not architecture_of(model.config).layer_norm  # what a chosen table rests on
    if options.refit and isinstance(q, Tensor) and is_tied(narrow) and has_weight:
        choose_table(model, narrow, q, cast(Tensor, statistics.final), ridge=options.ridge)
    correction = Correction(options.refit, options.ridge, inner, options.ff_method)
    batch, place = options.batch_windows, place_of(model, tokens)
    correct(model, narrow, q, tokens, correction, batch_windows=batch, place=place)


def narrow_locations(
    model: Any,
    tokens: Tensor,
    statistics: Statistics,
    selection: Tensor,
    options: Options,
) -> tuple[Any, maps.WidthMap, list[Tensor]]:
    """A model with a map and adapters at every location; the first map, and all of them."""
    start = time.perf_counter()
    if options.method == "slicegpt":
        k, batch = len(selection), options.batch_windows
        qs = sliced.sequential_pca(model, tokens, k, batch_windows=batch)
        found = maps.WidthMap(qs[0], selection)
    else:
        each = [statistics.at(i) for i in range(len(statistics.locations))]
        chosen = [kept_set(options.targets, one, len(selection)) for one in each]
        located = _shared_maps(each, chosen, options)
        qs, found = [one.q for one in located], located[0]
        if architecture_of(model.config).layer_norm:
            qs = [maps.level(q) for q in qs]
    found.seconds = {"factorisation": time.perf_counter() - start}
    return sliced.slice_model(model, qs), found, qs


def _shared_maps(
    each: list[Statistics], chosen: list[Tensor], options: Options
) -> list[maps.WidthMap]:
    """The maps of all locations, of which every process makes its share."""
    rank, size = distributed.rank(), distributed.size()
    if size == 1:
        return width_maps(each, chosen, options)
    device = chosen[0].device
    mine = [
        _at(found, "cpu") for found in width_maps(each[rank::size], chosen[rank::size], options)
    ]
    found = []
    for i in range(len(each)):
        one = mine[i // size] if i % size == rank else None
        found.append(_at(distributed.from_first(one, i % size), device))
    return found


def _at(found: maps.WidthMap, device: torch.device | str) -> maps.WidthMap:
    return replace(found, q=found.q.to(device), selection=found.selection.to(device))


def split_budget(
    model: Any, tokens: Tensor, statistics: Statistics, divisor: int, options: Options
) -> tuple[int, int | None, dict[str, Any]]:
    """Residual width, feed-forward width and what the report says of the choice."""
    mean, full = statistics.mean(), model.config.hidden_size

    def narrowed(width: int, inner: int, some: Tensor) -> Any:
        q = torch.eye(full, dtype=torch.float64, device=mean.importance.device)
        if width < full:
            found = width_map(mean, kept_set(options.targets, statistics, width), options)
            q = basis(model, found, options)
        narrow = absorb(model, q, untie=options.untie)
        less = choose_inner_width(inner, model.config)
        if options.refit or less is not None:
            correct_weights(model, narrow, q, some, statistics, less, options)
        return narrow

    laws = budget.measure(model, tokens, divisor, narrowed)
    count = options.params_count
    assert options.params is not None
    split = budget.best_split(model, options.params, count, divisor, *laws, untied=options.untie)
    logger.info(
        "params %g of %s: width %d -> %d, feed-forward width %d -> %d, predicted excess %.2f",
        *(options.params, count.replace("_", "-"), full, split.width),
        *(architecture_of(model.config).inner_width(model.config), split.inner, split.predicted),
    )
    asked = {"asked": options.params, "count": count}
    inner = choose_inner_width(split.inner, model.config)
    return split.width, inner, asked | split.details()
