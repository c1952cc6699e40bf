"""A feed-forward width for each layer: the widths that lose least at a given total.

Layers are not equally dear. With e_l(m) what backward elimination of layer l down to m neurons
loses of what its block writes (narrow/feed_forward.py), and K_l the Kullback-Leibler divergence of
the model's predictions, dense from narrowed, when that layer alone is narrowed to r neurons, the
predicted loss of some widths is

    sum_l  K_l e_l(m_l) / e_l(r),        sum_l m_l at most what equal widths r would have.

The scale K_l / e_l(r) is needed: by e_l alone the layer that the output depends on most would be
narrowed most. K_l is measured on windows that the elimination has not seen, with one narrowed
stream for each layer, all of which pass the later, dense layers side by side; so each layer is held
once, also where weights stay in their files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import Streams, captured_inputs
from dotresize.least_squares import FLOAT, over_tokens
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.linear import linear_of, rows_of, set_rows
from dotresize.narrow.calibrate import held_out, spread
from dotresize.narrow.feed_forward import RIDGE, Elimination, elimination, recombined
from dotresize.narrow.options import Options
from dotresize.narrow.refit import FIRST_WEIGHT
from dotresize.narrow.round_width import FEW, FEW_STEP, STEPS

# No layer gets fewer neurons than this share of what it has.
LEAST = 0.1
# Windows on which divergences are measured, as many streams as there are layers pass the model,
# and windows on which neurons are eliminated, at most.
MEASURED = 2
SOLVED = 12


@dataclass(frozen=True)
class Curves:
    """What each layer loses at every width.

    Attributes:
        reference: r, the width of each layer at which its divergence was measured.
        divergence: K_l in nats.
        eliminations: of each layer's neurons.
    """

    reference: list[int]
    divergence: list[float]
    eliminations: list[Elimination]

    def loss(self, layer: int, widths: Sequence[int]) -> list[float]:
        """Return the predicted loss of a layer at some widths, in nats."""
        course = self.eliminations[layer]
        at_reference = course.lost_at([self.reference[layer]])[0]
        scale = self.divergence[layer] / at_reference if at_reference > 0 else 0.0
        return [scale * lost for lost in course.lost_at(widths)]

    def predicted(self, widths: Sequence[int]) -> float:
        """Return the predicted loss of the model at a width for each layer, in nats."""
        return sum(self.loss(i, [width])[0] for i, width in enumerate(widths))


@dataclass(frozen=True)
class Allocation:
    """A feed-forward width for each layer, and why these.

    Attributes:
        widths: of each layer.
        predicted, predicted_equal: the loss of these, and of equal widths of the same total, nats.
        reference, divergence: of ``Curves``.
        curves: of each layer: pairs of a width and the layer's predicted loss there.
    """

    widths: tuple[int, ...]
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
    model: CausalLM, tokens: Tensor, equal: Sequence[int], total: int, options: Options
) -> Allocation:
    """Return the widths of least predicted loss; ``total`` is not less than equal widths take.

    tokens: int64 (windows, length); equal: what each layer has where all get the same.
    """
    full = model.inner_widths
    rest, measured = held_out(len(tokens), MEASURED)
    rest = rest[spread(len(rest), max(SOLVED, distributed.size()))]
    reference = max(equal)
    batch = options.batch_windows
    curves = measure(model, tokens[rest], tokens[measured], reference, batch_windows=batch)
    multiple = options.multiple_of or (STEPS[-1] if max(full) >= FEW else FEW_STEP)
    found = allocate(curves, total, full, multiple * options.tensor_parallel)
    shown = [_choices(width, max(1, width // 16)) for width in full]
    drawn = (zip(m, curves.loss(i, m), strict=True) for i, m in enumerate(shown))
    return Allocation(
        tuple(found),
        curves.predicted(found),
        curves.predicted(equal),
        tuple(curves.reference),
        tuple(curves.divergence),
        tuple(tuple(curve) for curve in drawn),
    )


@torch.no_grad()
def measure(
    model: CausalLM,
    solved: Tensor,
    measured: Tensor,
    reference: int,
    *,
    batch_windows: int = 4,
) -> Curves:
    """Return the curves of a model's layers.

    Args:
        solved, measured: int64 (windows, length), on which neurons are eliminated, and predictions
            compared.
        reference: neurons of each layer where its divergence is measured.
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
                gram = _gram(dense, layer, writer)
                rows = rows_of(writer).to(FLOAT)
                least = max(1, int(LEAST * len(rows)))
                course = elimination(gram, gram @ rows, least)
                width = min(reference, len(rows) - 1)
                kept = course.kept(width, len(rows))
                narrow = torch.zeros_like(rows)
                narrow[kept] = recombined(gram, rows, kept, RIDGE)
                narrowed.run(layer, part, narrow)
            found.reference.append(width)
            found.eliminations.append(course)
        found.divergence.extend(narrowed.divergences())
    return found


