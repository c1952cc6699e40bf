"""The search for the shape that a parameter budget is spent on: both widths, and the layers.

Shapes that keep the residual width are predicted first (narrow/curves.py): equal feed-forwards,
one or two whole layers less and the rest wider, and, where they are asked for, a width for each
layer. The best two are then narrowed, on fewer windows than the result, and judged by the loss on
windows that neither map nor refit has seen. So is the shape that narrows the residual alone, and
that nothing predicts.

Both widths together: on a removed share x the excess grows like x^p, with p between 0.9 and 1.12
where it was measured (SmolLM2-135M). Half-way between the residual alone and the feed-forward alone
it is then 2^-p (a + b), a and b the excesses at the ends: less than a, by ``MARGIN``, only where b
is at most ``NEAR`` times a. There the middle is measured too, as it is where neither width alone
can meet the budget, and taken if it is better by ``MARGIN``: less than that would hang on the
windows.

Without the refit the residual would look dearer than it is: the refit makes up for more of it than
of the feed-forward. A map that has seen the windows it is measured on looks cheaper than it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from dotresize import distributed
from dotresize.calibration.statistics import Statistics
from dotresize.evaluate import perplexity
from dotresize.models.bfloat16 import in_bfloat16
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import alike, widths_left
from dotresize.narrow.allocation import allocation_of
from dotresize.narrow.budget import Budget, check_budget, inner_without_search
from dotresize.narrow.calibrate import collect_for, held_out, spread
from dotresize.narrow.choose_width import DEFAULT_SIZE, by_layer
from dotresize.narrow.curves import LEAST, Curves, curves_of
from dotresize.narrow.feed_forward_only import narrow_feed_forwards
from dotresize.narrow.options import Calibrated, Options, Shape
from dotresize.narrow.refit import FIRST_WEIGHT
from dotresize.narrow.split import Split, Tried, shape_of

logger = logging.getLogger("dotresize")

# Windows on which the loss is measured, at most and of all, and those that models are narrowed on.
WINDOWS = 4
WINDOW_SHARE = 1 / 3
CUT_WINDOWS = 6
# Both widths together must be better than one of them alone by this share of its excess.
MARGIN = 0.05
# What the middle can win at an exponent of 1.15: 2^1.15 (1 - MARGIN) - 1.
NEAR = 1.11
# How many layers may be left out, one of so many at most; and how many of the predicted shapes are
# narrowed and judged.
FEWER = 2
ONE_OF = 8
JUDGED = 2


def split_budget(model: CausalLM, tokens: Tensor, options: Options, own: int = 0) -> Split:
    """Return the shape that spends ``options.params`` of the model's parameters best.

    tokens: int64 (windows, length), of which the model wrote the last ``own`` windows itself.
    """
    assert options.params is not None
    split = _best(model, tokens, options, own)
    layer_widths = options.layer_widths
    split = replace(
        split,
        params=options.params,
        count=options.params_count,
        layer_widths=layer_widths,
        search=options.search,
    )
    inner = str(split.inner)
    if split.allocation is not None:
        inner = f"{min(split.allocation.widths)} to {inner}"
    elif layer_widths:
        inner = f"{inner} in every layer"
    logger.info(
        "params %g of %s: width %d -> %d, feed-forward width %d -> %s%s%s",
        options.params,
        options.params_count.replace("_", "-"),
        model.width,
        split.width,
        model.inner_width,
        inner,
        _without(split.dropped),
        "" if split.excess is None else f", excess {split.excess:.2f} on held-out windows",
    )
    return split


def _without(dropped: tuple[int, ...]) -> str:
    return f", without layer {' and '.join(map(str, dropped))}" if dropped else ""


def _best(model: CausalLM, tokens: Tensor, options: Options, own: int) -> Split:
    check_budget(model, options, whole=model.store.whole)
    alone = inner_without_search(model, options)
    if alone is not None:
        return _feed_forwards_alone(model, tokens, options, alone)
    budget = Budget(model, options)
    if not model.architecture.has_inner_width:
        return Split(budget.width_alone(), model.inner_width)
    fixed = bool(model.architecture.fixed_residual)
    pairs = [(model.width, budget.inner_at(model.width))] if fixed else budget.pairs()
    if (model.width, model.inner_width) in pairs:
        return Split(model.width, model.inner_width)
    ends = pairs if fixed else ends_of(pairs, model)
    judge = Judge(model, tokens, options, own)
    predicted = sorted(_predicted(model, tokens, options), key=lambda split: _loss(split))
    judge.tried += [split.tried[0] for split in predicted[JUDGED:]]
    judged = [(judge.excess(split), split) for split in predicted[:JUDGED]]
    equal = [split for _, split in judged if not split.dropped and split.allocation is None]
    others = [Split(*pair) for pair in ends if pair[0] < model.width or not predicted]
    judged += [(judge.excess(split), split) for split in others]
    middle = middle_of(pairs, ends, model)
    if middle is not None:
        _judge_middle(judge, judged, [*equal, *others], Split(*middle), model)
    excess, best = min(judged, key=lambda pair: pair[0])
    if excess == math.inf:
        raise ValueError(f"params {options.params:g}: no shape that was tried has a finite loss")
    return replace(best, tried=tuple(judge.tried))


def _feed_forwards_alone(model: CausalLM, tokens: Tensor, options: Options, inner: int) -> Split:
    """Return the shape that narrows nothing but feed-forwards, all together to this width."""
    equal = by_layer(model, inner)
    if not options.layer_widths or equal is None:
        return Split(model.width, inner)
    share = sum(equal) / sum(model.inner_widths)
    curves = curves_of(model, tokens, share, options, first=FIRST_WEIGHT)
    return min(_of_layers(model, options, curves, ()), key=_loss)


def _judge_middle(
    judge: Judge,
    judged: list[tuple[float, Split]],
    ends: list[Split],
    middle: Split,
    model: CausalLM,
) -> None:
    """Judge both widths together where they can be better than one alone; keep it if they are."""
    found = [pair for pair in judged if pair[1] in ends]
    if len(found) < 2:
        return
    best, end = min(found, key=lambda pair: pair[0])
    worst = max(excess for excess, _ in found)

    def alone(split: Split) -> bool:
        return split.width == model.width or split.inner == model.inner_width

    near = worst <= NEAR * best if best > 0 else True
    if not near and all(map(alone, ends)):
        return
    excess = judge.excess(middle)
    margin = MARGIN * abs(best) if alone(end) and math.isfinite(best) else 0.0
    if excess < best - margin:
        judged.append((excess, middle))


def _loss(split: Split) -> float:
    predicted = split.tried[0].predicted
    assert predicted is not None
    return predicted


def _predicted(model: CausalLM, tokens: Tensor, options: Options) -> Iterator[Split]:
    """Yield the shapes of the full residual width, each with its prediction."""
    layers, least = len(model.layers), LEAST * model.inner_width
    inner = Budget(model, options).inner_at(model.width)
    equal = by_layer(model, inner) if inner >= least else None
    share = DEFAULT_SIZE if equal is None else sum(equal) / sum(model.inner_widths)
    most = min(FEWER, layers // ONE_OF) if alike(model.config) else 0
    down_to = LEAST
    if equal is not None and not options.layer_widths:  # with layers left out they are wider
        down_to = min(m / own for m, own in zip(equal, model.inner_widths, strict=True))
    curves = curves_of(
        model, tokens, share, options, first=FIRST_WEIGHT, least=down_to, without=most > 0
    )
    cheapest = sorted(range(layers), key=lambda i: curves.without[i]) if most else []
    for count in range(most + 1):
        dropped = tuple(sorted(cheapest[:count]))
        found = list(_of_layers(model, options, curves, dropped))
        yield from found
        if found and found[0].inner == model.inner_width:
            return  # nothing is gained by one layer less


def _of_layers(
    model: CausalLM, options: Options, curves: Curves, dropped: tuple[int, ...]
) -> Iterator[Split]:
    """Yield the shapes with some layers left out: equal widths, and a width for each layer."""
    budget = Budget(model, options, dropped)
    inner = budget.inner_at(model.width)
    if inner < LEAST * model.inner_width:
        return
    equal = [min(inner, own) for own in widths_left(model, dropped)]
    tried = Tried(model.width, inner, dropped, predicted=curves.predicted(equal, dropped))
    yield Split(model.width, inner, dropped=dropped, tried=(tried,))
    if not options.layer_widths:
        return
    total = budget.neurons_at(model.width)
    found = allocation_of(curves, model, equal, total, options, dropped)
    if list(found.widths) != equal:
        widest = max(found.widths)
        tried = Tried(model.width, widest, dropped, True, found.predicted)
        yield Split(model.width, widest, dropped=dropped, allocation=found, tried=(tried,))


def ends_of(pairs: list[tuple[int, int]], model: CausalLM) -> list[tuple[int, int]]:
    """Return the pairs with the narrowest and the widest residual, as far as ``LEAST`` lets it."""
    least = LEAST * model.width, LEAST * model.inner_width
    fitting = [pair for pair in pairs if pair[0] >= least[0] and pair[1] >= least[1]] or pairs
    widest = max(inner for _, inner in fitting)
    # Several residual widths may leave the feed-forward whole: the largest one is meant.
    first = max(pair for pair in fitting if pair[1] == widest)
    return list(dict.fromkeys((first, max(fitting))))


def middle_of(
    pairs: list[tuple[int, int]], ends: list[tuple[int, int]], model: CausalLM
) -> tuple[int, int] | None:
    """Return the pair that narrows each width about half as far as the ends do; None for none."""
    if len(ends) < 2:
        return None
    most = 1 - ends[0][0] / model.width, 1 - ends[1][1] / model.inner_width

    def unevenness(pair: tuple[int, int]) -> float:
        removed = 1 - pair[0] / model.width, 1 - pair[1] / model.inner_width
        return abs(removed[0] / max(most[0], 1e-9) - removed[1] / max(most[1], 1e-9))

    between = [pair for pair in pairs if ends[0][0] < pair[0] < ends[1][0]]
    between = [pair for pair in between if pair[1] < ends[0][1]]
    return min(between, key=unevenness, default=None)


class Judge:
    """Excesses of narrowed models on windows that neither their maps nor their refits have seen.

    They are computed in bfloat16 where that is faster.

    Attributes:
        tried: what was measured, and what was only predicted.
    """

    def __init__(self, model: CausalLM, tokens: Tensor, options: Options, own: int) -> None:
        model = in_bfloat16(model)
        self._windows, cut, own = _split_windows(tokens, own)
        if len(cut) < distributed.size():
            raise ValueError(
                f"{len(tokens)} windows are too few for a budget on {distributed.size()} processes"
            )
        if model.architecture.fixed_residual:
            statistics = Statistics.none(cut.numel(), model.width)
        else:
            statistics = collect_for(model, cut, options)
        statistics.own_windows = own
        self._given = Calibrated(model, cut, statistics, options)
        self._dense = math.log(perplexity(model, self._windows, desc="budget"))
        self.tried: list[Tried] = []

    def excess(self, split: Split) -> float:
        """Return the excess of a shape, which is kept in ``tried``, and said."""
        model, options = self._given.model, self._given.options
        before = split.tried[0] if split.tried else Tried(split.width, split.inner, split.dropped)
        shown = (
            f"width {split.width} of {model.width}, feed-forward width "
            f"{'by layer, up to ' if before.by_layer else ''}{split.inner} of {model.inner_width}"
            f"{_without(split.dropped)}"
        )
        logger.info("budget: trying %s", shown)
        found = self._excess(shape_of(split, model), options)
        self.tried.append(before._replace(excess=found if math.isfinite(found) else None))
        logger.info("budget: %s: excess %.3f", shown, found)
        return found

    def _excess(self, shape: Shape, options: Options) -> float:
        model, cut = self._given.model, self._given.tokens
        if model.architecture.fixed_residual:
            narrow = narrow_feed_forwards(model, cut, shape, options).model
        else:
            narrow = options.method.probe(self._given, shape)
        try:
            found = perplexity(narrow, self._windows, desc="budget")
        except ValueError:  # its loss is not finite: a shape that is never taken
            return math.inf
        return math.log(found) - self._dense


def _split_windows(tokens: Tensor, own: int) -> tuple[Tensor, Tensor, int]:
    """Return windows to measure on and windows to solve on, spread evenly.

    A single one does both. The last ``own`` windows are the model's own; the last number returned
    is how many of those to solve on are.
    """
    count = max(1, min(WINDOWS, int(WINDOW_SHARE * len(tokens))))
    rest, held = held_out(len(tokens), count)
    cut = rest[spread(len(rest), max(CUT_WINDOWS, distributed.size()))]
    return tokens[held], tokens[cut], int((cut >= len(tokens) - own).sum())
