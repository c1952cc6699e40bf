"""The stages of a compression, each from its options: the map, the locations, the corrections."""

from __future__ import annotations

import time
from typing import Any, cast

from torch import Tensor

from dotresize import baselines, maps, sliced
from dotresize.absorb import is_tied
from dotresize.calibration import Statistics
from dotresize.models import architecture_of
from dotresize.options import Options
from dotresize.refit import Correction, correct
from dotresize.targets import kept_set
from dotresize.tied_head import choose_table


def width_map(statistics: Statistics, selection: Tensor, options: Options) -> maps.WidthMap:
    """The map of one location, or of the mean over locations, all of which weigh alike."""
    importance = statistics.importance[0]
    if options.method == "magnitude":
        return baselines.selected(selection, len(importance))
    if options.method == "pca":
        return baselines.pca(cast(Tensor, statistics.moment)[0], selection, importance)
    return maps.transport(
        cast(Tensor, statistics.cost)[0],
        selection,
        reg=options.reg,
        steps=options.steps,
        factor=options.factor,
        backend=options.backend,
    )


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
        final = cast(Tensor, statistics.moment)[-1]
        choose_table(model, narrow, q, final, ridge=options.ridge)
    correction = Correction(options.refit, options.ridge, inner, options.ff_method)
    correct(model, narrow, q, tokens, correction, batch_windows=options.batch_windows)


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
        located = [width_map(one, kept, options) for one, kept in zip(each, chosen, strict=True)]
        qs, found = [one.q for one in located], located[0]
        if architecture_of(model.config).layer_norm:
            qs = [maps.level(q) for q in qs]
    found.seconds = {"factorisation": time.perf_counter() - start}
    return sliced.slice_model(model, qs), found, qs