def _gram(streams: Streams, layer: nn.Module, writer: Any) -> Tensor:
    """Return the Gram matrix of what the writer reads; the stream is moved past the layer."""
    total: Tensor | None = None
    for i in range(len(streams)):
        with captured_inputs([writer]) as read:
            streams.stream[i] = streams.run(layer, i)
        h = read[0].reshape(len(streams.stream[i]), -1, read[0].shape[-1])
        if total is None:
            total = torch.zeros(h.shape[-1], h.shape[-1], dtype=FLOAT, device=h.device)
        total += over_tokens(*[h.flatten(0, -2)] * 2)
        # The first token counts as it does when the feed-forward is narrowed.
        total.add_(over_tokens(*[h[:, 0]] * 2), alpha=FIRST_WEIGHT - 1.0)
    if total is None:  # a process without windows
        width = len(rows_of(writer))
        total = torch.zeros(width, width, dtype=FLOAT, device=writer.weight.device)
    distributed.total(total)
    return total


class _Narrowed:
    """Streams of the measured windows: the dense one, and one narrowed in each layer passed."""

    def __init__(self, model: CausalLM, tokens: Tensor, batch_windows: int) -> None:
        self._model = model
        self._streams = Streams(model, tokens, batch_windows)
        self._caches: list[ActivationCache] = []

    def close(self) -> None:
        """Let the streams go."""
        self._streams.close()
        for cache in self._caches:
            cache.close()

    def run(self, layer: nn.Module, part: Sublayer, narrow: Tensor) -> None:
        """Move all streams past a layer, and begin the one whose writer is ``narrow`` there.

        narrow: (inputs, outputs) float64, zero for neurons that are gone.
        """
        streams = self._streams
        new = ActivationCache(len(streams), streams.place)
        for cache in self._caches:
            for i, stream in enumerate(cache):
                cache[i] = streams.run(layer, i, stream)
        with _replaced(linear_of(layer, part.writer), narrow):
            for i in range(len(streams)):
                new[i] = streams.run(layer, i)
        for i in range(len(streams)):
            streams.stream[i] = streams.run(layer, i)
        self._caches.append(new)

    def divergences(self) -> list[float]:
        """Return the mean divergence of every narrowed stream's predictions, in nats."""
        model, streams = self._model, self._streams
        device = model.device
        sums = torch.zeros(len(self._caches) + 1, dtype=FLOAT, device=device)
        with model.resident(model.architecture.final_norm, model.architecture.head):
            for i in range(len(streams)):
                for j in range(len(streams.stream[i])):
                    one = slice(j, j + 1)
                    expected = _log_shares(streams, i, streams.stream[i][one], one)
                    share = expected.exp()
                    sums[-1] += expected.shape[0]
                    for n, cache in enumerate(self._caches):
                        found = _log_shares(streams, i, cache[i][one], one)
                        sums[n] += (share * (expected - found)).sum(dtype=FLOAT)
        distributed.total(sums)
        return (sums[:-1] / sums[-1]).clamp_min(0.0).tolist()


def _log_shares(streams: Streams, i: int, stream: Tensor, windows: slice) -> Tensor:
    """Return log predictions, (tokens, vocabulary) float32."""
    return streams.logits(i, stream, windows).float().log_softmax(-1).flatten(0, -2)


@contextmanager
def _replaced(writer: Any, rows: Tensor) -> Iterator[None]:
    """Give a writer other weights during a block."""
    weight = writer.weight
    try:
        set_rows(writer, rows)
        yield
    finally:
        writer.weight = weight


def allocate(curves: Curves, total: int, full: Sequence[int], multiple: int) -> list[int]:
    """Return the widths of least predicted loss: multiples of a number, or all that a layer has.

    total: neurons of all layers together, at most.
    full: the width of every layer. Each keeps ``LEAST`` of it or more.

    Raises ValueError where even the narrowest widths are more than the total.
    """
    units = total // multiple
    best = numpy.zeros(units + 1)
    chosen: list[tuple[list[int], numpy.ndarray]] = []
    for layer, width in enumerate(full):
        widths = _choices(width, multiple)
        losses = curves.loss(layer, widths)
        costs = [-(-w // multiple) for w in widths]
        table = numpy.full((len(widths), units + 1), numpy.inf)
        for row, cost, loss in zip(table, costs, losses, strict=True):
            if cost <= units:
                row[cost:] = best[: units + 1 - cost] + loss
        best = table.min(0)
        chosen.append((widths, table.argmin(0)))
    if not numpy.isfinite(best[-1]):
        raise ValueError(f"no widths of all layers have as few as {total} neurons together")
    found, left = [], units
    for widths, choice in reversed(chosen):
        width = widths[int(choice[left])]
        found.append(width)
        left -= -(-width // multiple)
    return found[::-1]


def _choices(width: int, multiple: int) -> list[int]:
    """Return the widths that a layer may have."""
    least = max(1, -(-max(1, int(LEAST * width)) // multiple)) * multiple
    return [*range(min(least, width), width, multiple), width]
