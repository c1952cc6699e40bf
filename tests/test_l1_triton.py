"""What only the Triton kernel of the L1 cost has: tiles, packed float16, statistics."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from test_l1_cost import oracle, relative_error

from dotresize import BackendError, CostStatistics, L1CostAccumulator, l1_cost
from dotresize.kernels import l1_cost as kernel
from dotresize.ops import halves

DEVICE = device_of("triton")


def median_error(value, truth) -> float:
    truth = torch.as_tensor(truth)
    return float(((value.double().cpu() - truth).abs() / truth)[truth > 0].median())


@pytest.mark.parametrize("config", [kernel.CONFIGS["float32"], kernel.SMALL["float32"]], ids=str)
def test_every_tile(monkeypatch, config):
    """Widths that are no multiple of the tile: the last tiles are moved back inside."""
    monkeypatch.setattr(kernel, "choose_config", lambda *_, **__: config)
    x = torch.randn(1, 5, 203, device=DEVICE)
    y = torch.randn(1, 5, 150, device=DEVICE)
    index = torch.randperm(203, device=DEVICE)[:131]
    assert relative_error(l1_cost(x, y, backend="triton"), oracle(x, y)) < 1e-6
    assert relative_error(l1_cost(x, backend="triton"), oracle(x, x)) < 1e-6
    cost = l1_cost(x, targets=index, backend="triton")
    assert relative_error(cost, oracle(x, x[..., index])) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_halves(backend, dtype):
    """Massive activations, tokens of zeros, and a number of tokens that is no multiple of 16."""
    x = torch.randn(2, 133, 19).to(device_of(backend), dtype)
    x[:, 5] *= 2000
    x[1, 100:120] = 0
    x[0, 40:60] *= 1e-6
    options = {"precision": "fp16", "backend": backend}
    cost, statistics = l1_cost(x, statistics=True, **options)
    # One token carries nearly all of the cost here: nothing averages its rounding out.
    assert relative_error(cost, oracle(x, x)) < 3e-3
    assert (cost.diagonal(dim1=1, dim2=2) == 0).all()
    assert torch.equal(cost, cost.mT)
    assert torch.allclose(statistics.mean.cpu(), cost.mean((1, 2)).double().cpu(), rtol=1e-5)
    index = torch.tensor([7, 0, 7], device=x.device)
    assert torch.allclose(l1_cost(x, targets=index, **options), cost[:, :, index], rtol=1e-5)
    y = torch.randn(2, 133, 11).to(x)
    assert relative_error(l1_cost(x, y, **options), oracle(x, y)) < 3e-3


def test_packed_error_is_what_the_docstring_says():
    x = torch.randn(1, 1024, 40, device=DEVICE)
    assert median_error(l1_cost(x, precision="fp16", backend="triton"), oracle(x, x)) < 1e-4


def test_packed_chunks(monkeypatch):
    x = torch.randn(1, 700, 9, device=DEVICE)
    whole = l1_cost(x, precision="fp16", backend="triton")
    monkeypatch.setattr(halves, "CHUNK_BYTES", 1)
    assert torch.allclose(l1_cost(x, precision="fp16", backend="triton"), whole, rtol=1e-6)
    accumulator = L1CostAccumulator(9, batch=1, precision="fp16", device=DEVICE, backend="triton")
    for part in x.split(300, dim=1):
        accumulator.update(part)
    assert torch.allclose(accumulator.result(), whole, rtol=1e-3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_packed_names_what_is_not_finite(backend, value):
    x = torch.randn(3, 40, 6, device=device_of(backend))
    x[2, 11, 4] = value
    with pytest.raises(ValueError, match="problem 2, neuron 4"):
        l1_cost(x, precision="fp16", backend=backend)


def test_precisions_name_their_backends():
    x = torch.rand(5, 3)
    with pytest.raises(
        BackendError, match="'fp16' is built for triton and torch, not for cpp: use"
    ):
        l1_cost(x, precision="fp16", backend="cpp")
    with pytest.raises(BackendError, match="'u8' is built for cpp and torch, not for triton: use"):
        l1_cost(x.to(DEVICE), precision="u8", backend="triton")


def test_statistics(backend):
    x = torch.randn(3, 20, 70, device=device_of(backend))
    y = torch.randn(3, 20, 33, device=x.device)
    for operands in ({"y": y}, {}):
        cost, found = l1_cost(x, **operands, statistics=True, backend=backend)
        assert isinstance(found, CostStatistics)
        flat = cost.flatten(1).double()
        assert torch.equal(found.minimum, flat.amin(1))
        assert torch.equal(found.maximum, flat.amax(1))
        assert torch.allclose(found.mean, flat.mean(1), rtol=1e-6)
    single, numbers = l1_cost(x[0], statistics=True, reduction="sum", backend=backend)
    assert numbers.mean == pytest.approx(float(single.mean()), rel=1e-6)
    assert isinstance(numbers.maximum, float)
