"""Torch-Pruning, with neurons that go merged into those that stay.

Torch-Pruning finds the layers that belong together, and prunes them all. ``Redundancy`` is how far
a neuron is from its nearest neighbour over real inputs, times what reads it. ``merge`` runs before
a group is pruned: by a plan between what goes and what stays, readers move to neurons alike.
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from small_network import accuracy, activations, clusters, train
from torch import Tensor, nn

from dotresize import activation_cost, l1_cost, sinkhorn


def readers(group: tp.Group) -> list[nn.Linear]:
    return [dep.target.module for dep, _ in group if dep.handler == tp.prune_linear_in_channels]


class Redundancy(tp.importance.Importance):
    def __init__(self, seen: dict[nn.Module, Tensor]) -> None:
        self.seen = seen  # activations (tokens, neurons) of each layer

    def __call__(self, group: tp.Group) -> Tensor:
        cost = activation_cost(self.seen[group[0].dep.target.module], metric="sqeuclidean")
        apart = cost.fill_diagonal_(torch.inf).amin(1).sqrt()
        return apart * sum(layer.weight.norm(dim=0) for layer in readers(group))


def merge(group: tp.Group, x: Tensor) -> None:
    gone = torch.tensor(group[0].idxs)
    kept = torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, gone, False)
    cost = l1_cost(x[:, gone], x[:, kept])
    plan = sinkhorn(cost, 0.02 * float(cost.mean()), tol=1e-6).plan
    for layer in readers(group):
        layer.weight.data[:, kept] += layer.weight[:, gone] @ (plan * len(gone))


def pruned(weights: list[Tensor], by_redundancy: bool, merging: bool) -> float:
    parts = [part for w in weights for part in (nn.Linear(*w.T.shape, bias=False), nn.ReLU())]
    model, x = nn.Sequential(*parts[:-1]), clusters(2048, seed=3)[0]
    model.load_state_dict({f"{2 * i}.weight": w for i, w in enumerate(weights)})
    seen = dict(zip(model[::2], activations(weights, x), strict=True))
    importance = Redundancy(seen) if by_redundancy else tp.importance.MagnitudeImportance()
    choices = {"pruning_ratio": 0.5, "ignored_layers": [model[-1]]}
    for group in tp.pruner.BasePruner(model, x[:1], importance, **choices).step(interactive=True):
        if merging:
            merge(group, seen[group[0].dep.target.module])
        group.prune()
    return accuracy([weight.detach() for weight in model.parameters()])


if __name__ == "__main__":
    weights = train([256, 128], seed=10)
    rows = [pruned(weights, r, merging) for r in (False, True) for merging in (False, True)]
    print("magnitude {:.2%}, merged {:.2%}; redundancy {:.2%}, merged {:.2%}".format(*rows))
    assert min(rows[2] - rows[0], rows[1] - rows[0], rows[3] - rows[2]) > 0.01
