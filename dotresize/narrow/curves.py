"""What each feed-forward loses at every width, in nats of the model's predictions.

With e_l(m) what backward elimination of layer l down to m neurons loses of what its block writes
(narrow/feed_forward.py), and K_l the Kullback-Leibler divergence of the model's predictions, dense
from narrowed, when that layer alone is narrowed to r_l neurons, layer l is predicted to lose

    K_l e_l(m) / e_l(r_l).

The scale K_l / e_l(r_l) is needed: by e_l alone the layer that the output depends on most would be
narrowed most. K_l is measured on windows that the elimination has not seen, with one narrowed
stream for each layer, all of which pass the later, dense layers side by side; so each layer is held
once, also where weights stay in their files. What it costs to leave a layer out is measured like
that as well.

All measured windows count the same: the divergences of each are scaled so that their sum over the
layers is the mean of these sums. A plain mean would be that of the windows which lose most.
SmolLM2-135M, the same total as 1126 neurons a layer, two seeds: excess 0.494, 0.314 and 0.233 on
articles, news and documentation by a plain mean, 0.509, 0.315 and 0.228 by this one, 0.605, 0.425
and 0.231 by equal widths.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import Streams, captured_inputs
from dotresize.evaluate import CHUNK
from dotresize.least_squares import FLOAT, gram
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import kept_layers
from dotresize.models.linear import linear_of, rows_of, set_rows
from dotresize.narrow.calibrate import held_out, spread
from dotresize.narrow.feed_forward import RIDGE, Elimination, elimination, recombined
from dotresize.narrow.options import Options
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
# The divergence without a layer is measured for this share of the layers, and for so many: those
# that change the stream least. SmolLM2-135M: the four that are missed least are among the five that
# change it least.
LEFT_OUT_SHARE = 1 / 4
LEFT_OUT = 4
# Predictions are compared at every second token: neighbours say much the same, and the head is a
# third of the time.
EVERY = 2
# On how many windows neurons are eliminated, at most.
SOLVED = 12
# Stands for the divergence of predictions that are not finite, in nats: more than any other.
ENDLESS = 1e6
# Less than any divergence, in nats: what is lost is divided by.
TINY = 1e-12
# A divergence is measured where a layer has lost this share of what it loses at the end of its
# curve, or more.
ENOUGH = 0.01


@dataclass(frozen=True)
class Curves:
    """What each layer loses at every width.

    Attributes:
        reference: r_l, the width of each layer at which its divergence was measured.
        divergence: K_l in nats.
        eliminations: of each layer's neurons.
        without: the divergence without a layer, in nats, infinity where it was not measured; none
            if that was not asked for.
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


