"""A feed-forward width for each layer: the widths that lose least at a given total.

Layers are not equally dear. With e_l(m) what backward elimination of layer l down to m neurons
loses of what its block writes (narrow/feed_forward.py), and K_l the Kullback-Leibler divergence of
the model's predictions, dense from narrowed, when that layer alone is narrowed to r_l neurons, the
predicted loss of some widths is

    sum_l  K_l e_l(m_l) / e_l(r_l),        sum_l m_l at most what there is room for.

The scale K_l / e_l(r_l) is needed: by e_l alone the layer that the output depends on most would be
narrowed most. K_l is measured on windows that the elimination has not seen, with one narrowed
stream for each layer, all of which pass the later, dense layers side by side; so each layer is held
once, also where weights stay in their files. What it costs to leave a layer out is measured like
that as well, and added for each layer that is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import Streams, captured_inputs
from dotresize.evaluate import CHUNK
from dotresize.least_squares import FLOAT, over_tokens
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import kept_layers
from dotresize.models.linear import linear_of, rows_of, set_rows
from dotresize.narrow.calibrate import held_out, spread
from dotresize.narrow.feed_forward import RIDGE, Elimination, elimination, recombined
from dotresize.narrow.options import Options
from dotresize.narrow.round_width import FEW, FEW_STEP, STEPS
from dotresize.offload.memory_plan import ALLOCATION_TOKENS

# No width, of a layer or of all, is narrowed further than to this share.
LEAST = 0.1
# How many windows divergences are measured on, at most and of all, and how many tokens each begins
# with: each layer has a stream of them, and many windows short say more than a few whole ones.
# SmolLM2-135M, widths by 2 windows of 512, 4 of 256, 8 of 128 and 12 of 512: mean excess 0.343,
# 0.341, 0.341, 0.347, and by what 12 of 512 predict 0.529, 0.514, 0.508, 0.498 (equal: 0.679).
MEASURED = 8
MEASURED_SHARE = 1 / 4
MEASURED_TOKENS = ALLOCATION_TOKENS // MEASURED
# Predictions are compared at every second token: neighbours say much the same, and the head is a
# third of the time.
EVERY = 2
# On how many windows neurons are eliminated, at most.
SOLVED = 12
# Stands for the divergence of predictions that are not finite, in nats: more than any other.
ENDLESS = 1e6
# A divergence is measured where a layer has lost this share of what it loses at ``LEAST``, or more.
ENOUGH = 0.01


@dataclass(frozen=True)
class Curves:
    """What each layer loses at every width.

    Attributes:
        reference: r_l, the width of each layer at which its divergence was measured.
        divergence: K_l in nats.
        eliminations: of each layer's neurons.
        without: the divergence without a layer, in nats; none if it was not asked for.
    """

    reference: list[int]
    divergence: list[float]
    eliminations: list[Elimination]
    without: list[float] = field(default_factory=list)

    def loss(self, layer: int, widths: Sequence[int]) -> list[float]:
        """Return the predicted loss of a layer at some widths, in nats."""
        course = self.eliminations[layer]
        at_reference = course.lost_at([self.reference[layer]])[0]
        scale = self.divergence[layer] / at_reference if at_reference > 0 else 0.0
        return [scale * lost if lost > 0 else 0.0 for lost in course.lost_at(widths)]

    def predicted(self, widths: Sequence[int], dropped: Collection[int] = ()) -> float:
        """Return the predicted loss of the model at a width for each layer that stays, in nats."""
        kept = kept_layers(len(self.eliminations), dropped)
        lost = sum(self.loss(i, [width])[0] for i, width in zip(kept, widths, strict=True))
        return lost + sum(self.without[i] for i in dropped)


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

    equal: what each layer that stays has where all get the same, which is returned where nothing
    is predicted to lose less.
    """
    full = model.inner_widths
    kept = kept_layers(len(full), dropped)
    found = allocate(curves, total, full, multiple_for(full, options), dropped)
    if found is None or curves.predicted(found, dropped) >= curves.predicted(equal, dropped):
        found = list(equal)
    shown = {i: _choices(full[i], max(1, full[i] // 16)) for i in kept}
    drawn = (zip(m, curves.loss(i, m), strict=True) for i, m in shown.items())
    return Allocation(
        tuple(found),
        sum(equal),
        curves.predicted(found, dropped),
        curves.predicted(equal, dropped),
        tuple(curves.reference[i] for i in kept),
        tuple(curves.divergence[i] for i in kept),
        tuple(tuple(curve) for curve in drawn),
    )


def curves_of(
    model: CausalLM,
    tokens: Tensor,
    share: float,
    options: Options,
    *,
    first: float,
    without: bool = False,
) -> Curves:
    """Return the curves of a model's layers by some of the calibration's windows.

    tokens: int64 (windows, length); share, first, without: see ``measure``.
    """
    count = max(1, min(MEASURED, int(MEASURED_SHARE * len(tokens))))
    rest, measured = held_out(len(tokens), count)
    rest = rest[spread(len(rest), max(SOLVED, distributed.size()))]
    return measure(
        model,
        tokens[rest],
        tokens[measured, :MEASURED_TOKENS],
        share,
        first=first,
        without=without,
        batch_windows=options.batch_windows,
    )


@torch.no_grad()
def measure(
    model: CausalLM,
    solved: Tensor,
    measured: Tensor,
    share: float,
    *,
    first: float,
    without: bool = False,
    batch_windows: int = 4,
) -> Curves:
    """Return the curves of a model's layers.

    Args:
        solved, measured: int64 (windows, length), on which neurons are eliminated, and predictions
            compared.
        share: of each layer's neurons with which its divergence is measured.
        first: how often the first token of a window counts.
        without: whether the divergence without each layer is measured as well.
    """
    found = Curves([], [], [])
    part = model.architecture.sublayers[-1]
    with (
        closing(Streams(model, solved, batch_windows)) as dense,
        closing(_Narrowed(model, measured, batch_windows)) as narrowed,
    ):
        for name in tqdm(model.layers, desc="layer widths", unit="layer", disable=None):
            with model.resident(name) as layer:
                writer = linear_of(layer, part.writer)
                gram = _gram(dense, layer, writer, first)
                rows = rows_of(writer).to(FLOAT)
                least = max(1, int(LEAST * len(rows)))
                course = elimination(gram, gram @ rows, least)
                width = _reference(course, share * len(rows))
                kept = course.kept(width, len(rows))
                narrow = torch.zeros_like(rows)
                narrow[kept] = recombined(gram, rows, kept, RIDGE)
                narrowed.run(layer, part, narrow, without=without)
            found.reference.append(width)
            found.eliminations.append(course)
        divergences = narrowed.divergences()
    each = 2 if without else 1
    found.divergence.extend(divergences[::each])
    found.without.extend(divergences[1::each] if without else [])
    return found


def _reference(course: Elimination, wanted: float) -> int:
    """Return the width near ``wanted`` at which enough is lost for a divergence to be measured.

    It is lower where neurons that never fire go first, and lose nothing.
    """
    most = course.lost[-1][1]
    enough = [left for left, lost in course.lost if lost >= ENOUGH * most]
    return min(max(1, round(wanted)), max(enough))


def _gram(streams: Streams, layer: nn.Module, writer: Any, first: float) -> Tensor:
    """Return the Gram matrix of what the writer reads; the stream is moved past the layer."""
    total: Tensor | None = None
    for i in range(len(streams)):
        with captured_inputs([writer]) as read:
            streams.stream[i] = streams.run(layer, i)
        h = read[0].reshape(len(streams.stream[i]), -1, read[0].shape[-1])
        if total is None:
            total = torch.zeros(h.shape[-1], h.shape[-1], dtype=FLOAT, device=h.device)
        total += over_tokens(*[h.flatten(0, -2)] * 2)
        total.add_(over_tokens(*[h[:, 0]] * 2), alpha=first - 1.0)
    if total is None:  # a process without windows
        width = len(rows_of(writer))
        total = torch.zeros(width, width, dtype=FLOAT, device=writer.weight.device)
    distributed.total(total)
    return total


class _Narrowed:
    """Streams of the measured windows: the dense one, and others changed in one layer passed."""

    def __init__(self, model: CausalLM, tokens: Tensor, batch_windows: int) -> None:
        self._model = model
        self._streams = Streams(model, tokens, batch_windows)
        self._caches: list[ActivationCache] = []

    def close(self) -> None:
        """Let the streams go."""
        self._streams.close()
        for cache in self._caches:
            cache.close()

    def run(self, layer: nn.Module, part: Sublayer, narrow: Tensor, *, without: bool) -> None:
        """Move all streams past a layer, and begin the one whose writer is ``narrow`` there.

        narrow: (inputs, outputs) float64, zero for neurons that are gone; without: begin one that
        does not pass the layer as well.
        """
        streams = self._streams
        new = ActivationCache(len(streams), streams.place)
        past = ActivationCache(len(streams), streams.place) if without else None
        for cache in self._caches:
            for i, stream in enumerate(cache):
                cache[i] = streams.run(layer, i, stream)
        with _replaced(linear_of(layer, part.writer), narrow):
            for i in range(len(streams)):
                new[i] = streams.run(layer, i)
        for i in range(len(streams)):
            if past is not None:
                past[i] = streams.stream[i]
            streams.stream[i] = streams.run(layer, i)
        self._caches += [new] if past is None else [new, past]

    def divergences(self) -> list[float]:
        """Return the mean divergence of every narrowed stream's predictions, in nats.

        Those at every ``EVERY``-th token are compared.
        """
        model, streams = self._model, self._streams
        device = model.device
        sums = torch.zeros(len(self._caches) + 1, dtype=FLOAT, device=device)
        with model.resident(model.architecture.final_norm, model.architecture.head):
            for i in range(len(streams)):
                for j in range(len(streams.stream[i])):
                    one = slice(j, j + 1)
                    expected = streams.logits(i, streams.stream[i][one], one, EVERY)[0]
                    sums[-1] += len(expected)
                    for n, cache in enumerate(self._caches):
                        found = streams.logits(i, cache[i][one], one, EVERY)[0]
                        sums[n] += _divergence(expected, found)
        distributed.total(sums)
        mean = (sums[:-1] / sums[-1]).clamp_min(0.0)
        return mean.nan_to_num(ENDLESS, ENDLESS).tolist()


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the divergence of predictions, summed over tokens; both are logits, (tokens, V)."""
    total = torch.zeros((), dtype=FLOAT, device=expected.device)
    for p, q in zip(expected.split(CHUNK), found.split(CHUNK), strict=True):
        p, q = (x.float().log_softmax(-1) for x in (p, q))
        total += (p.exp() * (p - q)).sum(-1).to(FLOAT).sum()
    return total


@contextmanager
def _replaced(writer: Any, rows: Tensor) -> Iterator[None]:
    """Give a writer other weights during a block."""
    weight = writer.weight
    try:
        set_rows(writer, rows)
        yield
    finally:
        writer.weight = weight


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
