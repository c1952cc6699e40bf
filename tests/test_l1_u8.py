"""precision="u8": the error it states, and what it must not lose."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, ON_GPU, device_of
from test_l1_cost import DTYPES, oracle

from dotresize import L1CostAccumulator, l1_cost
from dotresize.kernels import l1_quantize
from dotresize.ops import l1_u8


def u8(*operands, backend: str, **options):
    """The cost of bytes on a backend's device, back on the CPU."""
    moved = [value.to(device_of(backend)) for value in operands]
    options = {k: v.to(device_of(backend)) if k == "targets" else v for k, v in options.items()}
    return l1_cost(*moved, **options, precision="u8", backend=backend).cpu()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_as_documented(backend, dtype):
    # The interpreter takes half a minute for as many tokens as the others have.
    batch, tokens = (1, 270) if backend == "triton" and not ON_GPU else (2, 1300)
    x, y = activations(batch, tokens, 37).to(dtype), activations(batch, tokens, 53).to(dtype)
    targets = torch.randperm(37)[:20]
    for value, truth in (
        (u8(x, y, backend=backend), oracle(x, y)),
        (u8(x, backend=backend), oracle(x, x)),
        (u8(x, targets=targets, backend=backend), oracle(x, x[..., targets])),
    ):
        assert median_error(value, truth) < 2e-3
        assert (value - torch.from_numpy(truth)).abs().max() < 0.02 * truth.max()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 265, 13, 17), (2, 70, 601, 301)])
def test_kernel_equals_plain_bytes(shape):
    equals_plain_bytes(shape, "cpp")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 280, 33, 7), (1, 70, 67, 131)])
def test_triton_equals_plain_bytes(shape):
    equals_plain_bytes(shape, "triton")


def equals_plain_bytes(shape: tuple[int, ...], *names: str) -> None:
    """Same plan, same bytes: backends differ by rounding alone, on every shape."""
    batch, tokens, n, m = shape
    x, y = activations(batch, tokens, n), activations(batch, tokens, m)
    targets = torch.randperm(n)[: max(1, n // 2)]
    for operands, options in (((x, y), {}), ((x,), {}), ((x,), {"targets": targets})):
        plain = u8(*operands, **options, backend="torch")
        for name in names:
            found = u8(*operands, **options, backend=name)
            # A value on the edge between two bytes may fall either way: a unit, about 0.1.
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=0.3 / tokens)


def test_what_a_kernel_reads_in_another_order(backend):
    """Strided neurons and tokens, and statistics of bytes and exact tokens together."""
    wide = activations(2, 90, 40)
    for view in (wide[:, :, 1:39:2], wide[:, ::3], wide[:, :70].mT):
        torch.testing.assert_close(
            u8(view, backend=backend),
            u8(view.contiguous(), backend=backend),
            rtol=1e-5,
            atol=0.3 / view.shape[1],
        )
    cost, found = l1_cost(
        wide.to(device_of(backend)), precision="u8", statistics=True, backend=backend
    )
    assert torch.equal(found.maximum, cost.double().flatten(1).amax(1))
    torch.testing.assert_close(found.mean, cost.double().mean((1, 2)), rtol=1e-6, atol=0)


def test_sums_of_bytes_are_exact():
    """Integers as far apart as bytes go, in every byte of a word, and 256 tokens of them."""
    x = torch.zeros(512, 3)
    x[:, 1], x[::2, 2] = 254.0, 254.0
    found = {name: u8(x, backend=name, reduction="sum") for name in BACKENDS}
    for cost in found.values():
        assert cost[0].tolist() == [0.0, 512 * 254.0, 256 * 254.0]


def test_rounding_is_unbiased():
    """Differences far below a byte's unit survive: 256 tokens of noise cannot explain them away."""
    x = torch.zeros(4096, 3)
    x[:, 1], x[:, 2] = 0.1, 100.0  # one unit is 100 / 254
    cost = l1_cost(x, precision="u8")
    assert cost[0, 1] == pytest.approx(0.1, rel=0.01)
    assert cost[0, 2] == pytest.approx(100.0, rel=1e-3)


def test_equal_neurons_and_constant_tokens(backend):
    x = torch.randn(300, 4)
    x[:, 3] = x[:, 1]
    x[:100] = 2.5  # tokens of range 0
    cost = u8(x, backend=backend)
    assert cost[1, 3] == 0
    assert (cost.diagonal() == 0).all()
    assert torch.equal(cost[1], cost[3])


def test_ranges_without_a_step(backend):
    cost = u8(torch.randn(300, 4) * 1e-38, backend=backend)
    assert torch.isfinite(cost).all()
    assert cost.max() < 1e-36


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_named(backend, value):
    x = torch.randn(3, 90, 6)
    x[2, 11:60, 4] = value  # more tokens than are summed exactly
    with pytest.raises(ValueError, match="problem 2, neuron 4"):
        u8(x, backend=backend)


def test_long_inputs_go_in_chunks(monkeypatch, backend):
    x = activations(1, 700, 9)
    whole = u8(x, backend=backend)
    monkeypatch.setattr(l1_u8, "CHUNK", 256)
    monkeypatch.setattr(l1_u8, "LEAST_CHUNK", 256)
    found = u8(x, backend=backend)
    assert median_error(found, oracle(x, x)) < 2e-3
    torch.testing.assert_close(found, whole, rtol=0.01, atol=1e-6)


def test_accumulated_chunks(backend):
    x = activations(1, 600, 9)[0]
    device = device_of(backend)
    accumulator = L1CostAccumulator(9, precision="u8", device=device, backend=backend)
    for part in x.split(270):
        accumulator.update(part.to(device))
    assert median_error(accumulator.result()[None].cpu(), oracle(x[None], x[None])) < 2e-3


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(level, run_at_simd_level):
    code = """
import sys
sys.path.insert(0, "tests")
from test_l1_u8 import equals_plain_bytes
for shape in ((1, 1, 1, 1), (2, 7, 5, 3), (1, 265, 13, 17), (1, 300, 601, 301)):
    equals_plain_bytes(shape, "cpp")
"""
    run_at_simd_level(code, level)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 37), (1, 3, 64)])
def test_ranges_of_tokens(monkeypatch, shape):
    """In one read, in parts of a token; NaN where an activation is not finite."""
    monkeypatch.setattr(l1_quantize, "_NEURONS_OF_A_RANGE", 16)
    x = torch.randn(shape, device=device_of("triton"))
    for view in (x, x.bfloat16(), x[:, ::2]):
        assert torch.equal(torch.stack(l1_quantize.ranges(view)), torch.stack(l1_u8.ranges(view)))
    for value in (torch.nan, torch.inf, -torch.inf):
        x[0, -1, -1] = value
        low, high = l1_quantize.ranges(x)
        bad = torch.zeros_like(low, dtype=torch.bool)
        bad[0, -1] = True
        assert torch.equal(low.isnan(), bad)
        assert torch.equal(high.isnan(), bad)
