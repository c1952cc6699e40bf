"""One parameter budget, spent on the residual and the feed-forward width by what each costs.

The pairs of widths that use a budget up lie on a line: at one end the residual alone is narrowed,
at the other the feed-forward alone. Both ends are narrowed, by the same method and refit but on
fewer windows, and the loss measured on windows that neither map nor refit has seen. On a removed
share x the excess grows like x^p, with p between 0.9 and 1.12 where it was measured
(SmolLM2-135M). In the middle of the line it is then 2^-p (a + b), a and b the excesses at the ends:
less than a, by ``MARGIN``, only where b is at most ``NEAR`` times a. There the middle is measured
too, as it is where neither width alone can meet the budget, and taken if it is better by
``MARGIN``: less than that would hang on the windows.

Without the refit the residual would look dearer than it is: the refit makes up for more of it than
of the feed-forward. A map that has seen the windows it is measured on looks cheaper than it is.
"""

from __future__ import annotations

import copy
import logging
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.accounting import count_parameters
from dotresize.evaluate import perplexity
from dotresize.models.causal_lm import CausalLM
from dotresize.models.resized import resized
from dotresize.narrow.calibrate import collect_for, held_out, spread
from dotresize.narrow.choose_width import by_layer, residual_step
from dotresize.narrow.options import Calibrated, Options
from dotresize.narrow.round_width import round_width

logger = logging.getLogger("dotresize")

# Windows on which the loss is measured, at most and of all, and those that models are narrowed on:
# a third of a run's time in all, for two ends.
WINDOWS = 4
WINDOW_SHARE = 1 / 3
CUT_WINDOWS = 6
# Both widths together must be better than one of them alone by this share of its excess.
MARGIN = 0.05
# What the middle can win at an exponent of 1.15: 2^1.15 (1 - MARGIN) - 1.
NEAR = 1.11
# No width is narrowed further than to this share.
LEAST = 0.1
# No feed-forward gets fewer neurons: the width 1 is read as a share, all of it.
LEAST_INNER = 2


@dataclass(frozen=True)
class Split:
    """Widths that fit a budget, and why these.

    Attributes:
        width, inner: residual and feed-forward width.
        params, count: the share of which parameters that they fit.
        excess: of these widths, on held-out windows; None where one width alone can be narrowed, or
            none has to be.
        measured: excess of the widths that were tried, (width, inner) each.
    """

    width: int
    inner: int
    params: float = 1.0
    count: str = "total"
    excess: float | None = None
    measured: tuple[tuple[int, int, float], ...] = ()

    @classmethod
    def recorded(cls, *, measured: list[list[Any]], **others: Any) -> Split:
        """Return a split whose fields have been through JSON."""
        return cls(measured=tuple((int(k), int(m), float(x)) for k, m, x in measured), **others)

    def details(self) -> dict[str, Any]:
        """Return what the report says of it."""
        return {
            "excess": self.excess,
            "measured": [
                {"width": width, "ff_width": inner, "excess": excess}
                for width, inner, excess in self.measured
            ],
        }


