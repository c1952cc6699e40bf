"""Least squares on the calibration tokens, layer by layer: what narrowing broke, as far as it goes.

Two copies of the tokens are carried: through the dense model and through the narrowed one, whose
earlier layers are already refitted. With s = sqrt(k / D), in each layer in order:

readers   u is what a narrowed norm delivers, v what the dense norm delivers;
          A = argmin |u A - v|^2 + lam |A - A0|^2,   A0 = Q' diag(w) / s (what absorption used),
          and every dense reader W becomes W A'.
writer    of the feed-forward: h is what it reads, x the narrowed stream before it, x_d the dense
          stream after it;
          B = argmin |h B + (x - s x_d Q) / m|^2 + lam |B - B0|^2,   B0 what absorption left and m
          what the model multiplies the writer's output by (1 in most),
          and the writer becomes B'. It steers the stream back to the projected dense one, which
          is what a tied head was chosen for (dotresize.narrow.tied_head).

Attention's writers stay as they are: kinds of text left out of the calibration asked for that in
nearly every layer. lam is the ridge of dotresize.least_squares: in proportion to each input for
readers of a stream that is narrower than it was, the same for all inputs where they already had
their own solution and for inner neurons, many of which hardly ever fire. Unless it is given, it is
``PRIOR_TOKENS`` (``PRIOR_TOKENS_KEPT`` where the residual keeps its width) over the number of
tokens for each input: the weights as they were count like so many tokens more, and with few tokens
they hardly change. That was chosen by the perplexity of kinds of text left out (docs/compress.md);
choosing the ridge in every solve by the squared error on them asks for ten times as much, and is
worse in perplexity on all text. No parameter is added.

Where every location has a map of its own (baselines/adapters.py), Q is that of the location which
is read or written, and x has passed its adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import Streams, captured, inner_neurons, norms_of
from dotresize.least_squares import FLOAT, NormalEquations, has_matrix_units, product
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.layer_widths import pad_layer
from dotresize.models.linear import keep_outputs, linear_of, rows_of, set_rows
from dotresize.narrow.absorb import matmul_in_blocks, product_type
from dotresize.narrow.maps import is_identity
from dotresize.narrow.norm_scales import scale_final_norm, scale_layer
from dotresize.narrow.options import Inner, Options
from dotresize.offload.memory_plan import activation_place

# What the old weights weigh beside the tokens, as many tokens for each input of a solve: of a
# stream that is narrower than it was, and of one that keeps its width, whose readers were right.
PRIOR_TOKENS = 3.5
PRIOR_TOKENS_KEPT = 10.0
# How often the first token of a window counts, BOS or not, where the residual keeps its width. All
# tokens attend to it, and its activations are a hundred times larger: what is lost there is lost
# everywhere. Where the residual is narrowed it counts as any other: what its large channels lose no
# reader brings back (docs/compress.md).
FIRST_WEIGHT = 100.0
# How often a window that the model wrote itself counts where the residual is narrower, as long as
# all of them count no more than all that were given: half as many windows count twice each. They
# stand for kinds of text that nobody thought of, such as documentation left out of 24 windows
# (SmolLM2-135M, 468 channels, two seeds): 12 windows of the model's own lose 1.00 and 1.08 there,
# 8 that count twice 1.05 and 1.23, or three times 1.04 and 1.22. Where the residual keeps its width
# a window counts as any other: twice made 1152 inner neurons by 6 windows as bad as no refit.
OWN_COUNTS = 2.0


class Residual:
    """How the residual passes a narrowed layer: as it is. A method with adapters says otherwise."""

    def body(self, layer: nn.Module) -> nn.Module:
        """Return the decoder layer itself."""
        return layer

    def past_feed_forward(self, layer: nn.Module, middle: Tensor) -> Tensor:
        """Return what the connection around the feed-forward makes of the stream before it."""
        return middle


@torch.no_grad()
def refit(
    dense: CausalLM,
    narrow: CausalLM,
    q: Tensor | list[Tensor],
    tokens: Tensor,
    inner: Inner,
    options: Options,
    residual: Residual | None = None,
    *,
    own: int = 0,
    dropped: Collection[int] = (),
) -> list[float]:
    """Refit ``narrow`` in place, and narrow its feed-forward blocks; see the module's header.

    Each layer's scales are then moved into its norms (narrow/norm_scales.py).

    Returns what each feed-forward misses of what its writer should write, as a share of its
    squares on the tokens, which count as in ``add_windows``; without ``refit``, of what it wrote
    before. Of experts, and of those that are left as they are, there is none.

    Args:
        dense: the original model.
        narrow: ``absorb(dense, q, dropped=dropped)``, perhaps with adapters.
        q: (D, k) float64, orthonormal columns, or one for each residual location.
        tokens: int64 (windows, length).
        inner: neurons that the feed-forward block of each layer of ``narrow`` keeps, or None for
            all.
        options: whether weights are refitted (``refit``), with which ``ridge``, and how the neurons
            are chosen (``ff_method``).
        residual: how it passes the narrowed layers.
        own: how many of the windows, the last ones, the model wrote itself.
        dropped: numbers of the dense layers that ``narrow`` has not: the dense stream alone passes
            them, and what comes after makes up for them as far as it goes.

    A head of its own is a reader of the final norm and is refitted as such; a tied one has been
    chosen before (narrow/tied_head.py).
    """
    run = _Refit(dense, narrow, q, tokens, options, residual or Residual(), own)
    left = iter(enumerate(narrow.layers))
    with closing(run):
        for i, name in enumerate(tqdm(dense.layers, desc="refit", unit="layer", disable=None)):
            if i in dropped:
                if options.refit:
                    with dense.resident(name) as dense_layer:
                        run.pass_dense(dense_layer)
                continue
            number, own_name = next(left)
            with dense.resident(name) as dense_layer, narrow.resident(own_name) as layer:
                width = None if inner is None else inner[number]
                run.layer(dense_layer, layer, run.qs[2 * i : 2 * i + 3], width)
                body = run.residual.body(layer)
                if inner is not None and options.pad:
                    pad_layer(run.architecture, body, max(inner))
                scale_layer(run.architecture, body)
        if inner is not None:
            setattr(narrow.config, run.architecture.inner, max(inner))
        if options.refit and not narrow.tied:
            run.head(dense, narrow)
        else:
            scale_final_norm(narrow)
    return run.lost


class _Refit:
    """The streams of both models, moved through the layers side by side."""

    def __init__(
        self,
        dense: CausalLM,
        narrow: CausalLM,
        q: Tensor | list[Tensor],
        tokens: Tensor,
        options: Options,
        residual: Residual,
        own: int,
    ) -> None:
        self.architecture = dense.architecture
        self.lost: list[float] = []  # by each feed-forward so far
        self._options, self.residual, self._type = options, residual, product_type(narrow)
        place = activation_place(dense, tokens)
        self._narrow = Streams(narrow, tokens, options.batch_windows, place)
        # Where nothing is refitted, nothing is to be met but what the narrowed model does itself.
        self._dense = None
        if options.refit:
            self._dense = Streams(dense, tokens, options.batch_windows, place)
        count = len(self._narrow)
        # What the dense norms deliver, and what the narrowed stream lacks, per batch.
        self._delivered = [ActivationCache(count, place) for _ in self.architecture.sublayers]
        self._middle, self._inner = ActivationCache(count, place), ActivationCache(count, place)
        self._first, self._cut = first_weight(dense, narrow), narrow.width < dense.width
        own = own if self._cut else 0
        self._weights = window_weights(len(tokens), own, options.batch_windows)
        self._multiplier = self.architecture.multiplier(dense.config)
        self._stream_scale = self.architecture.stream_scale(dense.width, narrow.width, narrow.tied)
        locations = 2 * len(dense.layers) + 1
        self._same = isinstance(q, Tensor) and is_identity(q)
        self.qs = [q.to(FLOAT)] * locations if isinstance(q, Tensor) else [x.to(FLOAT) for x in q]

    def close(self) -> None:
        """Let everything that was kept between layers go."""
        self._narrow.close()
        if self._dense is not None:
            self._dense.close()
        for cache in (*self._delivered, self._middle, self._inner):
            cache.close()

    def pass_dense(self, dense_layer: nn.Module) -> None:
        """Move the dense stream alone past a layer."""
        self._run_dense(dense_layer, [])

    def layer(
        self, dense_layer: nn.Module, layer: nn.Module, qs: list[Tensor], inner: int | None
    ) -> None:
        """Refit one layer.

        qs: of what attention and feed-forward read, and the next layer; inner: neurons that the
        feed-forward keeps, None for all.
        """
        attention, feed_forward = self.architecture.sublayers
        body = self.residual.body(layer)
        dense_norms = norms_of(self.architecture, dense_layer)
        norms = norms_of(self.architecture, body)
        self._run_dense(dense_layer, dense_norms)
        self._readers(
            self._narrow.stream, self._delivered[0], dense_norms[0], norms[0], qs[0],
            _pairs(dense_layer, body, attention.readers),
        )  # fmt: skip
        for i in range(len(self._narrow)):
            self._middle[i] = self._narrow.until(layer, norms[1], i)
        self._readers(
            self._middle, self._delivered[1], dense_norms[1], norms[1], qs[1],
            _pairs(dense_layer, body, feed_forward.readers),
        )  # fmt: skip
        if feed_forward.experts:
            self._narrow.pass_layer(layer)
            return
        for i, x in enumerate(self._middle):
            self._inner[i] = inner_neurons(body, feed_forward, x)
            self._middle[i] = self.residual.past_feed_forward(layer, x)
        kept = self._write(body, feed_forward, qs[2], inner)
        writer = linear_of(body, feed_forward.writer)
        for i, (x, h) in enumerate(zip(self._middle, self._inner, strict=True)):
            written = writer(h if kept is None else h[..., kept])
            self._narrow.stream[i] = x + self._multiplier * written

    def head(self, dense: CausalLM, narrow: CausalLM) -> None:
        """Refit a head that has weights of its own."""
        names = self.architecture.final_norm, self.architecture.head
        with (
            dense.resident(*names) as (dense_norm, dense_head),
            narrow.resident(*names) as (norm, head),
        ):
            assert self._dense is not None
            for i, x in enumerate(self._dense.stream):
                self._delivered[0][i] = dense_norm(x)
            heads = _pairs(dense_head, head, ("weight",))
            stream, delivered = self._narrow.stream, self._delivered[0]
            self._readers(stream, delivered, dense_norm, norm, self.qs[-1], heads)
            scale_final_norm(narrow)  # while they are held: what is let go is written

    def _run_dense(self, layer: nn.Module, norms: list[nn.Module]) -> None:
        if self._dense is None:
            return
        for i in range(len(self._dense)):
            with captured(norms) as seen:
                self._dense.stream[i] = self._dense.run(layer, i)
            for delivered, output in zip(self._delivered[: len(norms)], seen, strict=True):
                delivered[i] = output

    def _readers(
        self,
        stream: ActivationCache,
        delivered: ActivationCache,
        dense_norm: nn.Module,
        norm: nn.Module,
        q: Tensor,
        readers: list[tuple[Tensor, Tensor]],
    ) -> None:
        if not self._options.refit:
            return
        prior = q.mT * self.architecture.gain(dense_norm).to(q) / (q.shape[1] / q.shape[0]) ** 0.5
        equations = NormalEquations(prior)
        for x, v, weights in zip(stream, delivered, self._weights, strict=True):
            add_windows(equations, norm(x), v, weights, self._first)
        equations.total()
        ridge = ridge_of(self._options, equations.tokens_per_input, cut=self._cut)
        a = equations.solve(ridge, proportional=self._cut)
        for dense_reader, reader in readers:
            matmul_in_blocks(dense_reader, a.mT.to(self._type), out=reader)

    def _write(
        self, layer: nn.Module, part: Sublayer, q: Tensor, inner: int | None
    ) -> Tensor | None:
        """Refit a feed-forward's writer; return which inner neurons stay, None for all."""
        own = self._dense is None
        if own and inner is None:
            return None
        writer = linear_of(layer, part.writer)
        through = None if own or not self._apart(writer) else self._stream_scale * q
        prior = rows_of(writer).to(FLOAT)
        equations = NormalEquations(prior, met_by_prior=own, through=through)
        wanted = self._missing(q) if through is None else self._factors()
        for h, missing, weights in zip(self._inner, wanted, self._weights, strict=True):
            if missing is not None and writer.bias is not None:
                missing = missing - writer.bias.float()
            add_windows(equations, h, missing, weights, self._first)
        kept, lost = refit_writer(layer, part, equations, inner, self._options, cut=self._cut)
        self.lost.append(lost)
        return kept

    def _apart(self, writer: Any) -> bool:
        """Return whether both streams are multiplied as they are, not what a writer lacks."""
        plain = writer.bias is None and self._multiplier == 1.0 and not self._same
        return plain and has_matrix_units(writer.weight)

    def _factors(self) -> Iterator[Tensor]:
        """Yield both streams of each batch side by side: the dense one's end, and the middle."""
        assert self._dense is not None
        for x, wanted in zip(self._middle, self._dense.stream, strict=True):
            yield torch.cat([wanted, x], -1)

    def _missing(self, q: Tensor) -> Iterator[Tensor | None]:
        """Yield what each batch's writer should write, float32, bias and all; None for nothing."""
        if self._dense is None:
            yield from [None] * len(self._narrow)
            return
        project = None if self._same else (self._stream_scale * q).float()
        for x, wanted in zip(self._middle, self._dense.stream, strict=True):
            wanted = wanted.flatten(0, -2)
            wanted = wanted.float() if project is None else product(wanted, project)
            yield (wanted - x.flatten(0, -2).float()) / self._multiplier


