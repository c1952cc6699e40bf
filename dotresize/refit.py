"""Least squares on the calibration tokens, layer by layer: what narrowing broke, as far as it goes.

Two copies of the tokens are carried: through the dense model and through the narrowed one, whose
earlier layers are already corrected. With s = sqrt(k / D), in each layer in order:

readers   u is what a narrowed norm delivers, v what the dense norm delivers;
          A = argmin |u A - v|^2 + lam |A - A0|^2,   A0 = Q' diag(w) / s (what absorption used),
          and every dense reader W becomes W A'.
writer    of the feed-forward: h is what it reads, x the narrowed stream before it, x_d the dense
          stream after it;
          B = argmin |h B + x - s x_d Q|^2 + lam |B - B0|^2,   B0 what absorption left,
          and the writer becomes B'. It steers the stream back to the projected dense one, which
          is all that a tied head, not to be corrected itself, can understand.

Attention's writers stay as they are: sources left out asked for that in nearly every layer. lam is
ridge times the mean diagonal of the Gram matrix; the ridge is chosen in every solve on sources
left out (least_squares.choose_ridge). No parameter is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.absorb import is_tied
from dotresize.feed_forward import choose_neurons
from dotresize.least_squares import FLOAT, NormalEquations, choose_ridge
from dotresize.models import architecture_of
from dotresize.streams import Spill, Streams, captured, inner_neurons, norms_of


@dataclass
class Correction:
    """What ``correct`` is to do, and the ridges it chose.

    Attributes:
        readers_and_writers: correct the weights; False only narrows the feed-forward blocks.
        ridge: of every solve, or None to choose each on sources left out.
        inner_width: neurons that each feed-forward block keeps, or None for all.
        inner_method: of ``feed_forward.METHODS``.
        chosen: per kind of solve, the ridge of each layer.
    """

    readers_and_writers: bool = True
    ridge: float | None = None
    inner_width: int | None = None
    inner_method: str = "eliminate"
    chosen: dict[str, list[float]] = field(default_factory=dict)

    def solve(self, kind: str, equations: NormalEquations, prior: Tensor) -> Tensor:
        chosen = self.chosen.setdefault(kind, [])
        ridge = self.ridge
        if ridge is None:
            ridge = choose_ridge(equations, prior, *chosen[-1:])
        chosen.append(ridge)
        return equations.solve(prior, ridge)


@torch.no_grad()
def correct(
    dense: Any,
    narrow: Any,
    q: Tensor,
    sources: list[Tensor],
    correction: Correction,
    *,
    batch_windows: int = 4,
) -> None:
    """Correct ``narrow`` in place, and narrow its feed-forward blocks; see the module's header.

    Args:
        dense: the original model.
        narrow: ``absorb(dense, q)``.
        q: (D, k) float64, orthonormal columns.
        sources: calibration tokens, int64 (windows, length) for each kind of text.
        correction: what to do; takes down the ridges that were chosen.

    A head of its own is a reader of the final norm and is corrected as such; a tied one is not.
    """
    walk = _Walk(dense, narrow, q, sources, correction, batch_windows)
    layers = list(zip(walk.dense_layers, walk.layers, strict=True))
    for dense_layer, layer in tqdm(layers, desc="refit", unit="layer", disable=None):
        walk.layer(dense_layer, layer)
    if correction.inner_width is not None:
        narrow.config.intermediate_size = correction.inner_width
    if correction.readers_and_writers and not is_tied(narrow):
        walk.head(dense, narrow)


class _Walk:
    """Both models' streams, moved through the layers side by side."""

    def __init__(
        self,
        dense: Any,
        narrow: Any,
        q: Tensor,
        sources: list[Tensor],
        correction: Correction,
        batch_windows: int,
    ) -> None:
        self.architecture = architecture_of(dense.config)
        self.correction = correction
        self.dense_layers = dense.get_submodule(self.architecture.layers)
        self.layers = narrow.get_submodule(self.architecture.layers)
        self._wide = Streams(dense, sources, batch_windows)
        self._thin = Streams(narrow, sources, batch_windows)
        count = len(self._wide)
        # What the dense norms deliver, and what the narrowed stream lacks, per batch.
        self._delivered = [Spill(count) for _ in self.architecture.sublayers]
        self._middle, self._inner = Spill(count), Spill(count)
        self._sources = len(sources)
        self._q = q.to(FLOAT)
        self._scale = (q.shape[1] / q.shape[0]) ** 0.5

    def layer(self, dense_layer: nn.Module, layer: nn.Module) -> None:
        attention, feed_forward = self.architecture.sublayers
        dense_norms = norms_of(self.architecture, dense_layer)
        norms = norms_of(self.architecture, layer)
        self._run_dense(dense_layer, dense_norms)
        self._readers(
            self._thin.stream, self._delivered[0], dense_norms[0], norms[0],
            _pairs(dense_layer, layer, attention.readers),
        )  # fmt: skip
        for i in range(len(self._thin)):
            self._middle[i] = self._thin.until(layer, norms[1], i)
        self._readers(
            self._middle, self._delivered[1], dense_norms[1], norms[1],
            _pairs(dense_layer, layer, feed_forward.readers),
        )  # fmt: skip
        for i in range(len(self._thin)):
            self._inner[i] = inner_neurons(layer, feed_forward, self._middle[i])
        writer = layer.get_submodule(feed_forward.writer)
        kept = self._write(writer, [layer.get_submodule(name) for name in feed_forward.readers])
        for i, (x, h) in enumerate(zip(self._middle, self._inner, strict=True)):
            self._thin.stream[i] = x + writer(h if kept is None else h[..., kept])

    def head(self, dense: Any, narrow: Any) -> None:
        norm = narrow.get_submodule(self.architecture.final_norm)
        dense_norm = dense.get_submodule(self.architecture.final_norm)
        for i, x in enumerate(self._wide.stream):
            self._delivered[0][i] = dense_norm(x)
        heads = _pairs(dense, narrow, (self.architecture.head,))
        self._readers(self._thin.stream, self._delivered[0], dense_norm, norm, heads)

    def _run_dense(self, layer: nn.Module, norms: list[nn.Module]) -> None:
        for i in range(len(self._wide)):
            with captured(norms) as seen:
                self._wide.stream[i] = self._wide.run(layer, i)
            for delivered, (_, output) in zip(self._delivered, seen, strict=True):
                delivered[i] = output

    def _readers(
        self,
        stream: Spill,
        delivered: Spill,
        dense_norm: nn.Module,
        norm: nn.Module,
        readers: list[tuple[Any, Any]],
    ) -> None:
        if not self.correction.readers_and_writers:
            return
        prior = self._q.mT * dense_norm.weight.to(FLOAT) / self._scale  # type: ignore[operator]
        equations = NormalEquations(self._sources, prior)
        for source, x, v in zip(self._thin.sources, stream, delivered, strict=True):
            equations.add(source, norm(x), v)
        a = self.correction.solve("readers", equations, prior)
        for dense_reader, reader in readers:
            weight = dense_reader.weight.to(FLOAT) @ a.mT
            reader.weight.copy_(weight.to(reader.weight.dtype))

    def _write(self, writer: Any, readers: list[Any]) -> Tensor | None:
        """Correct a feed-forward's writer; returns which inner neurons stay, None for all."""
        correction = self.correction
        if not correction.readers_and_writers and correction.inner_width is None:
            return None
        prior = writer.weight.to(FLOAT).mT
        bias = 0.0 if writer.bias is None else writer.bias.float()
        project = (self._scale * self._q).float()
        equations = NormalEquations(self._sources, prior)
        batches = zip(self._thin.sources, self._inner, self._middle, self._wide.stream, strict=True)
        for source, h, x, wanted in batches:
            equations.add(source, h, wanted.float() @ project - x.float() - bias)
        kept = None
        if correction.inner_width is not None:
            gram = equations.gram.sum(0)
            cross = equations.cross.sum(0) if correction.readers_and_writers else gram @ prior
            kept, prior = choose_neurons(
                correction.inner_method, gram, cross, prior, correction.inner_width
            )
            equations.restrict(kept)
            for reader in readers:
                _keep_rows(reader, kept)
        b = prior
        if correction.readers_and_writers:
            b = correction.solve("writers", equations, prior)
        writer.in_features = len(b)
        writer.weight = nn.Parameter(b.mT.to(writer.weight.dtype).contiguous())
        return kept


def _pairs(dense: nn.Module, narrow: nn.Module, names: tuple[str, ...]) -> list[tuple[Any, Any]]:
    return [(dense.get_submodule(name), narrow.get_submodule(name)) for name in names]


def _keep_rows(linear: Any, kept: Tensor) -> None:
    linear.out_features = len(kept)
    for name in ("weight", "bias"):
        parameter = getattr(linear, name)
        if parameter is not None:
            setattr(linear, name, nn.Parameter(parameter[kept].clone()))
