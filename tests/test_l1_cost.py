"""l1_cost and its accumulator, every backend against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import device_of
from scipy.spatial.distance import cdist

from dotresize import L1CostAccumulator, l1_cost
from dotresize.ops.backends import cpp

# 1, primes, the token block of 256 and its neighbours, register tiles of 4, 8, 16 and 32.
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (1, 255, 13, 17), (2, 257, 31, 33), (1, 20, 101, 67)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """scipy's city-block distance in float64, per problem, as a mean over tokens."""
    pairs = zip(x.double().cpu().numpy(), y.double().cpu().numpy(), strict=True)
    return np.stack([cdist(a.T, b.T, "cityblock") / len(a) for a, b in pairs])


def relative_error(value: torch.Tensor, truth: np.ndarray) -> float:
    scale = np.abs(truth).max() or 1.0
    return float(np.abs(value.double().cpu().numpy() - truth).max() / scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype):
    batch, tokens, n, m = shape
    x = torch.randn(batch, tokens, n).to(device_of(backend), dtype)
    y = torch.randn(batch, tokens, m).to(x)
    assert relative_error(l1_cost(x, y, backend=backend), oracle(x, y)) < 1e-6
    assert relative_error(l1_cost(x, backend=backend), oracle(x, x)) < 1e-6
    index = torch.stack([torch.randperm(n)[: max(1, n // 2)] for _ in range(batch)]).to(x.device)
    chosen = torch.stack([a[:, i] for a, i in zip(x, index, strict=True)])
    assert relative_error(l1_cost(x, targets=index, backend=backend), oracle(x, chosen)) < 1e-6
    total = l1_cost(x, y, reduction="sum", backend=backend)
    assert relative_error(total, oracle(x, y) * tokens) < 1e-6


def test_many_output_tiles_cpp():
    """Wider than one thread's tile both ways, with the symmetric half skipped and without."""
    x, y = torch.randn(2, 30, 601), torch.randn(2, 30, 1037)
    assert relative_error(l1_cost(x, y, backend="cpp"), oracle(x, y)) < 1e-6
    assert relative_error(l1_cost(y, backend="cpp"), oracle(y, y)) < 1e-6
    targets = torch.randperm(1037)[:530]
    cost = l1_cost(y, targets=targets, backend="cpp")
    assert relative_error(cost, oracle(y, y[..., targets])) < 1e-6


def test_single_problem_and_views(backend):
    x = torch.randn(40, 30, device=device_of(backend))
    truth = oracle(x[None, ::3, 2:19], x[None, ::3, 20:])[0]
    value = l1_cost(x[::3, 2:19], x[::3, 20:], backend=backend)  # strided tokens, offset neurons
    assert value.shape == (17, 10)
    assert relative_error(value, truth) < 1e-6
    transposed = x.T.contiguous().T
    assert torch.equal(l1_cost(transposed, backend=backend), l1_cost(x, backend=backend))
    shared = l1_cost(x, targets=torch.tensor([3, 3, 0], device=x.device), backend=backend)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert shared[3, 0] == 0
    assert shared[0, 2] == 0


def test_many_tokens_keep_precision():
    x = torch.rand(60_000, 9) + 1
    assert relative_error(l1_cost(x)[None], oracle(x[None], x[None])) < 1e-6


@pytest.mark.parametrize("operands", ["y", "targets", "self"])
def test_chunks_equal_one_call(backend, operands):
    """Bit for bit, whatever the chunks: tokens are regrouped into the blocks of a single call."""
    x = torch.randn(2, 600, 11, device=device_of(backend))
    y = torch.randn(2, 600, 7, device=x.device) if operands == "y" else None
    targets = torch.tensor([4, 1, 9], device=x.device) if operands == "targets" else None
    whole = l1_cost(x, y, targets=targets, backend=backend)
    accumulator = L1CostAccumulator(
        11,
        batch=2,
        m=7 if operands == "y" else None,
        targets=targets,
        device=x.device,
        backend=backend,
    )
    start = 0
    for length in (1, 300, 0, 2, 250, 47):
        part = slice(start, start + length)
        accumulator.update(x[:, part], None if y is None else y[:, part])
        start += length
    assert accumulator.tokens == 600
    assert torch.equal(accumulator.result(), whole)
    assert torch.equal(accumulator.result(), whole)  # asking does not change it


def test_result_is_independent_of_threads():
    x = torch.randn(3, 300, 150)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = l1_cost(x, backend="cpp")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, l1_cost(x, backend="cpp"))


def test_out_is_filled():
    x, out = torch.randn(2, 9, 4), torch.full((2, 4, 4), torch.nan)
    assert l1_cost(x, out=out) is out
    assert torch.equal(out, l1_cost(x))


def test_empty_neurons(backend):
    x = torch.randn(2, 5, 3, device=device_of(backend))
    assert l1_cost(x, x[:, :, :0], backend=backend).shape == (2, 3, 0)
    assert l1_cost(x[:0], backend=backend).shape == (0, 3, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_named(backend, value):
    x = torch.randn(3, 20, 6, device=device_of(backend))
    x[2, 11, 4] = value
    with pytest.raises(ValueError, match="problem 2, neuron 4"):
        l1_cost(x, backend=backend)
    accumulator = L1CostAccumulator(6, batch=3, device=x.device, backend=backend)
    with pytest.raises(ValueError, match="problem 2, neuron 4"):
        accumulator.update(x)
    assert accumulator.tokens == 0


def test_overflow_is_not_blamed_on_a_neuron():
    x = torch.tensor([[3e38, -3e38]])
    with pytest.raises(ValueError, match="overflows float32"):
        l1_cost(x)


def test_dead_and_equal_neurons(backend):
    x = torch.randn(70, 5, device=device_of(backend))
    x[:, 1] = 0
    x[:, 3] = x[:, 0]
    cost = l1_cost(x, backend=backend)
    assert cost[0, 3] == 0
    assert (cost.diagonal() == 0).all()
    assert torch.equal(cost[0], cost[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"x": torch.zeros(3)}, r"\(T, n\)"),
        ({"x": torch.zeros(0, 3)}, "no tokens"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(3, 3)}, "all but the last axis"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2, 3, dtype=torch.float16)}, "float16"),
        ({"x": torch.zeros(2, 3), "targets": torch.tensor([0, 3])}, "hold 3: must be from 0 to 2"),
        ({"x": torch.zeros(2, 3), "targets": torch.tensor([0.0])}, "must be int64"),
        ({"x": torch.zeros(2, 3), "reduction": "max"}, "must be one of mean, sum"),
        ({"x": torch.zeros(2, 3), "precision": "fp8"}, "precision 'fp8'"),
        ({"x": torch.zeros(2, 3), "backend": "cuda"}, "must be one of auto, triton, cpp, torch"),
        ({"x": torch.zeros(2, 3), "out": torch.zeros(3, 2)}, "must be contiguous"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        l1_cost(**arguments)


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(level, run_at_simd_level):
    """Each level this machine can run, forced in a process of its own."""
    code = """
import torch, sys
sys.path.insert(0, "tests")
from test_l1_cost import SHAPES, DTYPES, oracle, relative_error
from dotresize import backends, l1_cost
torch.manual_seed(0)
for batch, tokens, n, m in SHAPES:
    for dtype in DTYPES:
        x, y = torch.randn(batch, tokens, n).to(dtype), torch.randn(batch, tokens, m).to(dtype)
        x[..., 0] = torch.tensor([6e-8, 65504.0, -0.0]).repeat(tokens)[:tokens].to(dtype)
        assert relative_error(l1_cost(x, y, backend="cpp"), oracle(x, y)) < 2e-6
        assert relative_error(l1_cost(x, backend="cpp"), oracle(x, x)) < 2e-6
"""
    run_at_simd_level(code, level)


def test_token_block_is_the_same_everywhere():
    from dotresize.ops import reference

    assert cpp().TOKEN_BLOCK == reference.TOKEN_BLOCK
