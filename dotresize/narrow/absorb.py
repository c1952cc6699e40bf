"""Apply a width map to a model's weights, by its architecture's axis table.

With an orthonormal Q (D, k) and s = sqrt(k / D), weights in ``nn.Linear`` layout (out, in):

    embedding  E <- s E Q            writer  W <- s Q' W,  bias <- s bias Q
    reader     W <- W diag(w) Q / s  norm    w <- 1

An RMSNorm divides by the root of the mean over its width. Scaling what is written by s makes the
mean over k channels what the mean over D was, so the new model's own norms, eps included, equal
the projected dense model's, up to the factor s that the readers undo. Embeddings that the model
itself multiplies by the root of its width (Gemma) are E Q instead.

With a map for every residual location, a reader takes the map of the location that it reads, a
writer that of the next location, and the residual connection between them an adapter (k, k):
Q_r' Q_(r+1), which no plain checkpoint can hold (see baselines/adapters.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dotresize.least_squares import FLOAT, product
from dotresize.models import Sublayer
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import config_left, kept_layers, source_of, widths_left
from dotresize.models.resized import resized
from dotresize.narrow.maps import is_identity
from dotresize.offload.memory_plan import TABLE_ROWS


@torch.no_grad()
def absorb(
    model: CausalLM,
    q: Tensor | Sequence[Tensor],
    *,
    untie: bool = False,
    readers: bool = True,
    dropped: Collection[int] = (),
) -> CausalLM:
    """Return a new model of residual width ``q.shape[1]``; the given one is untouched.

    Args:
        model: of a supported architecture. Of an offloaded one the result is offloaded, and its
            parts are made when they are first held.
        q: (D, k) float64 with orthonormal columns, or one for each residual location, whose
            adapters are then still to be added.
        untie: give a tied head its own weights, which makes the final norm's fusion exact. A head
            kept tied stays ``E Q`` and the norm keeps ``diag(Q' diag(w) Q)``; what that loses is
            small only if q is close to a selection of axes.
        readers: whether what reads the residual is multiplied by the map; else it is zeros, which
            the refit replaces (narrow/refit.py).
        dropped: numbers of layers to leave out.

    Returns:
        a model of the same dtype, and class unless its type changes (models/resized.py), whose
        plain checkpoint holds the result.
    """
    return model.derived(Absorption(model, q, untie=untie, readers=readers, dropped=dropped))


def product_type(model: CausalLM) -> torch.dtype:
    """Return the type in which products of the model's weights by a map are computed.

    float32 where the results are written in half precision, whose rounding is thousands of times
    coarser; else float64.
    """
    return torch.float32 if model.store.written_bytes < 4 else FLOAT


class Absorption:
    """The weights of the narrowed model, computed a part at a time.

    Attributes:
        model: the given one.
        config: of the narrowed one.
        tied: whether that keeps one table for embedding and head.
        inner_widths: of its feed-forwards.
    """

    def __init__(
        self,
        model: CausalLM,
        q: Tensor | Sequence[Tensor],
        *,
        untie: bool = False,
        readers: bool = True,
        dropped: Collection[int] = (),
    ) -> None:
        """See ``absorb``."""
        self.model = model
        self._type, self._readers = product_type(model), readers
        self.architecture = model.architecture
        sublayers = 2 * len(model.layers)
        self._qs = [q] * (sublayers + 1) if isinstance(q, Tensor) else list(q)
        # Products by an identity, as where the feed-forward alone is narrowed, are left out.
        self._same = isinstance(q, Tensor) and is_identity(q)
        self.width, self.narrow = self._qs[0].shape
        self.tied = model.tied and not untie
        self._s = (self.narrow / self.width) ** 0.5
        self._table = self.architecture.table_scale(self.width, self.narrow, self.tied)
        self._stream = self.architecture.stream_scale(self.width, self.narrow, self.tied)
        self._kept = kept_layers(len(model.layers), dropped)
        self.inner_widths = widths_left(model, dropped)
        self.config = resized(config_left(model, dropped), self.narrow)
        self.config.tie_word_embeddings = self.tied

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a part, by their names in it, in the dtypes of the given model."""
        architecture = self.architecture
        if name == architecture.embedding:
            with self.model.resident(name) as module:
                return {"weight": self._read(module.weight, self._table, self._qs[0])}
        if name == architecture.final_norm:
            return self._final_norm()
        if name == architecture.head:
            return {} if self.tied else self._own_head()
        return self._layer(source_of(name, self.model, self._kept))

    def _layer(self, name: str) -> dict[str, Tensor]:
        first = 2 * int(name.rpartition(".")[2])
        with self.model.resident(name) as layer:
            new: dict[str, Tensor] = {}
            for i, sublayer in enumerate(self.architecture.sublayers, first):
                self._sublayer(layer, sublayer, self._qs[i], self._qs[i + 1], new)
            for key, weight in layer.state_dict().items():
                if key not in new:  # off the residual; the models share no memory
                    new[key] = weight.clone()
        return new

    def _sublayer(
        self, layer: Any, part: Sublayer, read: Tensor, written: Tensor, new: dict[str, Tensor]
    ) -> None:
        norm = layer.get_submodule(part.norm)
        gain = self.architecture.gain(norm).to(read)
        for reader in part.readers:
            weight = layer.get_parameter(reader)
            if self._readers:
                new[reader] = self._read(weight, gain[:, None] / self._s, read)
            else:
                new[reader] = weight.new_zeros(*weight.shape[:-1], self.narrow)
        weight = layer.get_parameter(part.writer)
        if self._same:
            new[part.writer] = weight.clone()
        else:
            new[part.writer] = _written(weight, (self._stream * written.mT).to(self._type))
        bias = part.writer.removesuffix("weight") + "bias"
        if bias in layer.state_dict():
            vector = layer.get_parameter(bias)
            new[bias] = _like(vector, self._stream * vector.to(read) @ written)
        new |= self._norm(
            part.norm + ".", norm, torch.ones(self.narrow, dtype=torch.float32, device="cpu")
        )

    def _norm(self, prefix: str, norm: Any, gain: Tensor) -> dict[str, Tensor]:
        if self.architecture.layer_norm:
            return {}
        return {f"{prefix}weight": _like(norm.weight, gain - self.architecture.norm_offset)}

    def _final_norm(self) -> dict[str, Tensor]:
        last = self._qs[-1]
        with self.model.resident(self.architecture.final_norm) as norm:
            gain = torch.ones(self.narrow, dtype=torch.float32, device="cpu")
            if self.tied:
                scale = self.architecture.gain(norm).to(last)
                gain = (last * last * scale[:, None]).sum(0) / (self._s * self._table)
            return self._norm("", norm, gain)

    def _own_head(self) -> dict[str, Tensor]:
        last, head = self._qs[-1], self.architecture.head
        with self.model.resident(self.architecture.final_norm) as norm:
            scale = self.architecture.gain(norm).to(last)
        with self.model.resident(head) as module:
            weight = module.weight
            if self._readers:
                new = {"weight": self._read(weight, scale[:, None] / self._s, last)}
            else:
                new = {"weight": weight.new_zeros(len(weight), self.narrow)}
            if module.bias is not None:
                new["bias"] = module.bias.detach().clone()
        return new

    def _read(self, weight: Tensor, scale: Tensor | float, q: Tensor) -> Tensor:
        """Return rows (..., D) of a weight times ``scale * q``; scale: (D, 1) float64, or one."""
        if not self._same:
            return matmul_in_blocks(weight, (scale * q).to(self._type))
        new = torch.empty_like(weight)
        each = scale[:, 0] if isinstance(scale, Tensor) else q.new_tensor([scale])
        for old_rows, rows in _blocks(weight, new):
            rows.copy_(old_rows * each)
        return new


def matmul_in_blocks(table: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``table @ matrix`` by blocks of rows, in the table's dtype.

    table: (..., D); matrix: (D, k), of ``product_type``; out: contiguous.
    """
    new = table.new_empty(*table.shape[:-1], matrix.shape[1]) if out is None else out
    for old_rows, rows in _blocks(table, new):
        rows.copy_(_times(old_rows, matrix))
    return new


def _blocks(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of rows of both, views of them."""
    blocks = (x.view(-1, x.shape[-1]).split(TABLE_ROWS) for x in (old, new))
    return zip(*blocks, strict=True)


def _written(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return ``matrix @ weight`` in the weight's dtype, for one expert after the other."""
    new = weight.new_empty(*weight.shape[:-2], len(matrix), weight.shape[-1])
    each = (x.view(-1, *x.shape[-2:]) for x in (weight, new))
    for old, rows in zip(*each, strict=True):
        rows.copy_(_times(matrix, old))
    return new


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, of a weight and a map, in the map's type."""
    return a.double() @ b.double() if FLOAT in (a.dtype, b.dtype) else product(a, b)


def _like(old: Tensor, value: Tensor) -> Tensor:
    return value.to(old.device, old.dtype).contiguous()
