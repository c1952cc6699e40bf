"""The average of networks of different seeds by torch's AveragedModel, their neurons aligned first.

Neurons of a layer have no order, so that a plain average mixes unlike ones. Here every other
network's neurons take the places of the first's: all networks at once, one layer after another.
"""

from __future__ import annotations

import torch
from small_network import accuracy, activations, clusters, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dotresize import activation_cost, assignment


def aligned(networks: list[list[Tensor]], x: Tensor) -> list[list[Tensor]]:
    """Return the networks with their neurons in the first one's order."""
    outputs = [
        torch.stack(same) for same in zip(*[activations(w, x) for w in networks], strict=True)
    ]
    networks = [[*weights] for weights in networks]
    for layer, seen in enumerate(outputs[:-1]):  # (networks, tokens, neurons)
        first = seen[:1].expand(len(seen) - 1, -1, -1)
        cost = activation_cost(first, seen[1:], metric="correlation")
        for weights, order in zip(networks[1:], assignment(cost, maximize=False), strict=True):
            weights[layer] = weights[layer][order]
            weights[layer + 1] = weights[layer + 1][:, order]
    return networks


def average(networks: list[list[Tensor]]) -> list[Tensor]:
    modules = [nn.ParameterList(weights) for weights in networks]
    averaged = AveragedModel(modules[0])
    for module in modules:
        averaged.update_parameters(module)
    return [*averaged.module]


if __name__ == "__main__":
    networks, x = [train([256, 256], seed) for seed in range(4)], clusters(2048, seed=3)[0]
    alone = sum(accuracy(weights) for weights in networks) / len(networks)
    plain, matched = accuracy(average(networks)), accuracy(average(aligned(networks, x)))
    print(f"accuracy: each {alone:.2%}, average {plain:.2%}, aligned first {matched:.2%}")
    assert matched > plain + 0.1
