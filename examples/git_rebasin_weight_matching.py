"""Git Re-Basin: the weight matching of two networks, its assignments by ``dotresize.assignment``.

Ainsworth et al., arXiv 2209.04836, algorithm 1: permute the hidden neurons of network B so that
``sum_l <A_l, P_l B_l P_{l-1}^T>`` is largest, one layer after another in random order until none
changes. A layer's step is a linear assignment, in the published code scipy's
``linear_sum_assignment(score, maximize=True)``; here it is ``assignment(score)``. Both are run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from small_network import accuracy, train
from torch import Tensor

from dotresize import assignment


def by_scipy(score: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


def permuted(weights: list[Tensor], orders: list[Tensor]) -> list[Tensor]:
    """Reorder the hidden neurons; the function, its inputs and classes stay."""
    ends = [torch.arange(weights[0].shape[1]), *orders, torch.arange(len(weights[-1]))]
    steps = zip(weights, pairwise(ends), strict=True)
    return [weight[after][:, before] for weight, (before, after) in steps]


def weight_matching(a: list[Tensor], b: list[Tensor], solve: Callable) -> list[Tensor]:
    orders = [torch.arange(len(weight)) for weight in b[:-1]]
    random = torch.Generator().manual_seed(0)
    changed = True
    while changed:
        changed = False
        for i in torch.randperm(len(orders), generator=random).tolist():
            free = torch.arange(len(orders[i]))
            other = permuted(b, [*orders[:i], free, *orders[i + 1 :]])
            order = solve(a[i] @ other[i].T + a[i + 1].T @ other[i + 1])
            changed |= not torch.equal(order, orders[i])
            orders[i] = order
    return orders


if __name__ == "__main__":
    a, b = train([256, 256], seed=10), train([256, 256], seed=11)
    ours, theirs = (permuted(b, weight_matching(a, b, solve)) for solve in (assignment, by_scipy))
    objectives, accuracies = [], []
    for name, other in (("unmatched", b), ("dotresize", ours), ("scipy", theirs)):
        objectives.append(sum(float((x * y).sum()) for x, y in zip(a, other, strict=True)))
        accuracies.append(accuracy([(x + y) / 2 for x, y in zip(a, other, strict=True)]))
        print(f"{name}: objective {objectives[-1]:.3f}, averaged {accuracies[-1]:.2%}")
    print(f"the networks themselves: {accuracy(a):.2%} and {accuracy(b):.2%}")
    assert abs(objectives[1] - objectives[2]) <= 1e-4 * abs(objectives[2])
    assert accuracies[1] > accuracies[0] + 0.05
