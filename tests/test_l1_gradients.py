"""The gradient of the L1 cost by its activations, against the oracle in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import device_of
from torch.autograd import forward_ad

from dotresize import L1CostAccumulator, l1_cost, sinkhorn
from dotresize.ops import reference

SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (1, 33, 130, 17), (3, 5, 31, 64)]


def oracle(x, y, incoming) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 by autograd through plain differences; abs has the subgradient 0 at 0."""
    x, y = (v.detach().cpu().double().requires_grad_() for v in (x, y))
    cost = (x[:, :, :, None] - y[:, :, None, :]).abs().mean(1)
    return torch.autograd.grad(cost, (x, y), incoming.cpu().double())


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error, relative to the largest entry, beyond the type's own rounding."""
    apart = (found.cpu().double() - truth).abs().max()
    return float(apart / truth.abs().max().clamp_min(1e-30)) - torch.finfo(found.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_two_operands(backend, shape, dtype):
    batch, tokens, n, m = shape
    device = device_of(backend)
    # Halves of small integers: many pairs are equal, and their subgradient is 0.
    x = (torch.randn(batch, tokens, n, device=device) * 3).round().to(dtype) / 2
    y = (torch.randn(batch, tokens, m, device=device) * 3).round().to(dtype) / 2
    incoming = torch.randn(batch, n, m, device=device)
    by_x, by_y = oracle(x, y, incoming)
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [v.detach().clone().requires_grad_(g) for v, g in zip((x, y), wanted, strict=True)]
        l1_cost(*leaves, backend=backend).backward(incoming)
        for leaf, asked, truth in zip(leaves, wanted, (by_x, by_y), strict=True):
            if not asked:
                assert leaf.grad is None
                continue
            assert leaf.grad.dtype == dtype
            assert leaf.grad.device.type == device.type
            assert off(leaf.grad, truth) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_of_one_operand_with_itself_and_with_targets(backend, shape):
    batch, tokens, n, m = shape
    device = device_of(backend)
    x = torch.randn(batch, tokens, n, device=device)
    incoming = torch.randn(batch, n, n, device=device)
    leaf = x.clone().requires_grad_()
    l1_cost(leaf, backend=backend).backward(incoming)
    assert off(leaf.grad, sum(oracle(x, x, incoming))) < 2e-6
    count = min(n, m)
    once = torch.stack([torch.randperm(n, device=device)[:count] for _ in range(batch)])
    for index in (once, torch.randint(n, (batch, m), device=device)):
        some = torch.randn(batch, n, index.shape[1], device=device)
        places = index[:, None, :].expand(-1, tokens, -1)
        by_x, by_y = oracle(x, x.gather(2, places), some)
        leaf = x.clone().requires_grad_()
        l1_cost(leaf, targets=index, backend=backend).backward(some)
        assert off(leaf.grad, by_x.scatter_add(2, places.cpu(), by_y)) < 2e-6


def test_the_oracle_passes_gradcheck():
    """In float64, away from ties; and it is what every backend is compared with above."""

    class Oracle(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return reference.l1_cost(x, y)

        @staticmethod
        def backward(ctx, incoming):
            return reference.l1_cost_backward(*ctx.saved_tensors, incoming)

    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Oracle.apply, (x, y))
    truth = oracle(x, y, torch.ones(2, 4, 3))
    found = reference.l1_cost_backward(x.detach(), y.detach(), torch.ones(2, 4, 3).double())
    for left, right in zip(found, truth, strict=True):
        torch.testing.assert_close(left / 5, right)


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(run_at_simd_level, level):
    run_at_simd_level(
        "import torch; from dotresize import l1_cost\n"
        "torch.manual_seed(0)\n"
        "for n, m in ((1, 1), (9, 33), (270, 530)):\n"
        "    x, y = (torch.randn(1, 13, k).requires_grad_() for k in (n, m))\n"
        "    g = torch.randn(1, n, m)\n"
        "    found = torch.autograd.grad(l1_cost(x, y, backend='cpp'), (x, y), g)\n"
        "    wide = [v.detach().double().requires_grad_() for v in (x, y)]\n"
        "    cost = (wide[0][..., None] - wide[1][:, :, None]).abs().mean(1)\n"
        "    truth = torch.autograd.grad(cost, wide, g.double())\n"
        "    for a, b in zip(found, truth): assert (a - b).abs().max() < 2e-6 * b.abs().max()\n",
        level,
    )


def test_layouts(backend):
    """Strided activations, an expanded gradient, a single problem, sums instead of means."""
    device = device_of(backend)
    wide = torch.randn(2, 40, 20, device=device)
    views = {"columns": wide[0, :, 1:18:2], "transposed": wide[0].mT, "tokens": wide[1, ::3]}
    for view in views.values():
        leaf = view.detach().requires_grad_()
        y = torch.randn(view.shape[0], 4, device=device)
        l1_cost(leaf, y, reduction="sum", backend=backend).sum().backward()
        truth, _ = oracle(view[None], y[None], torch.ones(1, view.shape[1], 4))
        assert off(leaf.grad, truth[0] * view.shape[0]) < 2e-6


def test_results_do_not_depend_on_the_number_of_threads():
    x, y = torch.randn(1, 70, 60).requires_grad_(), torch.randn(1, 70, 50).requires_grad_()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(l1_cost(x, y, backend="cpp").square().sum(), (x, y)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_costs_nothing_where_it_is_not_wanted():
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert l1_cost(x).grad_fn is None
    assert l1_cost(x.detach()).grad_fn is None
    cost, statistics = l1_cost(x, statistics=True)
    assert cost.requires_grad
    assert isinstance(statistics.mean, float)


def test_what_has_no_gradient_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out: carries no gradient"):
        l1_cost(x, out=torch.empty(3, 3))
    with pytest.raises(ValueError, match="detach them"):
        L1CostAccumulator(3).update(x)
    with torch.no_grad():
        L1CostAccumulator(3).update(x)
    (gradient,) = torch.autograd.grad(l1_cost(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_activations_changed_before_backward_are_refused():
    x = torch.randn(4, 3, requires_grad=True)
    loss = l1_cost(x).sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="has been m"):
        loss.backward()
    index = torch.tensor([0, 1])
    loss = l1_cost(x, targets=index).sum()
    index += 1
    with pytest.raises(RuntimeError, match="has been m"):
        loss.backward()


def test_a_cost_is_let_go_without_the_garbage_collector():
    x = torch.randn(4, 3, requires_grad=True)
    gc.disable()
    try:
        cost = l1_cost(x)
        seen = weakref.ref(cost)
        cost.sum().backward()
        del cost
        assert seen() is None
    finally:
        gc.enable()


def test_forward_mode_is_refused():
    x = torch.randn(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (lambda: l1_cost(dual), lambda: sinkhorn(dual, 1.0)):
            with pytest.raises(ValueError, match="forward-mode tangent"):
                call()
        assert l1_cost(x).shape == (3, 3)


def test_no_entries():
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(4, 0, requires_grad=True)
    l1_cost(x, y).sum().backward()
    assert not x.grad.any()
    assert y.grad.shape == (4, 0)


def test_a_neuron_and_itself_do_not_hide_the_others(backend):
    """Their gradient may be a billion times larger, as transport between neurons has it."""
    device = device_of(backend)
    x = torch.tensor([[0.0, 1.0]], device=device, requires_grad=True)
    incoming = torch.tensor([[1.0, 1e-9], [1e-9, 1.0]], device=device)
    for options in ({}, {"targets": torch.tensor([0, 1], device=device)}):
        cost = l1_cost(x, **options, reduction="sum", backend=backend)
        (found,) = torch.autograd.grad(cost, x, incoming)
        assert torch.allclose(found.cpu(), torch.tensor([[-2e-9, 2e-9]]), rtol=1e-6, atol=0)
