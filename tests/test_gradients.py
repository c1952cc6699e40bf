"""Gradients of plan and values with respect to the cost, against finite differences."""

from __future__ import annotations

import pytest
import torch
from conftest import ON_GPU, device_of

from dotresize import sinkhorn

QUANTITIES = ("plan", "value", "value_linear")


def exact(cost: torch.Tensor, a=None, b=None, backend="auto"):
    reg = 1.0 if backend == "triton" and not ON_GPU else 0.1  # few iterations for the interpreter
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


def of_same_mass(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a / a.sum(), b / b.sum()


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("wanted", ["a", "b", "both", "all"])
def test_gradcheck_of_marginals(backend, quantity, wanted):
    if backend == "triton" and not ON_GPU and wanted != "all":
        pytest.skip("Triton's interpreter takes minutes: it checks all three at once")
    device = device_of(backend)
    cost = torch.rand(5, 4, dtype=torch.float64, device=device, requires_grad=wanted == "all")
    a = torch.rand(5, dtype=torch.float64, device=device, requires_grad=wanted != "b")
    b = torch.rand(4, dtype=torch.float64, device=device, requires_grad=wanted != "a")

    def of(c, a, b):
        return getattr(exact(c, *of_same_mass(a + 0.1, b + 0.1), backend), quantity)

    assert torch.autograd.gradcheck(of, (cost, a, b), fast_mode=True)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradcheck_of_marginals_of_batches_and_lists(quantity):
    cost = torch.rand(3, 4, 6, dtype=torch.float64)
    shared = torch.rand(4, dtype=torch.float64, requires_grad=True)
    own = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)

    def of(a, b):
        a, b = a + 0.1, b + 0.1
        return getattr(exact(cost, a / a.sum(), b / b.sum(1, keepdim=True)), quantity)

    assert torch.autograd.gradcheck(of, (shared, own))

    def of_list(a, b):
        pair = [of_same_mass(v[:n] + 0.1, v[2 : 2 + m] + 0.1) for v, n, m in ((a, 3, 2), (b, 2, 4))]
        rows, columns = (list(side) for side in zip(*pair, strict=True))
        costs = [cost[0, : len(r), : len(c)] for r, c in pair]
        return getattr(exact(costs, rows, columns), quantity)

    vectors = [torch.rand(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(of_list, vectors)


def test_marginal_gradients_do_not_see_the_mass_of_b():
    """b is scaled to a's mass, so that the gradient by b is that at which its mass is nothing."""
    cost = torch.rand(5, 4, dtype=torch.float64)
    a, b = (v.requires_grad_() for v in marginals(5, 4))
    plan = exact(cost, a, b).plan
    by_a, by_b = torch.autograd.grad((plan * torch.rand(5, 4)).sum(), (a, b))
    assert abs(float(by_b @ b)) < 1e-12
    assert abs(float(by_a[1])) < 1e-12  # no mass, no gradient
    assert by_a.abs().sum() > 0


def test_parts_that_exchange_nothing_have_marginal_gradients():
    cost = torch.full((4, 4), torch.inf, dtype=torch.float64)
    cost[:2, :2], cost[2:, 2:] = torch.rand(2, 2), torch.rand(2, 2)
    weight = torch.rand(4, 4, dtype=torch.float64)

    def loss(v: torch.Tensor) -> torch.Tensor:
        # Every part keeps the same mass on both sides.
        sides = [torch.stack([0.5 * t, 0.5 - 0.5 * t]) for t in v]
        a, b = torch.cat(sides[:2]), torch.cat(sides[2:])
        return (exact(cost, a, b).plan * weight).sum()

    shares = (torch.rand(4, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(loss, (shares,))


def test_the_names_of_pot_have_the_same_gradients():
    from dotresize import ot

    cost = torch.rand(6, 5, dtype=torch.float64)
    weight = torch.rand(6, 5, dtype=torch.float64)
    found = []
    for solve in (
        lambda c, a, b: exact(c, a, b).plan,
        lambda c, a, b: ot.sinkhorn(a, b, c, 0.1, stopThr=1e-14, numItermax=5000),
        lambda c, a, b: ot.solve_batch(
            c[None], 0.1, a[None], b[None], tol=1e-14, max_iter=5000, grad="autodiff"
        ).plan[0],
    ):
        leaves = [cost.clone().requires_grad_()]
        leaves += [torch.full((n,), 1 / n, dtype=torch.float64).requires_grad_() for n in (6, 5)]
        found.append(torch.autograd.grad((solve(*leaves) * weight).sum(), leaves))
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)
