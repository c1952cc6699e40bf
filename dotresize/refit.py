"""Least squares on the calibration tokens, layer by layer: what narrowing broke, as far as it goes.

Two copies of the tokens are carried: through the dense model and through the narrowed one, whose
earlier layers are already corrected. With s = sqrt(k / D), in each layer in order:

readers   u is what a narrowed norm delivers, v what the dense norm delivers;
          A = argmin |u A - v|^2 + lam |A - A0|^2,   A0 = Q' diag(w) / s (what absorption used),
          and every dense reader W becomes W A'.
writer    of the feed-forward: h is what it reads, x the narrowed stream before it, x_d the dense
          stream after it;
          B = argmin |h B + (x - s x_d Q) / m|^2 + lam |B - B0|^2,   B0 what absorption left and m
          what the model multiplies the writer's output by (1 in most),
          and the writer becomes B'. It steers the stream back to the projected dense one, which
          is what a tied head was chosen for (dotresize.tied_head).

Attention's writers stay as they are: kinds of text left out of the calibration asked for that in
nearly every layer. lam is ridge times the mean diagonal of the Gram matrix, three times that for
writers. The ridge was chosen by the perplexity of kinds of text left out (benchmarks.quality);
choosing it in every solve by the squared error on them asks for ten times as much, and is worse
in perplexity on all text. No parameter is added.

Where every location has a map of its own (dotresize.sliced), Q is that of the location which is
read or written, and x has passed its adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.absorb import is_tied, turned
from dotresize.feed_forward import choose_neurons
from dotresize.least_squares import FLOAT, NormalEquations
from dotresize.linear import keep_outputs, linear_of, rows_of, set_rows
from dotresize.models import Sublayer, architecture_of
from dotresize.products import product
from dotresize.resident import resident
from dotresize.sliced import past_feed_forward, without_adapters
from dotresize.streams import Spill, Streams, captured, inner_neurons, norms_of

RIDGE = 0.1
# A feed-forward's writer has three times the inputs of a reader, and fewer that matter.
WRITER_RIDGES = 3.0


@dataclass(frozen=True)
class Correction:
    """What ``correct`` is to do.

    Attributes:
        readers_and_writers: correct the weights; False only narrows the feed-forward blocks.
        ridge: of the readers; writers take ``WRITER_RIDGES`` times as much.
        inner_width: neurons that each feed-forward block keeps, or None for all.
        inner_method: of ``feed_forward.METHODS``.
    """

    readers_and_writers: bool = True
    ridge: float = RIDGE
    inner_width: int | None = None
    inner_method: str = "eliminate"


@torch.no_grad()
def correct(
    dense: Any,
    narrow: Any,
    q: Tensor | list[Tensor],
    tokens: Tensor,
    correction: Correction,
    *,
    batch_windows: int = 4,
    place: str = "disk",
) -> None:
    """Correct ``narrow`` in place, and narrow its feed-forward blocks; see the module's header.

    Args:
        dense: the original model. This and the other may be on shelves (dotresize.resident).
        narrow: ``absorb(dense, q)``, or ``slice_model(dense, q)``.
        q: (D, k) float64, orthonormal columns, or one for each residual location.
        tokens: int64 (windows, length).
        correction: what to do.
        place: of the activations between layers, see ``streams.Spill``.

    A head of its own is a reader of the final norm and is corrected as such; a tied one has been
    chosen before (dotresize.tied_head).
    """
    walk = _Walk(dense, narrow, q, tokens, correction, batch_windows, place)
    for i in tqdm(range(walk.layers), desc="refit", unit="layer", disable=None):
        name = f"{walk.architecture.layers}.{i}"
        with resident(dense, name) as dense_layer, resident(narrow, name) as layer:
            walk.layer(dense_layer, layer, walk.qs[2 * i : 2 * i + 3])
    if correction.inner_width is not None:
        setattr(narrow.config, walk.architecture.inner, correction.inner_width)
    if correction.readers_and_writers and not is_tied(narrow):
        walk.head(dense, narrow)


class _Walk:
    """Both models' streams, moved through the layers side by side."""

    def __init__(
        self,
        dense: Any,
        narrow: Any,
        q: Tensor | list[Tensor],
        tokens: Tensor,
        correction: Correction,
        batch_windows: int,
        place: str,
    ) -> None:
        self.architecture = architecture_of(dense.config)
        self.correction = correction
        self.layers = len(narrow.get_submodule(self.architecture.layers))
        self._wide = Streams(dense, tokens, batch_windows, place)
        self._thin = Streams(narrow, tokens, batch_windows, place)
        count = len(self._wide)
        # What the dense norms deliver, and what the narrowed stream lacks, per batch.
        self._delivered = [Spill(count, place) for _ in self.architecture.sublayers]
        self._middle, self._inner = Spill(count, place), Spill(count, place)
        self._multiplier = self.architecture.multiplier(dense.config)
        self._stream_scale = self.architecture.stream_scale(
            dense.config.hidden_size, narrow.config.hidden_size, is_tied(narrow)
        )
        locations = 2 * self.layers + 1
        self.qs = [q.to(FLOAT)] * locations if isinstance(q, Tensor) else [x.to(FLOAT) for x in q]

    def layer(self, dense_layer: nn.Module, layer: nn.Module, qs: list[Tensor]) -> None:
        """qs: of the locations that attention and feed-forward read, and of the next one."""
        attention, feed_forward = self.architecture.sublayers
        body = without_adapters(layer)
        dense_norms = norms_of(self.architecture, dense_layer)
        norms = norms_of(self.architecture, body)
        self._run_dense(dense_layer, dense_norms)
        self._readers(
            self._thin.stream, self._delivered[0], dense_norms[0], norms[0], qs[0],
            _pairs(dense_layer, body, attention.readers),
        )  # fmt: skip
        for i in range(len(self._thin)):
            self._middle[i] = self._thin.until(layer, norms[1], i)
        self._readers(
            self._middle, self._delivered[1], dense_norms[1], norms[1], qs[1],
            _pairs(dense_layer, body, feed_forward.readers),
        )  # fmt: skip
        if feed_forward.experts:
            for i in range(len(self._thin)):
                self._thin.stream[i] = self._thin.run(layer, i)
            return
        for i, x in enumerate(self._middle):
            self._inner[i] = inner_neurons(body, feed_forward, x)
            self._middle[i] = past_feed_forward(layer, x)
        kept = self._write(body, feed_forward, qs[2])
        writer = linear_of(body, feed_forward.writer)
        for i, (x, h) in enumerate(zip(self._middle, self._inner, strict=True)):
            written = writer(h if kept is None else h[..., kept])
            self._thin.stream[i] = x + self._multiplier * written

    def head(self, dense: Any, narrow: Any) -> None:
        names = self.architecture.final_norm, self.architecture.head
        with (
            resident(dense, *names) as (dense_norm, dense_head),
            resident(narrow, *names) as (norm, head),
        ):
            for i, x in enumerate(self._wide.stream):
                self._delivered[0][i] = dense_norm(x)
            heads = _pairs(dense_head, head, ("weight",))
            stream, delivered = self._thin.stream, self._delivered[0]
            self._readers(stream, delivered, dense_norm, norm, self.qs[-1], heads)

    def _run_dense(self, layer: nn.Module, norms: list[nn.Module]) -> None:
        for i in range(len(self._wide)):
            with captured(norms) as seen:
                self._wide.stream[i] = self._wide.run(layer, i)
            for delivered, output in zip(self._delivered, seen, strict=True):
                delivered[i] = output

    def _readers(
        self,
        stream: Spill,
        delivered: Spill,
        dense_norm: nn.Module,
        norm: nn.Module,
        q: Tensor,
        readers: list[tuple[Tensor, Tensor]],
    ) -> None:
        if not self.correction.readers_and_writers:
            return
        prior = q.mT * self.architecture.gain(dense_norm).to(q) / (q.shape[1] / q.shape[0]) ** 0.5
        equations = NormalEquations(prior)
        for x, v in zip(stream, delivered, strict=True):
            equations.add(norm(x), v)
        equations.total()
        a = equations.solve(self.correction.ridge)
        for dense_reader, reader in readers:
            turned(dense_reader, a.mT, out=reader)

    def _write(self, layer: nn.Module, part: Sublayer, q: Tensor) -> Tensor | None:
        """Correct a feed-forward's writer; returns which inner neurons stay, None for all."""
        correction = self.correction
        if not correction.readers_and_writers and correction.inner_width is None:
            return None
        writer = linear_of(layer, part.writer)
        prior = rows_of(writer).to(FLOAT)
        bias = 0.0 if writer.bias is None else writer.bias.float()
        project = (self._stream_scale * q).float()
        equations = NormalEquations(prior)
        for h, x, wanted in zip(self._inner, self._middle, self._wide.stream, strict=True):
            missing = product(wanted.flatten(0, -2), project) - x.flatten(0, -2).float()
            equations.add(h, missing / self._multiplier - bias)
        return solve_writer(layer, part, equations, correction)


def solve_writer(
    layer: nn.Module, part: Sublayer, equations: NormalEquations, correction: Correction
) -> Tensor | None:
    """Choose a feed-forward's neurons and solve its writer, in place; which stay, None for all."""
    equations.total()
    rows = equations.prior
    kept = None
    if correction.inner_width is not None:
        gram = equations.gram
        cross = equations.cross if correction.readers_and_writers else gram @ rows
        kept, rows = choose_neurons(
            correction.inner_method, gram, cross, rows, correction.inner_width
        )
        equations.restrict(kept, rows)
        for name in part.readers:
            keep_outputs(linear_of(layer, name), kept, part.stacked)
    if correction.readers_and_writers:
        rows = equations.solve(WRITER_RIDGES * correction.ridge)
    set_rows(linear_of(layer, part.writer), rows)
    return kept


def _pairs(
    dense: nn.Module, narrow: nn.Module, names: tuple[str, ...]
) -> list[tuple[Tensor, Tensor]]:
    return [(dense.get_parameter(name), narrow.get_parameter(name)) for name in names]