class Budget:
    """What a share of a model's parameters leaves room for."""

    def __init__(self, model: CausalLM, options: Options) -> None:
        """Count what ``params`` and ``params_count`` of the options allow."""
        assert options.params is not None
        count = options.params_count
        self._model, self._options = model, options
        self._parameters = parameters_at(model, count)
        self.allowed = options.params * self._parameters(model.width, model.inner_width)
        outputs = len(model.module.get_submodule(model.architecture.head).weight)
        # A tied model's head that gets weights of its own counts.
        self._head = outputs if options.untie and model.tied and count == "total" else 0

    @property
    def least(self) -> float:
        """The share of the parameters that the narrowest widths to be had would keep."""
        width = 1 if not self._model.architecture.fixed_residual else self._model.width
        step = residual_step(self._model, self._options)
        least = self._parameters(max(width, step), min(LEAST_INNER, self._model.inner_width))
        return least / self._parameters(self._model.width, self._model.inner_width)

    def inner_at(self, width: int) -> int:
        """Return the largest feed-forward width that fits beside a residual width; 0 for none.

        It is one that hardware takes (narrow/round_width.py).
        """
        inner, room = self._model.inner_width, self.allowed - self._head * width
        fitting = bisect_right(range(inner + 1), room, key=lambda m: self._parameters(width, m))
        if fitting > inner:
            return inner
        room = fitting - 1
        options = self._options
        rule: dict[str, Any] = {
            "multiple_of": options.multiple_of,
            "times": options.tensor_parallel,
        }
        found = round_width(room, inner, towards="down", **rule) if room > 0 else 0
        return found if LEAST_INNER <= found <= room else 0

    def neurons_at(self, width: int) -> int:
        """Return how many inner neurons of all layers together fit beside a residual width."""
        layers = len(self._model.layers)
        none, one = (self._parameters(width, m) for m in (0, 1))
        return int((self.allowed - none - self._head * width) * layers // (one - none))

    def widths(self) -> list[int]:
        """Return the residual widths to choose from: those that rounding down leads to."""
        full, options = self._model.width, self._options
        rule: dict[str, Any] = {"multiple_of": options.multiple_of}
        step = residual_step(self._model, options)
        found = {
            round_width(wanted, full, towards="down", divisor=step, **rule)
            for wanted in range(step, full + 1)
        }
        return sorted(found)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of widths that fit, the widest feed-forward for each residual width.

        Raises ValueError where even the narrowest model has more parameters.
        """
        found = [(k, m) for k in self.widths() if (m := self.inner_at(k))]
        if not found:
            raise ValueError(self.refusal("no pair of widths has so few"))
        return found

    def refusal(self, why: str) -> str:
        """Return why a budget cannot be met, and which could."""
        return f"params {self._options.params:g}: {why} parameters; the least is {self.least:.3f}"

    def width_alone(self) -> int:
        """Return the largest residual width that fits beside the whole feed-forward; 0 for none."""
        whole = self._model.inner_width
        return max((k for k in self.widths() if self.inner_at(k) == whole), default=0)


def check_budget(model: CausalLM, options: Options) -> None:
    """Raise ValueError for a budget that no widths meet. model: its config is enough."""
    budget = Budget(model, options)
    if model.architecture.fixed_residual:
        if not budget.inner_at(model.width):
            raise ValueError(budget.refusal("no feed-forward width has so few"))
    elif model.architecture.has_inner_width:
        budget.pairs()
    elif not budget.width_alone():
        raise ValueError(budget.refusal("no width has so few"))


def split_budget(model: CausalLM, tokens: Tensor, options: Options, own: int = 0) -> Split:
    """Return the widths that share ``options.params`` of the model's parameters best.

    tokens: int64 (windows, length), of which the model wrote the last ``own`` windows itself.
    """
    assert options.params is not None
    split = _best(model, tokens, options, own)
    split = replace(split, params=options.params, count=options.params_count)
    logger.info(
        "params %g of %s: width %d -> %d, feed-forward width %d -> %d%s",
        options.params,
        options.params_count.replace("_", "-"),
        model.width,
        split.width,
        model.inner_width,
        split.inner,
        "" if split.excess is None else f", excess {split.excess:.2f} on held-out windows",
    )
    return split


def _best(model: CausalLM, tokens: Tensor, options: Options, own: int) -> Split:
    check_budget(model, options)
    budget = Budget(model, options)
    if model.architecture.fixed_residual:
        return Split(model.width, budget.inner_at(model.width))
    if not model.architecture.has_inner_width:
        return Split(budget.width_alone(), model.inner_width)
    pairs = budget.pairs()
    if (model.width, model.inner_width) in pairs:
        return Split(model.width, model.inner_width)
    measured = Measured(model, tokens, options, own)
    ends = ends_of(pairs, model)
    found = [measured.excess(*pair) for pair in ends]
    alone = [pair[0] == model.width or pair[1] == model.inner_width for pair in ends]
    best = min(range(len(ends)), key=found.__getitem__)
    near = max(found) <= NEAR * found[best] if found[best] > 0 else True
    middle = middle_of(pairs, ends, model)
    if middle is not None and (near or not all(alone)):
        excess = measured.excess(*middle)
        margin = MARGIN * abs(found[best]) if alone[best] else 0.0
        if excess < found[best] - margin:
            ends, found, best = [middle], [excess], 0
    width, inner = ends[best]
    return Split(width, inner, excess=found[best], measured=tuple(measured.excesses))


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


def parameters_at(model: CausalLM, count: str) -> Callable[[int, int], int]:
    """Return a model's parameters as a function of residual width and feed-forward width.

    Models without memory of their own tell, as the count is linear in each width: four of them, or
    two where the residual width cannot change.
    count: "total" (tied tensors once) or "non_embedding" (without embedding and head).
    """
    # Layers that are narrower already keep their own width.
    own = model.inner_widths or [model.inner_width]

    def neurons(inner: int) -> int:
        return sum(min(inner, width) for width in own)

    if model.architecture.fixed_residual:  # the config may refuse any other width
        one, two = (_counted(model, model.width, m)[count] for m in (1, 2))
        each = (two - one) // len(own)
        return lambda width, inner: one + each * (neurons(inner) - len(own))
    divisor = model.architecture.divisor(model.config)
    widths, inners = (divisor, 2 * divisor), (1, 2)
    (a, b), (c, d) = ([_counted(model, k, m)[count] for m in inners] for k in widths)
    per_both = ((d - c) - (b - a)) // divisor
    per_width = (c - a) // divisor - per_both
    per_inner = (b - a) - divisor * per_both
    constant = a - divisor * per_width - per_inner - divisor * per_both

    def parameters(width: int, inner: int) -> int:
        each = (per_inner + per_both * width) // len(own)
        return constant + per_width * width + each * neurons(inner)

    return parameters


def _counted(model: CausalLM, width: int, inner: int) -> dict[str, int]:
    same = width == model.width
    config = copy.deepcopy(model.config) if same else resized(model.config, width)
    setattr(config, model.architecture.inner, inner)
    with torch.device("meta"):
        return count_parameters(CausalLM.in_memory(type(model.module)(config)))


class Measured:
    """Excesses of narrowed models on windows that neither their maps nor their refits have seen."""

    def __init__(self, model: CausalLM, tokens: Tensor, options: Options, own: int) -> None:
        self._windows, cut, own = _split_windows(tokens, own)
        if len(cut) < distributed.size():
            raise ValueError(
                f"{len(tokens)} windows are too few for a budget on {distributed.size()} processes"
            )
        statistics = collect_for(model, cut, options)
        statistics.own_windows = own
        self._given = Calibrated(model, cut, statistics, options)
        self._dense = math.log(perplexity(model, self._windows, desc="budget"))
        self.excesses: list[tuple[int, int, float]] = []

    def excess(self, width: int, inner: int) -> float:
        """Return the excess at two widths, which is kept in ``excesses``, and said."""
        model, method = self._given.model, self._given.options.method
        logger.info("budget: trying width %d, feed-forward width %d", width, inner)
        narrow = method.probe(self._given, width, by_layer(model, inner))
        found = math.log(perplexity(narrow, self._windows, desc="budget")) - self._dense
        self.excesses.append((width, inner, found))
        logger.info(
            "budget: width %d of %d, feed-forward width %d of %d: excess %.3f",
            *(width, model.width, inner, model.inner_width, found),
        )
        return found


def _split_windows(tokens: Tensor, own: int) -> tuple[Tensor, Tensor, int]:
    """Return windows to measure on and windows to solve on, spread evenly.

    A single one does both. The last ``own`` windows are the model's own; the last number returned
    is how many of those to solve on are.
    """
    count = max(1, min(WINDOWS, int(WINDOW_SHARE * len(tokens))))
    rest, held = held_out(len(tokens), count)
    cut = rest[spread(len(rest), max(CUT_WINDOWS, distributed.size()))]
    return tokens[held], tokens[cut], int((cut >= len(tokens) - own).sum())
