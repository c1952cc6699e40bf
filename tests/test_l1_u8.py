"""precision="u8": the error it states, and what it must not lose."""

from __future__ import annotations

import pytest
import torch
from test_l1_cost import DTYPES, oracle

from dotresize import L1CostAccumulator, l1_cost
from dotresize.ops import l1_u8

HOSTS = ("cpp", "torch")


def activations(batch: int, tokens: int, neurons: int) -> torch.Tensor:
    """Neurons of different scale, tokens of different range, and one massive activation."""
    x = torch.randn(batch, tokens, neurons)
    x *= torch.rand(neurons) + 0.2
    x *= 1 + 3 * torch.rand(batch, tokens, 1)
    x[:, tokens // 3, neurons // 2] = 3e4
    return x


def median_error(value: torch.Tensor, truth) -> float:
    truth = torch.from_numpy(truth)
    used = truth > 0
    return float(((value.double() - truth).abs() / truth)[used].median())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_as_documented(host, dtype):
    x, y = activations(2, 1300, 37).to(dtype), activations(2, 1300, 53).to(dtype)
    targets = torch.randperm(37)[:20]
    for value, truth in (
        (l1_cost(x, y, precision="u8", backend=host), oracle(x, y)),
        (l1_cost(x, precision="u8", backend=host), oracle(x, x)),
        (l1_cost(x, targets=targets, precision="u8", backend=host), oracle(x, x[..., targets])),
    ):
        assert median_error(value, truth) < 2e-3
        assert (value - torch.from_numpy(truth)).abs().max() < 0.02 * truth.max()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 265, 13, 17), (2, 70, 601, 301)])
def test_kernel_equals_plain_bytes(shape):
    """Same plan, same bytes: C++ and PyTorch differ by rounding alone, on every shape."""
    batch, tokens, n, m = shape
    x, y = activations(batch, tokens, n), activations(batch, tokens, m)
    for arguments in ({"y": y}, {}, {"targets": torch.randperm(n)[: max(1, n // 2)]}):
        cpp, plain = (l1_cost(x, **arguments, precision="u8", backend=host) for host in HOSTS)
        # A value on the edge between two bytes may fall either way: a unit, about 0.1, of a token.
        torch.testing.assert_close(cpp, plain, rtol=1e-5, atol=0.3 / tokens)


def test_rounding_is_unbiased():
    """Differences far below a byte's unit survive: 256 tokens of noise cannot explain them away."""
    x = torch.zeros(4096, 3)
    x[:, 1], x[:, 2] = 0.1, 100.0  # one unit is 100 / 254
    cost = l1_cost(x, precision="u8")
    assert cost[0, 1] == pytest.approx(0.1, rel=0.01)
    assert cost[0, 2] == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("host", HOSTS)
def test_equal_neurons_and_constant_tokens(host):
    x = torch.randn(300, 4)
    x[:, 3] = x[:, 1]
    x[:100] = 2.5  # tokens of range 0
    cost = l1_cost(x, precision="u8", backend=host)
    assert cost[1, 3] == 0
    assert (cost.diagonal() == 0).all()
    assert torch.equal(cost[1], cost[3])


@pytest.mark.parametrize("host", HOSTS)
def test_ranges_without_a_step(host):
    cost = l1_cost(torch.randn(300, 4) * 1e-38, precision="u8", backend=host)
    assert torch.isfinite(cost).all()
    assert cost.max() < 1e-36


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_named(host, value):
    x = torch.randn(3, 600, 6)
    x[2, 11:400, 4] = value  # more tokens than are summed exactly
    with pytest.raises(ValueError, match="problem 2, neuron 4"):
        l1_cost(x, precision="u8", backend=host)


def test_long_inputs_go_in_chunks(monkeypatch):
    x = activations(1, 1500, 9)
    whole = l1_cost(x, precision="u8")
    monkeypatch.setattr(l1_u8, "CHUNK", 512)
    assert median_error(l1_cost(x, precision="u8"), oracle(x, x)) < 2e-3
    torch.testing.assert_close(l1_cost(x, precision="u8"), whole, rtol=0.01, atol=1e-6)


def test_accumulated_chunks():
    x = activations(1, 1500, 9)[0]
    accumulator = L1CostAccumulator(9, precision="u8")
    for part in x.split(400):
        accumulator.update(part)
    assert median_error(accumulator.result()[None], oracle(x[None], x[None])) < 2e-3


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(level, run_at_simd_level):
    code = """
import sys
sys.path.insert(0, "tests")
from test_l1_u8 import test_kernel_equals_plain_bytes as check
if backends()["cpp"]["available"]:
    for shape in ((1, 1, 1, 1), (2, 7, 5, 3), (1, 265, 13, 17), (1, 300, 601, 301)):
        check(shape)
"""
    run_at_simd_level(code, level)
