"""What the examples share: a task, and ReLU networks for it as lists of weight matrices.

The matrices are (out, in), as in torch.nn.Linear, without biases: inputs end in a constant 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Matrices this small are not worth a second thread, least of all on cores that others use too.
torch.set_num_threads(1)


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points of 60 Gaussian clusters: inputs (count, 25) and labels (count,)."""
    centres = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    cluster = torch.randint(60, (count,), generator=random)
    points = centres[cluster] + 0.8 * torch.randn(count, 24, generator=random)
    return torch.cat([points, torch.ones(count, 1)], 1), cluster % 10


def activations(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Return the activations of each hidden layer (tokens, neurons), then the logits."""
    outputs = [x]
    for weight in weights[:-1]:
        outputs.append(torch.relu(outputs[-1] @ weight.T))
    return [*outputs[1:], outputs[-1] @ weights[-1].T]


def train(hidden: list[int], seed: int) -> list[Tensor]:
    """Train a network with its own initial weights and its own order of 8192 points."""
    x, labels = clusters(8192, seed=1)
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(m, n, generator=random) for n, m in pairwise([25, *hidden, 10])]
    weights = [(w * (2 / w.shape[1]) ** 0.5).requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(10):
        for batch in torch.randperm(len(x), generator=random).split(256):
            optimizer.zero_grad()
            cross_entropy(activations(weights, x[batch])[-1], labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return [weight.detach() for weight in weights]


def accuracy(weights: list[Tensor]) -> float:
    """Return the share of 8192 other points whose class has the largest logit."""
    x, labels = clusters(8192, seed=2)
    return float((activations(weights, x)[-1].argmax(1) == labels).double().mean())
