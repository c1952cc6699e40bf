"""What only the Triton kernel of the L1 cost has: tiles, packed float16, statistics."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from test_l1_cost import oracle, relative_error

from dotresize import BackendError, CostStatistics, L1CostAccumulator, l1_cost
from dotresize.kernels import l1_cost as kernel
from dotresize.ops import constants

DEVICE = device_of("triton")


def median_error(value, truth) -> float:
    truth = torch.as_tensor(truth)
    return float(((value.double().cpu() - truth).abs() / truth)[truth > 0].median())


@pytest.mark.parametrize("configs", [kernel.CONFIGS, kernel.SMALL], ids=["usual", "small"])
def test_every_tile(monkeypatch, configs):
    """Widths that are no multiple of the tile: the last tiles are moved back inside."""
    monkeypatch.setattr(kernel, "choose_config", lambda out, kind, device: configs[kind])
    x = torch.randn(1, 5, 203, device=DEVICE)
    y = torch.randn(1, 5, 150, device=DEVICE)
    index = torch.randperm(203, device=DEVICE)[:131]
    assert relative_error(l1_cost(x, y, backend="triton"), oracle(x, y)) < 1e-6
    assert relative_error(l1_cost(x, backend="triton"), oracle(x, x)) < 1e-6
    cost = l1_cost(x, targets=index, backend="triton")
    assert relative_error(cost, oracle(x, x[..., index])) < 1e-6
    for precision in ("fp16", "u8"):
        for options in ({"y": y}, {}, {"targets": index}):
            options |= {"precision": precision, "reduction": "sum"}
            found = l1_cost(x, **options, backend="triton")
            plain = l1_cost(x, **options, backend="torch")
            # A value on the edge between two bytes may fall either way.
            torch.testing.assert_close(found, plain, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 7, 300, 513])
def test_operands_that_are_copied_in_parts(monkeypatch, tokens):
    """Odd widths, odd strides, half precision and targets are read from aligned copies."""
    monkeypatch.setattr(constants, "CHUNK_BYTES", 1)  # one block of 256 tokens at a time
    count, n = (2, 71) if tokens < constants.TOKEN_BLOCK else (1, 37)  # for the interpreter
    wide = torch.randn(count, tokens, 90, device=DEVICE)
    x, y = wide[:, :, 1 : n + 1], torch.randn(count, tokens, 33, device=DEVICE).bfloat16().float()
    index = torch.randint(n, (count, 20), device=DEVICE)
    assert relative_error(l1_cost(x, y, backend="triton"), oracle(x, y)) < 1e-6
    for values in (x, x.bfloat16()):
        cost = l1_cost(values, targets=index, backend="triton")
        columns = values.gather(2, index[:, None].expand(-1, tokens, -1))
        assert relative_error(cost, oracle(values, columns)) < 1e-6
        assert relative_error(l1_cost(values, backend="triton"), oracle(values, values)) < 1e-6


def test_one_neuron_costs_nothing():
    cost, found = l1_cost(
        torch.randn(3, 9, 1, device=DEVICE), statistics=True, backend="triton", reduction="sum"
    )
    assert torch.equal(cost, torch.zeros(3, 1, 1, device=DEVICE))
    assert found.maximum.tolist() == found.mean.tolist() == [0.0, 0.0, 0.0]


def test_narrow_problems_take_the_small_tile():
    """Not the large one padded, however many of them there are."""
    for shape in ((960, 64, 64), (960, 40, 500), (960, 500, 70)):
        out = torch.empty(shape, device="meta")
        chosen = kernel.choose_config(out, "float32", torch.device("cpu"))
        assert chosen is kernel.SMALL["float32"], shape
    out = torch.empty((960, 64, 128), device="meta")
    chosen = kernel.choose_config(out, "float32", torch.device("cpu"))
    assert chosen is kernel.CONFIGS["float32"]


def test_what_is_aligned_is_not_copied():
    x = torch.randn(2, 5, 128, device=DEVICE)
    assert kernel._operand(x, None, 128, torch.float32) is x
    assert kernel._operand(x[:, 1:], None, 64, torch.float32).data_ptr() == x[:, 1:].data_ptr()
    for other in (x[:, :, 1:], x.mT, x.half(), x[:, :, :100]):
        copy = kernel._operand(other, None, 64, torch.float32)
        assert copy.stride(2) == 1
        assert copy.shape[2] % kernel.ALIGNED == 0
        assert torch.equal(copy[:, :, : other.shape[2]], other.float())


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
    monkeypatch.setattr(constants, "CHUNK_BYTES", 1)
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
