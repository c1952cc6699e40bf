"""2SSP: neurons by their activations, then whole attentions (Sandri et al., arXiv 2501.17771).

First every feed-forward keeps as many of its neurons, those whose activations have the largest L2
norm over the tokens of a window, a mean over the windows. Then attentions are left out one after
the other, each time the one without which the perplexity of a little calibration text (2048 tokens)
is lowest. With N layers, s the share that goes, and the sizes of a feed-forward and an attention,

    attentions that go = round(N s^(|FFN| / (1.5 |attention|)))
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.evaluate import perplexity
from dotresize.models.causal_lm import CausalLM

from .layers import Layer, Pruned, layers_of, least, to_remove, watched

ALPHA = 1.5
JUDGED_TOKENS = 2048


def prune(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model with narrower feed-forwards and without some attentions."""
    new = model.copied()
    layers = layers_of(new)
    wanted = to_remove(new, share)
    attentions = attentions_to_remove(layers[0], len(layers), 1 - share)
    in_all = (wanted - attentions * layers[0].of_attention) / len(layers)
    neurons = round(in_all / layers[0].of_neuron)
    norms = [torch.zeros(layer.inner, dtype=torch.float64) for layer in layers]
    for number, (inner, _) in watched(new, tokens, lambda one: [one.down]):
        norms[number] += inner.double().norm(dim=1).sum(0)
    removed = 0
    for layer, norm in zip(layers, norms, strict=True):
        removed += layer.remove_neurons(least(norm, neurons))
    few = tokens[: max(1, JUDGED_TOKENS // tokens.shape[1])]
    order = [_remove_attention(new, layers, few) for _ in range(attentions)]
    removed += attentions * layers[0].of_attention
    about = {"ff_width": layers[0].inner - neurons, "attentions": order}
    return Pruned(new, removed, about)


def attentions_to_remove(layer: Layer, layers: int, sparsity: float) -> int:
    """Return how many of so many layers lose their attention."""
    return round(layers * sparsity ** (layer.of_feed_forward / layer.of_attention / ALPHA))


@torch.no_grad()
def _remove_attention(model: CausalLM, layers: list[Layer], tokens: Tensor) -> int:
    """Remove the attention without which the perplexity is lowest; return its number."""
    found: dict[int, float] = {}
    for number, layer in enumerate(layers):
        weight = layer.o.weight.clone()
        if weight.any():
            layer.o.weight.zero_()
            found[number] = perplexity(model, tokens, desc=f"without attention {number}")
            layer.o.weight.copy_(weight)
    best = min(found, key=lambda number: found[number])
    layers[best].o.weight.zero_()
    return best