def curves_of(
    model: CausalLM,
    tokens: Tensor,
    share: float,
    options: Options,
    *,
    first: float,
    least: float = LEAST,
    without: bool = False,
) -> Curves:
    """Return the curves of a model's layers by some of the calibration's windows.

    tokens: int64 (windows, length); share, first, least, without: see ``measure``.
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
        least=least,
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
    least: float = LEAST,
    without: bool = False,
    batch_windows: int = 4,
) -> Curves:
    """Return the curves of a model's layers.

    Args:
        solved, measured: int64 (windows, length), on which neurons are eliminated, and predictions
            compared.
        share: of each layer's neurons with which its divergence is measured.
        first: how often the first token of a window counts.
        least: share of each layer's neurons to which curves go.
        without: whether divergences without a layer are measured as well.
    """
    found = Curves([], [], [])
    part = model.architecture.sublayers[-1]
    with (
        closing(Streams(model, solved, batch_windows)) as dense,
        closing(_Narrowed(model, measured, batch_windows, without=without)) as narrowed,
    ):
        layers = enumerate(tqdm(model.layers, desc="layer widths", unit="layer", disable=None))
        for number, name in layers:
            with model.resident(name) as layer:
                writer = linear_of(layer, part.writer)
                sums = _gram(dense, layer, writer, first)
                rows = rows_of(writer).to(FLOAT)
                course = elimination(sums, sums @ rows, max(1, int(least * len(rows))))
                width = _reference(course, share * len(rows))
                kept = course.kept(width, len(rows))
                narrow = torch.zeros_like(rows)
                narrow[kept] = recombined(sums, rows, kept, RIDGE)
                narrowed.run(layer, part, narrow, number)
            found.reference.append(width)
            found.eliminations.append(course)
        divergences = narrowed.divergences()
    found.divergence.extend(divergences[: len(model.layers)])
    if without:
        measured_ones = dict(zip(narrowed.left_out, divergences[len(model.layers) :], strict=True))
        found.without.extend(measured_ones.get(i, math.inf) for i in range(len(model.layers)))
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
        total += gram(h.flatten(0, -2))
        if first != 1.0:
            total.add_(gram(h[:, 0]), alpha=first - 1.0)
    if total is None:  # a process without windows
        width = len(rows_of(writer))
        total = torch.zeros(width, width, dtype=FLOAT, device=writer.weight.device)
    distributed.total(total)
    return total


class _Narrowed:
    """Streams of the measured windows: the dense one, and others changed in one layer passed.

    Attributes:
        left_out: by a layer's number: the stream that has not passed it.
    """

    def __init__(
        self, model: CausalLM, tokens: Tensor, batch_windows: int, *, without: bool
    ) -> None:
        """Begin with the dense stream. without: whether layers are left out as well."""
        self._model, self._without = model, without
        self._streams = Streams(model, tokens, batch_windows)
        self._narrowed: list[ActivationCache] = []
        self.left_out: dict[int, ActivationCache] = {}
        self._changes: dict[int, float] = {}  # of the stream, by these layers
        count = int(LEFT_OUT_SHARE * len(model.layers))
        self._most_left_out = max(LEFT_OUT, count)

    def close(self) -> None:
        """Let the streams go."""
        self._streams.close()
        for cache in (*self._narrowed, *self.left_out.values()):
            cache.close()

    def _cache(self) -> ActivationCache:
        return ActivationCache(len(self._streams), self._streams.place)

    def run(self, layer: nn.Module, part: Sublayer, narrow: Tensor, number: int) -> None:
        """Move all streams past a layer, and begin the one whose writer is ``narrow`` there.

        narrow: (inputs, outputs) float64, zero for neurons that are gone; number: the layer's.
        """
        streams, new = self._streams, self._cache()
        for cache in (*self._narrowed, *self.left_out.values()):
            for i, stream in enumerate(cache):
                cache[i] = streams.run(layer, i, stream)
        with _replaced(linear_of(layer, part.writer), narrow):
            for i in range(len(streams)):
                new[i] = streams.run(layer, i)
        self._narrowed.append(new)
        if self._without:
            self._leave_out(layer, number)
        else:
            streams.pass_layer(layer)

    def _leave_out(self, layer: nn.Module, number: int) -> None:
        """Move the dense stream past a layer, and begin one that has not, if it changes little."""
        streams, before = self._streams, self._cache()
        sums = torch.zeros(2, dtype=FLOAT, device=self._model.device)
        for i, old in enumerate(streams.stream):
            before[i] = old
            streams.stream[i] = new = streams.run(layer, i)
            share = (new.float() - old.float()).square().sum(-1) / new.float().square().sum(-1)
            sums += torch.stack([share.sum(dtype=FLOAT), sums.new_tensor(share.numel())])
        distributed.total(sums)
        self._changes[number] = float((sums[0] / sums[1]).nan_to_num(math.inf, math.inf))
        self.left_out[number] = before
        if len(self.left_out) > self._most_left_out:
            self.left_out.pop(max(self.left_out, key=self._changes.__getitem__)).close()

    def divergences(self) -> list[float]:
        """Return the divergence of every stream's predictions, in nats: narrowed, then left out.

        Those at every ``EVERY``-th token are compared. All windows count the same; see the header.
        """
        model, streams = self._model, self._streams
        changed, narrowed = [*self._narrowed, *self.left_out.values()], len(self._narrowed)
        # All windows add what the narrowed streams lose, a one, and each stream's share of that.
        sums = torch.zeros(2 + len(changed), dtype=FLOAT, device=model.device)
        with model.resident(model.architecture.final_norm, model.architecture.head):
            for i in range(len(streams)):
                for j in range(len(streams.batches[i])):
                    one = slice(j, j + 1)
                    expected = streams.logits(i, streams.stream[i][one], one, EVERY)[0]
                    found = (streams.logits(i, cache[i][one], one, EVERY)[0] for cache in changed)
                    each = torch.stack([_divergence(expected, own) for own in found])
                    each = (each / len(expected)).clamp_min(0.0)
                    lost = each[:narrowed].nan_to_num(0.0, 0.0).sum().clamp_min(TINY)
                    shares = each.nan_to_num(ENDLESS, ENDLESS) / lost
                    sums += torch.cat([torch.stack([lost, torch.ones_like(lost)]), shares])
        distributed.total(sums)
        lost, windows, shares = sums[0], sums[1], sums[2:]
        return (lost * shares / windows.square()).nan_to_num(ENDLESS, ENDLESS).tolist()


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
