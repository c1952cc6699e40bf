"""Random shapes, strides, types and scales against float64, on the CPU backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize import l1_cost, sinkhorn

quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40)),
    step=st.integers(1, 3),
    offset=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 1e2]),
    seed=st.integers(0, 2**16),
)
def test_l1_cost(shape, step, offset, dtype, scale, seed):
    batch, tokens, n, m = shape
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(batch, tokens * step, n + m + offset, generator=generator) * scale
    view = whole.to(dtype)[:, ::step]
    x, y = view[..., offset : offset + n], view[..., offset + n :]
    truth = torch.cdist(x.double().mT, y.double().mT, p=1) / tokens
    for backend in ("cpp", "torch"):
        error = (l1_cost(x, y, backend=backend) - truth).abs().max()
        assert error <= 1e-6 * truth.max()


@quick
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    ratio=st.floats(0.05, 10),
    zeros=st.floats(0, 0.5),
    forbidden=st.floats(0, 0.2),
    step=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sinkhorn(shape, dtype, scale, ratio, zeros, forbidden, step, transposed, seed):
    """The same iterations in float64; every promise of the result is checked from its plan."""
    n, m = shape
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    cost = rand(n, m) * scale
    cost[rand(n, m) < forbidden] = torch.inf
    marginals = []
    for size in (n, m):
        weight = rand(size) + 0.01
        weight[rand(size) < zeros] = 0
        weight[0] += 0.5
        marginals.append(weight / weight.sum())
    a, b = marginals
    options = {"tol": 0.0, "max_iter": 20}
    truth = sinkhorn(cost, ratio * scale, a, b, backend="torch", **options)
    for backend in ("cpp", "torch"):
        wide = torch.full((n, m * step), torch.nan, dtype=dtype)
        given = wide.mT.contiguous().mT if transposed else wide
        given[:, ::step] = cost
        given = given[:, ::step]
        result = sinkhorn(given, ratio * scale, a, b, backend=backend, **options)
        assert result.status == truth.status
        if result.status == "infeasible":
            assert (result.plan == 0).all()
            continue
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5
        assert (result.plan - truth.plan).abs().sum() < tolerance
        assert (result.plan.double().sum(1) - a).abs().sum() < tolerance
        column_error = float((result.plan.double().sum(0) - b).abs().sum())
        assert result.marginal_error == pytest.approx(column_error, abs=tolerance)
        assert (result.plan[a == 0] == 0).all()
        assert (result.plan[:, b == 0] == 0).all()
