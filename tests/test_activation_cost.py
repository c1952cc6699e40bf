"""Costs by every metric, in one call and in chunks, against scipy in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from scipy.spatial.distance import cdist

from dotresize import ActivationCostAccumulator, activation_cost, l1_cost
from dotresize.ops.product_cost import BLOCK, METRICS

SHAPES = [(1, 2, 1, 1), (2, 7, 5, 3), (1, 33, 130, 17), (3, 600, 31, 64)]


def oracle(metric, x, y) -> torch.Tensor:
    """Return float64 distances of columns, the mean over tokens where there is one."""
    found = []
    for own, other in zip(x.cpu().double(), y.cpu().double(), strict=True):
        cost = torch.from_numpy(cdist(own.T.numpy(), other.T.numpy(), metric))
        found.append(cost / len(own) if metric == "sqeuclidean" else cost)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_of_two_operands(backend, metric, shape, dtype):
    batch, tokens, n, m = shape
    device = device_of(backend)
    x = (torch.randn(batch, tokens, n, device=device) * 3 + 1).to(dtype)
    y = (torch.randn(batch, tokens, m, device=device) - 2).to(dtype)
    found = activation_cost(x, y, metric=metric, backend=backend)
    assert found.dtype == torch.float32
    assert found.shape == (batch, n, m)
    assert found.device.type == device.type
    truth = oracle(metric, x, y)
    assert (found.cpu() - truth).abs().max() < 3e-6 * max(1.0, float(truth.max()))
    assert found.min() >= 0
    single = activation_cost(x[0], y[0], metric=metric, backend=backend)
    torch.testing.assert_close(single, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_of_itself_and_of_targets(backend, metric):
    x = torch.randn(2, 50, 9, device=device_of(backend))
    truth = oracle(metric, x, x)
    found = activation_cost(x, metric=metric, backend=backend)
    assert (found.cpu() - truth).abs().max() < 3e-6
    targets = torch.tensor([[0, 8, 3], [1, 1, 2]], device=x.device)
    part = activation_cost(x, metric=metric, targets=targets, backend=backend)
    wanted = truth.gather(2, targets.cpu()[:, None, :].expand(-1, 9, -1))
    assert (part.cpu() - wanted).abs().max() < 3e-6


@pytest.mark.parametrize(
    ("metric", "tokens"),
    [(m, t) for m in METRICS for t in (1, 299, 2 * BLOCK + 5)] + [("l1", 1), ("l1", 299)],
)
def test_chunks_give_what_one_call_gives(backend, metric, tokens):
    device = device_of(backend)
    x = torch.randn(2, tokens, 6, device=device) + 5
    y = torch.randn(2, tokens, 4, device=device)
    targets = torch.tensor([5, 0], device=device)
    rule = {"metric": metric, "backend": backend}
    for other, choice in ((y, {"m": 4}), (None, {"targets": targets}), (None, {})):
        total = ActivationCostAccumulator(6, batch=2, device=device, **choice, **rule)
        for start in range(0, tokens, 290):
            stop = start + 290
            total.update(x[:, start:stop], *([] if other is None else [other[:, start:stop]]))
        assert total.tokens == tokens
        given = {"targets": targets} if "targets" in choice else {}
        wanted = activation_cost(x, other, **given, **rule)
        if metric == "l1":
            assert torch.equal(total.result(), wanted)
        else:
            torch.testing.assert_close(total.result(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_those_of_plain_differences(backend, metric):
    device = device_of(backend)
    x = torch.randn(2, 20, 5, device=device, dtype=torch.float64)
    y = torch.randn(2, 20, 3, device=device, dtype=torch.float64) + 1
    incoming = torch.randn(2, 5, 3, device=device, dtype=torch.float64)

    def plain(a, b):
        if metric == "sqeuclidean":
            return (a[..., :, None] - b[..., None, :]).square().mean(1)
        if metric == "correlation":
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - torch.nn.functional.normalize(a, dim=1).mT @ torch.nn.functional.normalize(
            b, dim=1
        )

    x.requires_grad_()
    y.requires_grad_()
    wanted = torch.autograd.grad(plain(x, y), (x, y), incoming)
    leaves = [value.detach().float().requires_grad_() for value in (x, y)]
    cost = activation_cost(*leaves, metric=metric, backend=backend)
    found = torch.autograd.grad(cost, leaves, incoming.float())
    for own, truth in zip(found, wanted, strict=True):
        assert (own - truth).abs().max() < 3e-6 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_through_targets_and_itself(metric):
    x = torch.randn(30, 5, dtype=torch.float32)
    targets = torch.tensor([4, 1])
    for choice in ({}, {"targets": targets}):
        leaf, copy = (x.clone().requires_grad_() for _ in range(2))
        other = copy if not choice else copy[:, targets]
        activation_cost(leaf, metric=metric, **choice).square().sum().backward()
        activation_cost(copy, other, metric=metric).square().sum().backward()
        torch.testing.assert_close(leaf.grad, copy.grad)


@pytest.mark.parametrize("scale", [1e-25, 1e25, 3e37])
@pytest.mark.parametrize("metric", ["correlation", "cosine"])
def test_no_scale_is_too_small_or_too_large(metric, scale):
    x, y = torch.randn(40, 6), torch.randn(40, 5)
    wanted = activation_cost(x, y, metric=metric)
    found = activation_cost(x * scale, y, metric=metric)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    leaf = (x * scale).requires_grad_()
    cost = activation_cost(leaf, y, metric=metric)
    torch.testing.assert_close(cost, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_what_never_changes_correlates_with_nothing(offset):
    x = torch.randn(500, 4)
    x[:, 1] = offset + 0.1
    for value in (x, x.clone().requires_grad_()):
        found = activation_cost(value, metric="correlation")
        assert torch.equal(found[1].detach(), torch.ones(4))
    found.sum().backward()
    assert value.grad.isfinite().all()
    total = ActivationCostAccumulator(4, metric="correlation")
    for chunk in x.split(170):
        total.update(chunk)
    assert torch.equal(total.result()[1], torch.ones(4))
    x[:, 1] = 0
    assert torch.equal(activation_cost(x, metric="cosine")[1], torch.ones(4))


def test_a_mean_far_from_zero_costs_no_digits():
    x = torch.randn(3000, 8) + torch.linspace(-300, 300, 8)
    truth = oracle("correlation", x[None], x[None])[0]
    assert (activation_cost(x, metric="correlation") - truth).abs().max() < 5e-6
    shared = torch.randn(3000, 8) + 1000 * torch.randn(3000, 1)
    truth = oracle("sqeuclidean", shared[None], shared[None])[0]
    assert (activation_cost(shared, metric="sqeuclidean") - truth).abs().max() < 1e-4
    near = x[:, :1] + 1e-2 * torch.randn(3000, 1)  # far from 0, and next to the first neuron
    truth = oracle("sqeuclidean", x[None], near[None])[0]
    found = activation_cost(x, near, metric="sqeuclidean")
    assert abs(float(found[0, 0] / truth[0, 0]) - 1) < 1e-2


@pytest.mark.parametrize("first", [1, 64])
@pytest.mark.parametrize("odd", [1e-25, 0.0, 1e4])
@pytest.mark.parametrize("metric", METRICS)
def test_the_first_chunk_is_no_more_than_any_other(metric, odd, first):
    x = torch.randn(6000, 4)
    x[:first] = odd + (odd != 1e-25) * x[:first]
    truth = oracle(metric, x[None], x[None])[0]
    total = ActivationCostAccumulator(4, metric=metric)
    total.update(x[:first])
    total.update(x[first:])
    assert (total.result() - truth).abs().max() < 5e-6 * max(1.0, float(x.square().mean()))


def test_many_tokens_with_a_gradient():
    x = torch.randn(120000, 1) + 0.3 * torch.randn(120000, 3)
    for metric in METRICS:
        truth = oracle(metric, x[None], x[None])[0]
        for value in (x, x.clone().requires_grad_()):
            assert (activation_cost(value, metric=metric) - truth).abs().max() < 2e-6


@pytest.mark.parametrize("metric", METRICS)
def test_near_neurons_still_have_gradients(metric):
    """Where rounding would make a cost negative, it is 0, and its gradient is what it was."""
    x = torch.randn(200, 4) * 10
    y = (x + 1e-3 * torch.randn(200, 4)).requires_grad_()
    activation_cost(x, y, metric=metric).diagonal().sum().backward()
    z = y.detach().double().requires_grad_()
    if metric == "sqeuclidean":
        wanted = (x - z).square().mean(0).sum()
    else:
        sides = [x.double(), z]
        if metric == "correlation":
            sides = [side - side.mean(0) for side in sides]
        wanted = (1 - torch.nn.functional.cosine_similarity(*sides, dim=0)).sum()
    wanted.backward()
    assert (y.grad - z.grad).abs().max() < 2e-6


def test_second_derivatives():
    x = torch.randn(12, 3, dtype=torch.float64)
    y = x + 0.1 * torch.randn(12, 3, dtype=torch.float64)

    def cost(value):
        return activation_cost(value.float(), y.float(), metric="sqeuclidean").diagonal().sum()

    found = torch.autograd.functional.hessian(cost, x.float()).reshape(36, 36)
    torch.testing.assert_close(found, torch.eye(36) * (2 / 12), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["l1", *METRICS])
def test_made_in_inference_mode(metric):
    x = torch.randn(40, 3)
    with torch.inference_mode():
        total = ActivationCostAccumulator(3, metric=metric)
    total.update(x)
    torch.testing.assert_close(total.result(), activation_cost(x, metric=metric))


def test_statistics_and_out():
    x = torch.randn(3, 40, 6)
    out = torch.empty(3, 6, 6)
    cost, found = activation_cost(x, metric="cosine", out=out, statistics=True)
    assert cost is out
    assert found.maximum.tolist() == cost.flatten(1).amax(1).tolist()
    torch.testing.assert_close(found.mean, cost.double().flatten(1).mean(1))
    _, single = activation_cost(x[0], metric="cosine", statistics=True)
    assert isinstance(single.mean, float)


def test_l1_is_l1_cost():
    x = torch.randn(2, 40, 6)
    assert torch.equal(activation_cost(x), l1_cost(x))
    wanted, truth = l1_cost(x, precision="u8", reduction="sum", statistics=True)
    rule = {"precision": "u8", "reduction": "sum", "statistics": True}
    found, statistics = activation_cost(x, metric="l1", **rule)
    assert torch.equal(found, wanted)
    assert torch.equal(statistics.mean, truth.mean)


def test_nothing_to_compare():
    for metric in METRICS:
        for shape in ((2, 5, 0), (0, 5, 3)):
            found = activation_cost(torch.zeros(shape), metric=metric)
            assert found.shape == (shape[0], shape[2], shape[2])
        x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5, 0)
        assert activation_cost(x, y, metric=metric).shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "l2"}, "metric 'l2': must be one of l1, correlation, cosine, sqeuclidean"),
        ({"metric": "cosine", "precision": "u8"}, "precision 'u8': is of metric 'l1'"),
        ({"metric": "correlation", "reduction": "sum"}, "reduction 'sum': 'correlation' depends"),
        ({"metric": "cosine", "targets": [9]}, "targets hold 9: must be from 0 to 2"),
        ({"metric": "cosine", "statistics": 1}, "statistics is 1: must be True or False"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        activation_cost(torch.randn(4, 3), **options)
    if "statistics" not in options:
        with pytest.raises(ValueError, match=message):
            ActivationCostAccumulator(3, **options)


def test_activations_that_are_not_finite():
    x = torch.randn(2, 4, 3)
    x[1, 2, 0] = torch.nan
    for metric in METRICS:
        with pytest.raises(ValueError, match="x of problem 1, neuron 0 are not finite"):
            activation_cost(x, metric=metric)
        with pytest.raises(ValueError, match="x of problem 1, neuron 0 are not finite"):
            activation_cost(x.clone().requires_grad_(), metric=metric)
    with pytest.raises(ValueError, match="overflows float32"):
        activation_cost(torch.full((3, 2), 1e30), torch.zeros(3, 2), metric="sqeuclidean")
