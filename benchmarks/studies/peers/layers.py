"""The matrices of a layer as all peers see them: what they read, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dotresize.accounting import count_parameters
from dotresize.calibration.residual_stream import Streams, captured_inputs
from dotresize.models.causal_lm import CausalLM

BATCH_WINDOWS = 4


class Pruned(NamedTuple):
    """What a peer has made.

    Attributes:
        model: to be evaluated.
        removed: parameters that are gone, whether their places are still there as zeros or not.
        about: what the method chose, for the row.
        seconds: that it took, where a part of it was done before, for another share.
    """

    model: CausalLM
    removed: int
    about: dict[str, Any]
    seconds: float | None = None


class Layer:
    """The linear layers of a decoder layer, of Llama's and Gemma's names.

    Attributes:
        q, k, v, o: of the attention; gate, up, down: of the feed-forward.
        heads: query heads; groups: key-value heads, each shared by heads / groups of them.
        size: rows of a head.
    """

    def __init__(self, model: CausalLM, number: int) -> None:
        self.module = model.module.get_submodule(model.layers[number])
        attention, block = self.module.self_attn, self.module.mlp
        self.q, self.k, self.v, self.o = (
            getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")
        )
        self.gate, self.up, self.down = block.gate_proj, block.up_proj, block.down_proj
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = self.k.weight.shape[0] // self.groups

    @property
    def of_attention(self) -> int:
        """The parameters of the attention's matrices."""
        return sum(linear.weight.numel() for linear in (self.q, self.k, self.v, self.o))

    @property
    def of_feed_forward(self) -> int:
        """The parameters of the feed-forward's matrices."""
        return sum(linear.weight.numel() for linear in (self.gate, self.up, self.down))

    @property
    def of_neuron(self) -> int:
        """The parameters of an inner neuron."""
        return self.of_feed_forward // self.inner

    @property
    def of_group(self) -> int:
        """The parameters of a key-value head with the query heads that share it."""
        return self.of_attention // self.groups

    @property
    def inner(self) -> int:
        return self.down.weight.shape[1]

    @torch.no_grad()
    def remove_neurons(self, gone: Tensor) -> int:
        """Put zeros for inner neurons, a mask; return how many parameters they had."""
        for reader in (self.gate, self.up):
            reader.weight[gone] = 0
        self.down.weight[:, gone] = 0
        return int(gone.sum()) * self.of_neuron

    @torch.no_grad()
    def remove_groups(self, gone: Tensor) -> int:
        """Put zeros where key-value heads, a mask, are written; return how many parameters go.

        Those of their queries, keys and values are counted, and left: nothing reads them.
        """
        self.o.weight[:, self.inputs_of(gone)] = 0
        return int(gone.sum()) * self.of_group

    def inputs_of(self, groups: Tensor) -> Tensor:
        """Return a mask of the inputs of ``o`` that belong to some groups, of their mask."""
        return groups.repeat_interleave(self.heads // self.groups * self.size)


def layers_of(model: CausalLM) -> list[Layer]:
    """Return all layers."""
    return [Layer(model, i) for i in range(len(model.layers))]


def least(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` lowest scores."""
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[scores.topk(count, largest=False).indices] = True
    return found


def to_remove(model: CausalLM, share: float) -> int:
    """Return how many parameters outside the embeddings go where this share of them stays."""
    return round((1 - share) * count_parameters(model)["non_embedding"])


@torch.no_grad()
def watched(
    model: CausalLM, tokens: Tensor, modules: Callable[[Layer], list[nn.Module]]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield, for every layer and batch, what some of the layer's modules read.

    tokens: int64 (windows, length). Yields the layer's number and a tensor for each module, in
    order of execution, (windows, length, inputs); the last is what the layer delivers.
    """
    with closing(Streams(model, tokens, BATCH_WINDOWS)) as streams:
        for number, layer in enumerate(layers_of(model)):
            for i in range(len(streams)):
                with captured_inputs(modules(layer)) as read:
                    out = streams.run(layer.module, i)
                streams.stream[i] = out
                yield number, [*read, out]
