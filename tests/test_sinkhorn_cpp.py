"""What only the C++ sweep has: threads and SIMD levels. Its exponential: native_check.cpp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from test_sinkhorn import l1

from dotresize import sinkhorn

INF = float("inf")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_many_rows_keep_the_column_sums():
    """Column sums over 1e5 rows, in two levels: a single float32 sum would never converge."""
    assert sinkhorn(torch.zeros(200_000, 4), 0.5, max_iter=5, backend="cpp").converged


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threaded_rows_agree(count, dtype):
    """Large enough for several threads on one problem; the same numbers, run after run."""
    cost = torch.rand(403, 257, dtype=dtype)
    with threads(count):
        first = sinkhorn(cost, 0.05, tol=0, max_iter=20, backend="cpp")
        second = sinkhorn(cost, 0.05, tol=0, max_iter=20, backend="cpp")
    assert torch.equal(first.plan, second.plan)
    truth = sinkhorn(cost.double(), 0.05, tol=0, max_iter=20, backend="torch")
    assert l1(first.plan, truth.plan) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_team_larger_than_the_rows(rows):
    cost = torch.rand(rows, 150_001)
    with threads(3):
        result = sinkhorn(cost, 0.5, tol=0, max_iter=5, backend="cpp")
    truth = sinkhorn(cost.double(), 0.5, tol=0, max_iter=5, backend="torch")
    assert l1(result.plan, truth.plan) < 1e-4  # a float32 sum over so many columns


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_team_redoes_its_rows_and_columns(count):
    """Start potentials far off, forbidden pairs and empty rows, with the rows over threads."""
    cost = torch.rand(300, 403)
    cost[:, 3] += 4.0
    cost[7, 5:300] = INF
    a, start = torch.rand(300), torch.zeros(403)
    a[[0, 150, 299]] = 0
    a /= a.sum()
    start[3], start[8] = -900.0, 300.0
    truth = sinkhorn(cost.double(), 0.2, a.double(), tol=1e-9, backend="torch")
    with threads(count):
        result = sinkhorn(cost, 0.2, a, init=(None, start), backend="cpp")
        bad = sinkhorn(cost.index_fill(0, torch.tensor([200]), INF), 0.2, backend="cpp")
        worse = sinkhorn(cost.index_fill(1, torch.tensor([9]), -INF), 0.2, backend="cpp")
    assert result.converged
    assert l1(result.plan, truth.plan) < 1e-4
    assert (bad.status, worse.status) == ("infeasible", "invalid")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("faintest", [1.0, 1e-13, 1e-14, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reg", [1.0, 0.02, 0.001])
def test_sweeps_without_exponentials(reg, dtype, faintest, count):
    """Near and far potentials, ends of what scaled rows resolve: iteration by iteration the log
    domain's own numbers."""
    random = torch.Generator().manual_seed(3)
    cost = torch.rand(131, 259, generator=random, dtype=torch.float64)
    cost[5, :200] = cost[40:90, 7] = INF
    a, b = (torch.rand(k, generator=random, dtype=torch.float64) for k in cost.shape)
    a[[0, 64, 130]], b[[1, 258]] = 0, 0
    b[30:60] *= faintest
    a[20] *= faintest
    for iterations in (1, 2, 3, 10, 150):
        settings = {"tol": 0, "max_iter": iterations}
        truth = sinkhorn(cost, reg, a / a.sum(), b / b.sum(), backend="torch", **settings)
        with threads(count):
            given = (cost.to(dtype), reg, a / a.sum(), b / b.sum())
            result = sinkhorn(*given, backend="cpp", **settings)
        resolved = torch.finfo(dtype).eps / reg
        assert l1(result.plan, truth.plan) < 20 * resolved, iterations
        gap = truth.potentials[1] - result.potentials[1]
        assert gap[b > 0].std() < 20 * resolved, iterations  # their constant is free


def test_a_subnormal_mass():
    cost, b = torch.rand(6, 9, dtype=torch.float64), torch.full((9,), 1 / 8, dtype=torch.float64)
    b[2] = 1e-318
    found = [
        sinkhorn(cost, 0.1, None, b, tol=0, max_iter=1, backend=name).potentials[1]
        for name in ("cpp", "torch")
    ]
    assert (found[0] - found[1]).std() < 1e-9


def test_tiny_masses_are_exact():
    """A row of mass 1e-35 keeps its shape, and columns of 1e-30 their sums."""
    cost = torch.rand(40, 1000)
    a, b = torch.rand(40, dtype=torch.float64), torch.rand(1000, dtype=torch.float64)
    a[3], b[::2] = 1e-35, 1e-30
    a, b = a / a.sum(), b / b.sum()
    settings = {"tol": 0, "max_iter": 100}
    truth = sinkhorn(cost.double(), 0.05, a, b, backend="torch", **settings).plan
    plan = sinkhorn(cost, 0.05, a, b, backend="cpp", **settings).potentials
    f, g = sinkhorn(cost.double(), 0.05, a, b, backend="torch", **settings).potentials
    assert (plan[0].double() - f).abs().max() < 1e-3
    assert (plan[1].double() - g).abs().max() < 1e-3
    solved = sinkhorn(cost, 0.05, a, b, backend="cpp", **settings).plan
    assert l1(solved, truth) < 1e-5


def test_small_batches_use_the_threads_and_agree():
    costs = torch.rand(3, 50, 40)
    with threads(1):
        one = sinkhorn(costs, 0.1, backend="cpp").plan
    with threads(8):
        assert torch.equal(sinkhorn(costs, 0.1, backend="cpp").plan, one)


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(level, run_at_simd_level):
    code = """
import torch
from dotresize import backends, sinkhorn
for n, m in [(1, 1), (37, 61), (130, 67)]:
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        cost = torch.rand(n, m, dtype=dtype)
        mine = sinkhorn(cost, 0.03, tol=tol, max_iter=5000, backend="cpp")
        truth = sinkhorn(cost.double(), 0.03, tol=1e-13, max_iter=20000, backend="torch")
        assert mine.converged, mine
        assert float((mine.plan - truth.plan).abs().sum()) < 10 * tol, (n, m, dtype)
        few = {"tol": 0, "max_iter": 7}
        mine = sinkhorn(cost, 0.03, backend="cpp", **few)
        truth = sinkhorn(cost.double(), 0.03, backend="torch", **few)
        assert float((mine.plan - truth.plan).abs().sum()) < tol, (n, m, dtype)
"""
    run_at_simd_level(code, level)
