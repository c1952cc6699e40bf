"""FLAP: inputs of a writer that fluctuate little become its bias (An et al., arXiv 2312.11983).

A writer (the output projection of an attention, the down projection of a feed-forward) with weight
W loses its input j best where the input is nearly constant:

    s_j = var(x_j) |W_:j|^2

Scores are standardised within each layer's attention and each feed-forward, a head's is the mean
of its inputs', and one threshold for the whole model leaves the parameters that are wanted. What
the removed inputs wrote on average becomes the writer's bias. Those of an attention are squared
first, which the paper does not say, but the code of its figures does. A unit of attention is a
key-value head with the query heads that share it; a layer with only one keeps it, as one score has
no spread.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotresize.models.causal_lm import CausalLM

from .layers import Pruned, layers_of, to_remove, watched


class _Moments:
    """Mean and variance of a writer's inputs over the tokens."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        self.count += len(x)
        self.sum = self.sum + x.sum(0)
        self.squares = self.squares + x.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares - self.sum.square() / self.count) / (self.count - 1)


def prune(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model without the units of least fluctuation, and biases in their place."""
    new = model.copied()
    layers = layers_of(new)
    seen = [(_Moments(), _Moments()) for _ in layers]
    for number, (attention, inner, _) in watched(new, tokens, lambda one: [one.o, one.down]):
        seen[number][0].add(attention)
        seen[number][1].add(inner)
    scores, sizes = [], []
    for layer, (attention, inner) in zip(layers, seen, strict=True):
        groups = _standard((attention.variance * _columns(layer.o)).square())
        groups = groups.view(layer.groups, -1).mean(1)
        scores += [groups, _standard(inner.variance * _columns(layer.down))]
        if layer.groups == 1:
            scores[-2] = torch.full_like(groups, torch.inf)
        sizes += [
            torch.full((layer.groups,), layer.of_group),
            torch.full((layer.inner,), layer.of_neuron),
        ]
    gone = _lowest(torch.cat(scores), torch.cat(sizes), to_remove(new, share))
    parts = iter(gone.split([len(one) for one in scores]))
    removed, left = 0, []
    for layer, (attention, inner) in zip(layers, seen, strict=True):
        groups, neurons = next(parts), next(parts)
        removed -= _compensate(layer.o, attention.mean, layer.inputs_of(groups))
        removed -= _compensate(layer.down, inner.mean, neurons)
        removed += layer.remove_groups(groups) + layer.remove_neurons(neurons)
        left.append([int((~groups).sum()), int((~neurons).sum())])
    return Pruned(new, removed, {"groups_and_neurons": left})


def _columns(writer: nn.Linear) -> Tensor:
    return writer.weight.detach().double().square().sum(0)


def _standard(score: Tensor) -> Tensor:
    return (score - score.mean()) / score.std()


def _lowest(scores: Tensor, sizes: Tensor, wanted: int) -> Tensor:
    """Return a mask of the units of lowest score whose sizes add up to about so many."""
    order = scores.argsort()
    gone = torch.zeros(len(scores), dtype=torch.bool)
    total = sizes[order].cumsum(0)
    gone[order[: int((total - wanted).abs().argmin()) + 1]] = True
    return gone


@torch.no_grad()
def _compensate(writer: nn.Linear, mean: Tensor, gone: Tensor) -> int:
    """Add what some inputs write on average to the bias; return the parameters that adds."""
    if not gone.any():
        return 0
    added = (writer.weight.double()[:, gone] @ mean[gone]).to(writer.weight.dtype)
    if writer.bias is not None:
        writer.bias += added
        return 0
    writer.bias = nn.Parameter(added)
    return len(added)
