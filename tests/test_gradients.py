"""Gradients of plan and values with respect to the cost, against finite differences."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of

from dotresize import sinkhorn

QUANTITIES = ("plan", "value", "value_linear")


def exact(cost: torch.Tensor, a=None, b=None, backend="auto", reg=0.1):
    return sinkhorn(cost, reg, a, b, tol=1e-14, max_iter=5000, backend=backend)


def marginals(n: int, m: int) -> list[torch.Tensor]:
    weights = [torch.rand(k, dtype=torch.float64) + 0.1 for k in (n, m)]
    weights[0][1] = 0
    return [w / w.sum() for w in weights]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradcheck(backend, quantity):
    device = device_of(backend)
    cost = torch.rand(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    a, b = (v.to(device) for v in marginals(5, 4))
    assert torch.autograd.gradcheck(
        lambda c: getattr(exact(c, a, b, backend), quantity), (cost,), fast_mode=True
    )


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradcheck_of_batches_and_lists(quantity):
    batch = torch.rand(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: getattr(exact(c), quantity), (batch,))
    lists = [torch.rand(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    assert torch.autograd.gradcheck(lambda *c: getattr(exact(c), quantity), lists)


def test_forbidden_pairs_and_parts_that_exchange_nothing():
    """The matrix behind the gradient is singular once more for every separate part."""
    cost = torch.full((4, 4), torch.inf, dtype=torch.float64)
    cost[:2, :2], cost[2:, 2:] = torch.rand(2, 2), torch.rand(2, 2)
    free = cost.isfinite()

    def value_linear(entries: torch.Tensor) -> torch.Tensor:
        return exact(cost.masked_scatter(free, entries)).value_linear

    entries = cost[free].clone().requires_grad_()
    assert torch.autograd.gradcheck(value_linear, (entries,))


def test_float32_gradient_is_that_of_float64():
    cost = torch.rand(40, 30)
    incoming = torch.randn(40, 30)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = cost.to(dtype, copy=True).requires_grad_()
        result = sinkhorn(leaf, 0.05, tol=1e-6, max_iter=5000)
        (result.plan * incoming.to(dtype)).sum().backward()
        assert leaf.grad.dtype == dtype
        found.append(leaf.grad.double())
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_costs_nothing_where_it_is_not_used():
    """No graph without a cost that asks for one, nor under no_grad; numbers stay numbers."""
    cost = torch.rand(4, 3)
    assert sinkhorn(cost, 0.3).plan.grad_fn is None
    assert isinstance(sinkhorn(cost, 0.3).value, float)
    with torch.no_grad():
        assert sinkhorn(cost.requires_grad_(), 0.3).plan.grad_fn is None
    result = sinkhorn(cost, 0.3)
    assert not result.potentials[0].requires_grad
    assert result.value.requires_grad


def test_a_look_without_gradients_leaves_them():
    cost = torch.rand(4, 3, requires_grad=True)
    result = sinkhorn(cost, 0.3)
    with torch.no_grad():
        assert not result.plan.requires_grad
    assert result.plan.requires_grad


def test_a_cost_changed_before_backward_is_refused():
    for quantity in ("plan", "value"):
        cost = torch.rand(4, 3, requires_grad=True)
        loss = getattr(sinkhorn(cost, 0.3), quantity).sum()
        with torch.no_grad():
            cost.mul_(2)
        with pytest.raises(RuntimeError, match="has been m"):
            loss.backward()


def test_an_invalid_problem_leaves_the_gradients_of_the_others():
    cost = torch.rand(3, 4, 3)
    cost[1, 0, 0], cost[2, 1] = torch.nan, torch.inf
    for quantity in ("plan", "value", "value_linear"):
        leaf = cost.clone().requires_grad_()
        result = sinkhorn(leaf, 0.1)
        assert result.status == ("converged", "invalid", "infeasible")
        getattr(result, quantity)[0].square().sum().backward()
        assert leaf.grad[0].abs().sum() > 0
        assert (leaf.grad[2] == 0).all()
