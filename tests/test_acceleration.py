"""Fewer iterations: momentum, Anderson, schedules, starts from other results."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of

from dotresize import BackendError, sinkhorn

INF = float("inf")
# Where what is tested is above the kernels, Triton's interpreter is spared.
ON_CPU = ("torch", "cpp")


def hard(backend: str, n: int = 21, m: int = 17) -> torch.Tensor:
    """Clustered points in the plane: many plain iterations. Few points, for the interpreter."""
    points = torch.rand(n + m, 2) ** 3
    return torch.cdist(points[:n], points[n:]).to(device_of(backend))


def test_momentum_needs_far_fewer_iterations(backend):
    cost = hard(backend).double()
    options = {"tol": 1e-5, "max_iter": 5000}
    plain = sinkhorn(cost.cpu(), 0.03, acceleration="none", backend="cpp", **options)
    quick = sinkhorn(cost, 0.03, backend=backend, **options)
    assert plain.converged
    assert quick.converged
    assert 0 < quick.n_iter < plain.n_iter / 3
    exact = sinkhorn(cost.cpu(), 0.03, tol=1e-11, max_iter=50_000, backend="cpp")
    # As near to the solution as the plain iterations that stop at the same error.
    apart = [float((r.plan.cpu() - exact.plan).abs().sum()) for r in (quick, plain)]
    assert apart[0] < 2 * apart[1] + 1e-6


def test_backends_take_the_same_path():
    counts = {}
    for backend in ("torch", "cpp", "triton"):
        torch.manual_seed(0)
        cost = torch.stack([hard(backend, 13, 19) for _ in range(3)]).double()
        reg = torch.tensor([0.05, 0.2, 1.0])
        counts[backend] = sinkhorn(cost, reg, tol=1e-6, backend=backend).n_iter.tolist()
    assert counts["torch"] == counts["cpp"] == counts["triton"]


def test_momentum_stays_out_of_the_way_of_easy_problems(backend):
    cost = torch.rand(40, 30, device=device_of(backend))
    easy = {"tol": 1e-6, "backend": backend}
    plain = sinkhorn(cost, 3.0, acceleration="none", **easy).n_iter
    assert sinkhorn(cost, 3.0, **easy).n_iter <= plain


def test_tol_zero_asks_for_plain_iterations(backend):
    """Per problem: the first of these is accelerated, the second is not."""
    cost = hard(backend).double()
    options = {"max_iter": 6, "backend": backend}
    tols = torch.tensor([1e-9, 0.0])
    mixed = sinkhorn(torch.stack([cost, cost]), 0.02, tol=tols, **options)
    plain = sinkhorn(cost, 0.02, tol=1e-9, acceleration="none", **options)
    quick = sinkhorn(cost, 0.02, tol=0, acceleration="momentum", **options)
    torch.testing.assert_close(mixed[1].plan, plain.plan, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mixed[0].plan, quick.plan, rtol=1e-9, atol=1e-12)
    assert (plain.plan - quick.plan).abs().sum() > 1e-4


def test_zero_marginals_and_forbidden_pairs_under_momentum(backend):
    device = device_of(backend)
    cost = hard(backend, 21, 17)
    cost[torch.rand(21, 17, device=device) < 0.2] = INF
    a, b = torch.rand(21, device=device) + 0.1, torch.rand(17, device=device) + 0.1
    a[3] = b[5] = 0
    a, b = a / a.sum(), b / b.sum()
    result = sinkhorn(cost, 0.05, a, b, tol=1e-5, max_iter=3000, backend=backend)
    truth = sinkhorn(
        *(v.double().cpu() if isinstance(v, torch.Tensor) else v for v in (cost, 0.05, a, b)),
        tol=1e-10,
        max_iter=30_000,
        backend="torch",
    )
    assert result.status == truth.status == "converged"
    assert (result.plan.cpu().double() - truth.plan).abs().sum() < 5e-4
    assert (result.plan[3] == 0).all()
    assert (result.plan[:, 5] == 0).all()


def test_anderson():
    cost = hard("torch").double()
    quick = sinkhorn(cost, 0.05, backend="torch", acceleration="anderson")
    plain = sinkhorn(cost, 0.05, backend="torch", acceleration="none")
    assert quick.converged
    assert quick.n_iter < plain.n_iter
    with pytest.raises(BackendError, match="'anderson' is built for torch, not for cpp"):
        sinkhorn(cost, 0.05, backend="cpp", acceleration="anderson")


@pytest.mark.parametrize("backend", ON_CPU)
def test_schedule(backend):
    cost = hard(backend)
    options = {"tol": 1e-5, "max_iter": 3000, "backend": backend}
    result = sinkhorn(cost, 0.01, schedule=(64, 8), **options)
    direct = sinkhorn(cost, 0.01, **options)
    assert result.converged
    assert result.n_iter > 2  # all stages are counted
    assert (result.plan - direct.plan).abs().sum() < 2e-3
    last = sinkhorn(cost, 0.01, init=sinkhorn(cost, 0.08, **options), **options)
    assert last.n_iter <= result.n_iter


@pytest.mark.parametrize("schedule", [(1, 2), (0.5,), (8, float("nan")), "fast", 3, (INF, 2)])
def test_bad_schedules_are_named(schedule):
    with pytest.raises(ValueError, match=r"schedule is .*: must be falling multiples of reg"):
        sinkhorn(torch.rand(3, 3), 0.1, schedule=schedule)


def test_unknown_acceleration_is_named():
    with pytest.raises(ValueError, match="acceleration 'fast': must be auto or one of none, mom"):
        sinkhorn(torch.rand(3, 3), 0.1, acceleration="fast")


@pytest.mark.parametrize("backend", ON_CPU)
def test_start_from_a_result(backend):
    """Of the same problem at another reg, of a slightly changed cost, one for a whole batch."""
    cost = hard(backend)
    options = {"tol": 1e-4, "max_iter": 3000, "backend": backend}
    first = sinkhorn(cost, 0.02, **options)
    assert sinkhorn(cost, 0.02, init=first, **options).n_iter == 0
    # Potentials times reg are what stays: halving reg doubles them.
    near = sinkhorn(cost, 0.019, init=first, **options)
    assert near.n_iter < sinkhorn(cost, 0.019, **options).n_iter
    changed = torch.stack([cost * (1 + 0.01 * torch.rand_like(cost)) for _ in range(3)])
    warm = sinkhorn(changed, 0.02, init=first, **options)
    assert (warm.n_iter < sinkhorn(changed, 0.02, **options).n_iter).all()
    again = sinkhorn(list(changed), 0.02, init=warm, **options)
    assert again.n_iter.tolist() == [0, 0, 0]


def test_start_from_results_that_do_not_fit():
    three = sinkhorn(torch.rand(3, 4, 5), 0.1)
    with pytest.raises(ValueError, match="init holds 3 problems: must be 2, or one for all"):
        sinkhorn(torch.rand(2, 4, 5), 0.1, init=three)
    with pytest.raises(ValueError, match="init: g, its second entry, must be a tensor of shape"):
        sinkhorn(torch.rand(3, 4, 6), 0.1, init=three)
    mixed = sinkhorn([torch.rand(2, 3), torch.rand(2, 2)], 0.1)
    with pytest.raises(ValueError, match="init holds problems of different shapes"):
        sinkhorn(torch.rand(2, 4, 5), 0.1, init=mixed)


def test_potentials_that_grow_without_end(backend):
    """Three rows may go to two columns of six only: momentum must not run off to no plan."""
    cost = torch.rand(6, 6, device=device_of(backend))
    cost[:3, 2:] = INF
    result = sinkhorn(cost, 0.1, max_iter=150, backend=backend)
    assert result.status == "max_iter"
    assert result.marginal_error == pytest.approx(1 / 3, abs=1e-3)
    rows = (result.plan.double().sum(1) - 1 / 6).abs().sum()
    assert rows < 1e-3
