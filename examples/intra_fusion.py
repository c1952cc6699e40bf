"""Intra-Fusion: half of a network's hidden neurons, the other half merged into them by transport.

Theus et al., arXiv 2402.07839: a neuron is its incoming and outgoing weights, scaled to length 1;
``C_ij`` is the L1 distance from neuron i to the kept neuron j, P the plan between uniform marginals
1/n and 1/m. Incoming weights are averaged, ``m P' W``; outgoing ones go where their neuron goes,
``W (n P)``. (The published code takes n P on both sides: without biases, the same classes.)
``l1_cost`` replaces torch.cdist, ``assignment`` the exact plan of ``ot.emd``, ``sinkhorn`` on a
ragged list gives the entropic ones of all layers. They are compared with plain pruning, with
scipy's solver and with the float64 loop of ``ot_fusion.py``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from ot_fusion import plain_sinkhorn
from scipy.optimize import linear_sum_assignment
from small_network import accuracy, train
from torch import Tensor
from torch.nn.functional import normalize

from dotresize import assignment, l1_cost, sinkhorn, transport_map


def merged(weights: list[Tensor], plans: list[Tensor]) -> list[Tensor]:
    weights = list(weights)
    for i, plan in enumerate(plans):
        weights[i] = transport_map(plan).T.float() @ weights[i]
        weights[i + 1] = weights[i + 1] @ transport_map(plan.T).T.float()
    return weights


if __name__ == "__main__":
    weights = train([256, 128], seed=10)
    neurons = [torch.cat([w, after.T], 1) for w, after in pairwise(weights)]
    kept = [x.norm(dim=1).topk(len(x) // 2).indices for x in neurons]
    pairs = zip(neurons, kept, strict=True)
    costs = [l1_cost(normalize(x).T, targets=k, reduction="sum") for x, k in pairs]
    reg = torch.stack([0.02 * cost.mean() for cost in costs])
    result = sinkhorn(costs, reg, tol=1e-6)
    plain = [plain_sinkhorn(cost, float(r)) for cost, r in zip(costs, reg, strict=True)]
    # A kept neuron takes two in all: uniform marginals make the exact plan an assignment.
    doubled = [cost.repeat(1, 2) for cost in costs]
    columns = [assignment(cost, maximize=False) for cost in doubled]
    by_scipy = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in doubled]
    exact, peer = ([torch.eye(len(c) // 2).repeat(2, 1)[c] for c in x] for x in (columns, by_scipy))
    pruned = [weights[0][kept[0]], weights[1][kept[1]][:, kept[0]], weights[2][:, kept[1]]]
    plans = {"sinkhorn": result.plan, "plain loop": plain, "assignment": exact, "scipy": peer}
    shares = {"whole": accuracy(weights), "pruned": accuracy(pruned)}
    shares |= {name: accuracy(merged(weights, plan)) for name, plan in plans.items()}
    print("\n".join(f"{name:>10}  {share:.2%}" for name, share in shares.items()))
    difference = max(float((p - q).abs().sum()) for p, q in zip(result.plan, plain, strict=True))
    print(f"sinkhorn: {result.n_iter.tolist()} iterations, {difference:.1e} of the mass elsewhere")
    assert difference < 1e-4
    assert abs(shares["sinkhorn"] - shares["plain loop"]) < 1e-3
    totals = [[float((c * p).sum()) for c, p in zip(costs, x, strict=True)] for x in (exact, peer)]
    assert torch.allclose(*torch.tensor(totals), rtol=1e-6)
    assert shares["sinkhorn"] > shares["pruned"] + 0.05
