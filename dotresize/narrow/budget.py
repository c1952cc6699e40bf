"""One parameter budget, split over residual and feed-forward width by measured sensitivity.

Each width alone is narrowed by two amounts, by the same method and refit but on fewer windows, and
the loss measured on others, which the map has seen and the refit has not. A power law through the
two points, excess(x) = a x^p for a removed share x, predicts every other amount; of all pairs of
widths that fit the budget, the one with the smallest predicted sum is taken. Without the refit the
residual would look dearer than it is: the refit makes up for more of it than of the feed-forward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dotresize.accounting import count_parameters
from dotresize.evaluate import perplexity
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import resized
from dotresize.narrow.options import Calibrated

logger = logging.getLogger("dotresize")

# Removed shares that are tried: far enough apart for a slope, near what a user asks for.
PROBES = (0.08, 0.2)
# Windows on which the loss is measured, and on which the models for that are narrowed.
WINDOWS = 4
CUT_WINDOWS = 12
# Feed-forward widths are a multiple of this: matrix products want that.
INNER_STEP = 16


@dataclass(frozen=True)
class Law:
    """Excess loss a x^p after removing the share x of a width."""

    a: float
    p: float

    def __call__(self, share: float) -> float:
        return self.a * share**self.p

    @classmethod
    def through(cls, shares: tuple[float, float], excesses: tuple[float, float]) -> Law:
        """The law through two points; excesses are taken as at least a thousandth."""
        low, high = (max(excess, 1e-3) for excess in excesses)
        p = max(1.0, math.log(high / low) / math.log(shares[1] / shares[0]))
        return cls(high / shares[1] ** p, p)


@dataclass(frozen=True)
class Split:
    """Widths that fit a budget, and why these."""

    width: int
    inner: int
    predicted: float
    residual: Law
    feed_forward: Law

    def details(self) -> dict[str, Any]:
        return {
            "predicted_excess": self.predicted,
            "laws": {
                name: {"a": law.a, "p": law.p}
                for name, law in (("residual", self.residual), ("feed_forward", self.feed_forward))
            },
        }


def split_budget(given: Calibrated, divisor: int) -> Split:
    """Return the widths that share ``options.params`` of the model's parameters best.

    divisor: of the residual width.
    """
    model, options = given.model, given.options

    def narrowed(width: int, inner: int, tokens: Tensor) -> CausalLM:
        return options.method.probe(given._replace(tokens=tokens), width, inner)

    assert options.params is not None
    laws = measure(model, given.tokens, divisor, narrowed)
    split = best_split(
        model, options.params, options.params_count, divisor, *laws, untied=options.untie
    )
    logger.info(
        "params %g of %s: width %d -> %d, feed-forward width %d -> %d, predicted excess %.2f",
        options.params,
        options.params_count.replace("_", "-"),
        model.width,
        split.width,
        model.inner_width,
        split.inner,
        split.predicted,
    )
    return split


def parameters_at(model: CausalLM, count: str) -> Callable[[int, int], int]:
    """Return a model's parameters as a function of residual width and feed-forward width.

    Four models without memory of their own tell: the count is linear in each width.
    count: "total" (tied tensors once) or "non_embedding" (without embedding and head).
    """
    divisor = model.architecture.divisor(model.config)
    widths, inners = (divisor, 2 * divisor), (1, 2)
    (a, b), (c, d) = ([_counted(model, k, m)[count] for m in inners] for k in widths)
    per_both = ((d - c) - (b - a)) // divisor
    per_width = (c - a) // divisor - per_both
    per_inner = (b - a) - divisor * per_both
    constant = a - divisor * per_width - per_inner - divisor * per_both

    def parameters(width: int, inner: int) -> int:
        return constant + per_width * width + per_inner * inner + per_both * width * inner

    return parameters


def _counted(model: CausalLM, width: int, inner: int) -> dict[str, int]:
    config = resized(model.config, width)
    setattr(config, model.architecture.inner, inner)
    with torch.device("meta"):
        return count_parameters(CausalLM.in_memory(type(model.module)(config)))


def best_split(
    model: CausalLM,
    share: float,
    count: str,
    divisor: int,
    residual: Law,
    feed_forward: Law,
    *,
    untied: bool = False,
) -> Split:
    """Return the widths of least predicted excess among those within a share of the parameters.

    untied: whether a tied model's head gets weights of its own, which count.

    Raises ValueError where even the narrowest model has more.
    """
    parameters = parameters_at(model, count)
    width, inner = model.width, model.inner_width
    allowed = share * parameters(width, inner)
    outputs = len(model.module.get_submodule(model.architecture.head).weight)
    head = outputs if untied and model.tied and count == "total" else 0
    best: Split | None = None
    for k in range(divisor, width + 1, divisor):
        slope = parameters(k, 1) - parameters(k, 0)
        room = int((allowed - parameters(k, 0) - head * k) // slope)
        m = min(inner, room if room >= inner else room // INNER_STEP * INNER_STEP)
        if m < 1:
            break
        predicted = residual(1 - k / width) + feed_forward(1 - m / inner)
        if best is None or predicted <= best.predicted:
            best = Split(k, m, predicted, residual, feed_forward)
    if best is None:
        raise ValueError(f"params {share:g}: no pair of widths has so few parameters")
    return best


def measure(
    model: CausalLM, tokens: Tensor, divisor: int, narrowed: Callable[[int, int, Tensor], CausalLM]
) -> tuple[Law, Law]:
    """Return the laws of the residual and of the feed-forward width.

    Args:
        tokens: int64 (windows, length); some are used.
        divisor: of the residual width.
        narrowed: (residual width, feed-forward width, tokens) -> the model narrowed to these.
    """
    windows, rest = _split_windows(tokens)
    dense = math.log(perplexity(model, windows, desc="budget"))
    laws = []
    full = (model.width, model.inner_width)
    for axis, step in enumerate((divisor, 1)):
        shares: list[float] = []
        excesses: list[float] = []
        steps = 0
        for probe in PROBES:
            steps = max(steps + 1, round(probe * full[axis] / step))
            removed = steps * step
            if removed >= full[axis]:
                raise ValueError(f"the model's width of {full[axis]} is too small to be probed")
            width, inner = (n - removed * (i == axis) for i, n in enumerate(full))
            narrow = narrowed(width, inner, rest)
            found = math.log(perplexity(narrow, windows, desc="budget"))
            shares.append(removed / full[axis])
            excesses.append(found - dense)
        laws.append(Law.through((shares[0], shares[1]), (excesses[0], excesses[1])))
    return laws[0], laws[1]


def _split_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to measure on and windows to solve on, spread evenly; a single one does both."""
    if len(tokens) == 1:
        return tokens, tokens
    held = torch.zeros(len(tokens), dtype=torch.bool)
    held[_spread(len(tokens), min(WINDOWS, len(tokens) - 1))] = True
    rest = tokens[~held]
    return tokens[held], rest[_spread(len(rest), CUT_WINDOWS)]


def _spread(count: int, wanted: int) -> Tensor:
    """At most ``wanted`` of the numbers below ``count``, evenly spaced."""
    wanted = min(wanted, count)
    return torch.arange(wanted) * count // wanted
