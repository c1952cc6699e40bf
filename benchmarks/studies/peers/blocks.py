"""Whole layers out: ShortGPT (arXiv 2403.03853) and SLEB (arXiv 2402.09025).

ShortGPT removes at once the layers that change the direction of the stream least,

    BI = 1 - mean cos(x before, x after)

SLEB removes one after the other the layer without which the calibration text is likeliest, measured
anew after each. As many go as come nearest to the parameters that are wanted.
"""

from __future__ import annotations

import time
from contextlib import closing

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dotresize.calibration.residual_stream import Streams
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import SameParts

from .layers import BATCH_WINDOWS, Layer, Pruned, layers_of, to_remove

# SLEB's judge: this many windows of the calibration, spread over it. Every layer is tried anew
# after each removal, so that all of them would take hours of a CPU.
JUDGED_WINDOWS = 4


def short_gpt(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model without the layers of least influence."""
    influence = block_influence(model, tokens)
    gone = influence.topk(layers_to_remove(model, share), largest=False).indices.tolist()
    return _without(model, gone, None)


def block_influence(model: CausalLM, tokens: Tensor) -> Tensor:
    """Return BI of the header for each layer."""
    layers = layers_of(model)
    found = torch.zeros(len(layers), dtype=torch.float64)
    with torch.no_grad(), closing(Streams(model, tokens, BATCH_WINDOWS)) as streams:
        for number, layer in enumerate(layers):
            for i, before in enumerate(streams.stream):
                after = streams.run(layer.module, i)
                found[number] += (1 - cosine_similarity(before, after, -1)).double().sum()
                streams.stream[i] = after
    return found / tokens.numel()


def layers_to_remove(model: CausalLM, share: float) -> int:
    return max(1, round(to_remove(model, share) / _size(Layer(model, 0))))


def sleb(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model without the layers that a greedy search finds.

    A search is kept for the next call with the same model and tokens, and goes on from there.
    """
    search = _searches.get((id(model), tokens.numpy().tobytes()))
    if search is None:
        _searches.clear()
        search = _searches[id(model), tokens.numpy().tobytes()] = _Search(model, tokens)
    count = layers_to_remove(model, share)
    search.until(count)
    return _without(model, search.gone[:count], sum(search.seconds[:count]))


class _Search:
    """The layers that go, in their order, and what it took to find each."""

    def __init__(self, model: CausalLM, tokens: Tensor) -> None:
        self._model = model
        count = min(JUDGED_WINDOWS, len(tokens))
        self._tokens = tokens[torch.arange(count) * len(tokens) // count]
        self.gone: list[int] = []
        self.seconds: list[float] = []

    @torch.no_grad()
    def until(self, count: int) -> None:
        """Search until so many layers are found."""
        layers = layers_of(self._model)
        while len(self.gone) < count:
            start = time.perf_counter()
            left = [i for i in range(len(layers)) if i not in self.gone]
            with closing(Streams(self._model, self._tokens, len(self._tokens))) as streams:
                found = {}
                before = streams.stream[0]
                for place, number in enumerate(left):  # before: in front of this layer
                    stream = before
                    for later in left[place + 1 :]:
                        stream = streams.run(layers[later].module, 0, stream)
                    found[number] = self._loss(streams, stream)
                    before = streams.run(layers[number].module, 0, before)
            self.gone.append(min(found, key=lambda number: found[number]))
            self.seconds.append(time.perf_counter() - start)

    def _loss(self, streams: Streams, stream: Tensor) -> float:
        total = 0.0
        for j, ids in enumerate(self._tokens):  # a window's logits at a time
            logits = streams.logits(0, stream[j : j + 1], slice(j, j + 1))
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[1:]))
        return total


_searches: dict[tuple[int, bytes], _Search] = {}


def _without(model: CausalLM, gone: list[int], seconds: float | None) -> Pruned:
    removed = len(gone) * _size(Layer(model, 0))
    narrow = model.store.derived(SameParts(model, set(gone)))
    narrow.store.finish()
    return Pruned(narrow, removed, {"layers": sorted(gone)}, seconds)


def _size(layer: Layer) -> int:
    return sum(weight.numel() for weight in layer.module.parameters())
