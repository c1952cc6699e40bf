"""Merging networks of different widths and depths: transport between all pairs of their layers.

Cui et al., Transport and Merge, arXiv 2602.05495: between layer k of the source and layer l of the
target ``C_ij`` is the correlation distance of neurons i and j over the same inputs, P_kl the plan
between uniform marginals, ``D_kl = <C, P>``, and Q a plan of D: which layers belong together. One
``activation_cost`` of all neurons and one ``sinkhorn`` of a ragged list replace two loops over
pairs of layers. The source then moves into the target's shape by ``P diag(1 / beta)``.
"""

from __future__ import annotations

import time

import torch
from ot_fusion import plain_sinkhorn
from small_network import accuracy, activations, clusters, train
from torch import Tensor

from dotresize import activation_cost, sinkhorn, transport_map

REG = 0.05


def plain(x: Tensor, y: Tensor) -> Tensor:
    """Return the plan of one pair of layers in float64; silent neurons correlate with none."""
    found = torch.corrcoef(torch.cat([x, y], 1).T.double())[: x.shape[1], x.shape[1] :]
    return plain_sinkhorn(1 - found.nan_to_num(0), REG)


def merged(a: list[Tensor], plans: list[Tensor], q: Tensor) -> list[Tensor]:
    """Return the source's weights in the target's shape, its layers mixed by the columns of q."""
    count, moves = q.shape[1], [transport_map(plan).float() for plan in plans]
    made = [moves[0].T @ a[0]]  # only first layers read the inputs
    for i in range(1, count):
        parts = [moves[k * count + i].T @ a[k] @ moves[(k - 1) * count + i - 1] * q[k, i]
                 for k in range(1, len(q))]  # fmt: skip
        made.append(torch.stack(parts).sum(0) / q[1:, i].sum())
    return [*made, a[-1] @ moves[-1]]


if __name__ == "__main__":
    a, b = train([160, 160, 96], seed=10), train([256, 192], seed=11)
    source, target = (activations(weights, clusters(2048, seed=3)[0])[:-1] for weights in (a, b))
    start = time.perf_counter()
    cost = activation_cost(torch.cat(source, 1), torch.cat(target, 1), metric="correlation")
    rows, columns = ([layer.shape[1] for layer in net] for net in (source, target))
    pairs = [block for part in cost.split(rows) for block in part.split(columns, 1)]
    result = sinkhorn(pairs, REG, tol=1e-6)
    apart = result.value_linear.view(len(rows), len(columns))
    q = sinkhorn(apart, 0.1 * float(apart.mean()), tol=1e-6).plan.float()
    batched, start = time.perf_counter() - start, time.perf_counter()
    plans = [plain(x, y) for x in source for y in target]
    print(f"pairs: {len(plans)}, {batched:.2f} s, loop {time.perf_counter() - start:.2f} s\n{q}")
    off = max(float((p - o).abs().sum()) for p, o in zip(result.plan, plans, strict=True))
    moved, looped, even = (accuracy(merged(a, p, q)) for p in (result.plan, plans, [
        torch.full_like(plan, 1 / plan.numel()) for plan in plans]))  # fmt: skip
    print(f"moved {moved:.2%}, by the loop {looped:.2%}, evenly {even:.2%}, apart {off:.1e}")
    assert off < 1e-4
    assert moved > even + 0.2
