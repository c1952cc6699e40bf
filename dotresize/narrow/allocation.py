"""A feed-forward width for each layer: the widths that lose least at a given total.

Layers are not equally dear. The predicted loss of some widths is the sum of what each layer is
predicted to lose at its own (narrow/curves.py), and it is least, for widths m_l with

    sum_l m_l at most what there is room for,

by dynamic programming over the layers. What it costs to leave a layer out is added for each one
that is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import kept_layers
from dotresize.narrow.curves import LEAST, Curves
from dotresize.narrow.options import Options
from dotresize.narrow.round_width import FEW, FEW_STEP, STEPS

# Layer widths must be predicted to save this share of what equal ones lose: a plain checkpoint is
# worth something, and predictions are not that exact. Gemma 3 270M, feed-forwards at 0.8, by a
# plain mean over windows: 9 % less was predicted, and the excess was 0.243 and not 0.236.
GAIN = 0.1


@dataclass(frozen=True)
class Allocation:
    """A feed-forward width for each layer, and why these.

    Attributes:
        widths: of each layer that stays.
        equal: how many neurons equal widths have in all.
        predicted, predicted_equal: the loss of these, and of equal widths of the same total, nats.
        reference, divergence: of ``Curves``.
        curves: of each layer: pairs of a width and the layer's predicted loss there.
    """

    widths: tuple[int, ...]
    equal: int
    predicted: float
    predicted_equal: float
    reference: tuple[int, ...]
    divergence: tuple[float, ...]
    curves: tuple[tuple[tuple[int, float], ...], ...]

    @classmethod
    def recorded(cls, *, curves: list[list[list[Any]]], **others: Any) -> Allocation:
        """Return an allocation whose fields have been through JSON."""
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in others.items()
        }
        pairs = tuple(tuple((int(m), float(x)) for m, x in curve) for curve in curves)
        return cls(curves=pairs, **lists)


def allocation_of(
    curves: Curves,
    model: CausalLM,
    equal: Sequence[int],
    total: int,
    options: Options,
    dropped: Collection[int] = (),
) -> Allocation:
    """Return the widths of least predicted loss; ``total`` is not less than equal widths take.

    equal: what each layer that stays has where all get the same, which is returned where no others
    are predicted to lose less by ``GAIN``.
    """
    full = model.inner_widths
    kept = kept_layers(len(full), dropped)
    found = allocate(curves, total, full, multiple_for(full, options), dropped)
    lost_by_equal = curves.predicted(equal, dropped)
    if found is None or curves.predicted(found, dropped) >= (1 - GAIN) * lost_by_equal:
        found = list(equal)
    shown = {i: _choices(full[i], max(1, full[i] // 16)) for i in kept}
    drawn = (zip(m, curves.loss(i, m), strict=True) for i, m in shown.items())
    return Allocation(
        tuple(found),
        sum(equal),
        curves.predicted(found, dropped),
        lost_by_equal,
        tuple(curves.reference[i] for i in kept),
        tuple(curves.divergence[i] for i in kept),
        tuple(tuple(curve) for curve in drawn),
    )


def allocate(
    curves: Curves,
    total: int,
    full: Sequence[int],
    multiple: int,
    dropped: Collection[int] = (),
) -> list[int] | None:
    """Return the widths of least predicted loss: multiples of a number, or all that a layer has.

    total: neurons of all layers together, at most.
    full: the width of every layer. Each keeps ``LEAST`` of it or more, but for those ``dropped``.

    None where even the narrowest widths are more than the total.
    """
    units = total // multiple
    best = numpy.zeros(units + 1)
    chosen: list[tuple[list[int], numpy.ndarray]] = []
    for layer in kept_layers(len(full), dropped):
        widths = _choices(full[layer], multiple)
        losses = curves.loss(layer, widths)
        costs = [-(-w // multiple) for w in widths]
        before, best = best, numpy.full(units + 1, numpy.inf)
        choice = numpy.zeros(units + 1, dtype=numpy.int32)
        for number, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            if cost > units:
                continue
            sums = before[: units + 1 - cost] + loss
            better = sums < best[cost:]
            best[cost:][better] = sums[better]
            choice[cost:][better] = number
        chosen.append((widths, choice))
    if not numpy.isfinite(best[-1]):
        return None
    found, left = [], units
    for widths, choice in reversed(chosen):
        width = widths[int(choice[left])]
        found.append(width)
        left -= -(-width // multiple)
    return found[::-1]


def check_room(full: Sequence[int], total: int, multiple: int) -> None:
    """Raise ValueError where the narrowest widths that layers may have are more than a total."""
    least = sum(_choices(width, multiple)[0] for width in full)
    if least > total:
        raise ValueError(
            f"layer_widths: every layer keeps a tenth of its neurons or more, in multiples of "
            f"{multiple}: {least} in all, and there is room for {total}"
        )


def multiple_for(full: Sequence[int], options: Options) -> int:
    """Return what the width of every layer is a multiple of."""
    multiple = options.multiple_of or (STEPS[-1] if max(full) >= FEW else FEW_STEP)
    return multiple * options.tensor_parallel


def _choices(width: int, multiple: int) -> list[int]:
    """Return the widths that a layer may have."""
    least = max(1, -(-max(1, int(LEAST * width)) // multiple)) * multiple
    return [*range(min(least, width), width, multiple), width]