def first_weight(dense: CausalLM, narrow: CausalLM) -> float:
    """Return how often the first token of a window counts; see ``FIRST_WEIGHT``."""
    return FIRST_WEIGHT if narrow.width == dense.width else 1.0


def ridge_of(options: Options, tokens_per_input: float, *, cut: bool) -> float:
    """Return the ridge of a solve: what was asked for, or by how much is known.

    cut: whether the residual is narrower than it was.
    """
    if options.ridge is not None:
        return options.ridge
    return (PRIOR_TOKENS if cut else PRIOR_TOKENS_KEPT) / tokens_per_input


def window_weights(windows: int, own: int, batch_windows: int) -> list[list[float]]:
    """Return how often each window counts, by this process's batches.

    own: how many of all windows, the last ones, the model wrote itself.
    """
    given = windows - own
    weight = min(OWN_COUNTS, max(1.0, given / own)) if own else 1.0
    counts = torch.ones(windows, dtype=FLOAT, device="cpu")
    counts[given:] = weight
    mine = distributed.share(counts)
    return [part.tolist() for part in mine.split(batch_windows)] if len(mine) else []


def add_windows(
    equations: NormalEquations, u: Tensor, v: Tensor | None, weights: list[float], first: float
) -> None:
    """Add windows of tokens, each as often as its weight says, and its first token more often.

    u: (..., inputs), v: (..., outputs) or None, of as many windows as there are weights, one after
    the other, those of one weight side by side; first: how often the first token of each counts
    beside its others.
    """
    u = u.reshape(len(weights), -1, u.shape[-1])
    v = None if v is None else v.reshape(len(weights), -1, v.shape[-1])
    for weight in dict.fromkeys(weights):
        mine = [i for i, other in enumerate(weights) if other == weight]
        some = slice(mine[0], mine[-1] + 1)
        equations.add(u[some], None if v is None else v[some], weight)
        if first != 1.0:
            firsts = None if v is None else v[some, 0]
            equations.add_few(u[some, 0], firsts, weight * (first - 1.0))


def refit_writer(
    layer: nn.Module,
    part: Sublayer,
    equations: NormalEquations,
    inner: int | None,
    options: Options,
    *,
    cut: bool,
) -> tuple[Tensor | None, float]:
    """Choose a feed-forward's neurons and solve its writer, in place.

    cut: whether the residual is narrower than it was.

    Returns which neurons stay, int64 (inner,), None for all; and what the block then misses of what
    the writer should write, as a share of its squares.
    """
    equations.total()
    rows = equations.prior
    kept = None
    if inner is not None and inner < len(equations.gram):
        kept, rows = options.ff_method.choose(equations.gram, equations.cross, rows, inner)
        equations.restrict(kept, rows)
        for name in part.readers:
            keep_outputs(linear_of(layer, name), kept, part.stacked)
    if options.refit:
        rows = equations.solve(ridge_of(options, equations.tokens_per_input, cut=cut))
    lost = equations.lost(rows)
    set_rows(linear_of(layer, part.writer), rows)
    return kept, lost


def _pairs(
    dense: nn.Module, narrow: nn.Module, names: tuple[str, ...]
) -> list[tuple[Tensor, Tensor]]:
    return [(dense.get_parameter(name), narrow.get_parameter(name)) for name in names]
