"""OT fusion of two networks, the transport between their neurons by ``dotresize.sinkhorn``.

Singh and Jaggi, arXiv 1910.05653, algorithm 1 with activations: ``C_ij`` is the Euclidean distance
between neuron i of A and neuron j of B over the same inputs, T_l the plan of layer l between
uniform marginals, ``M_l = T_l diag(1 / beta)``, the fused weight ``(M_l' A_l M_{l-1} + B_l) / 2``.
``sinkhorn`` and, for the exact plan, ``assignment`` solve all layers in one call each. They are
compared with Sinkhorn's iteration ``u = a / Kv, v = b / K'u`` in float64, and with scipy.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from small_network import accuracy, activations, clusters, train
from torch import Tensor

from dotresize import assignment, sinkhorn, transport_map


def plain_sinkhorn(cost: Tensor, reg: float, iterations: int = 1000) -> Tensor:
    kernel = (-cost.double() / reg).exp()
    v = torch.ones(kernel.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        u = 1 / len(kernel) / (kernel @ v)
        v = 1 / len(v) / (kernel.T @ u)
    return u[:, None] * kernel * v


def fused(a: list[Tensor], b: list[Tensor], plans: Tensor) -> list[Tensor]:
    """Return the mean of b and of a with its neurons moved onto b's; inputs and classes stay."""
    moves = [transport_map(plan).float() for plan in plans]
    moves = [torch.eye(a[0].shape[1]), *moves, torch.eye(len(a[-1]))]
    return [(moves[i + 1].T @ x @ moves[i] + b[i]) / 2 for i, x in enumerate(a)]


if __name__ == "__main__":
    a, b = train([256, 256], seed=10), train([256, 256], seed=11)
    x, _ = clusters(2048, seed=3)
    hidden = [torch.stack(activations(weights, x)[:-1]).mT for weights in (a, b)]
    cost = torch.cdist(*hidden)  # (2 layers, 256 neurons of A, 256 of B)
    reg = 0.02 * float(cost.mean())
    result = sinkhorn(cost, reg, tol=1e-6)
    columns = assignment(cost, maximize=False)
    plain = torch.stack([plain_sinkhorn(layer, reg) for layer in cost])
    by_scipy = torch.tensor([linear_sum_assignment(layer)[1].tolist() for layer in cost.numpy()])
    unit = torch.eye(256)
    plans = {"unmoved": unit.expand(2, -1, -1), "sinkhorn": result.plan, "plain loop": plain}
    plans |= {"assignment": unit[columns], "scipy": unit[by_scipy]}
    shares = {name: accuracy(fused(a, b, plan)) for name, plan in plans.items()}
    difference = float((result.plan - plain).abs().sum((1, 2)).max())
    print(f"the two networks are right for {accuracy(a):.2%} and {accuracy(b):.2%}, fused:")
    print("\n".join(f"{name:>10}  {share:.2%}" for name, share in shares.items()))
    print(f"sinkhorn: {result.n_iter.tolist()} iterations, {difference:.1e} of the mass elsewhere")
    assert difference < 1e-4
    # Neurons that never fire are alike, so the exact plan is not unique; its cost is.
    totals = [float((cost * unit[order]).double().sum()) for order in (columns, by_scipy)]
    assert abs(totals[0] - totals[1]) <= 1e-6 * totals[1]
    assert abs(shares["sinkhorn"] - shares["plain loop"]) < 1e-3
    assert shares["sinkhorn"] > shares["unmoved"] + 0.05
