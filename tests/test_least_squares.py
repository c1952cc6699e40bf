"""Ridge regression from sums over chunks of tokens."""

from __future__ import annotations

import pytest
import torch

from dotresize.least_squares import NormalEquations


def solved(u: torch.Tensor, v: torch.Tensor, prior: torch.Tensor, ridge: float) -> torch.Tensor:
    equations = NormalEquations(prior)
    for part in zip(u.split(7), v.split(7), strict=True):
        equations.add(*part)
    return equations.solve(ridge)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(60, 11), torch.randn(60, 5), torch.randn(11, 5, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_solution_is_that_of_the_stacked_problem(problem, ridge):
    u, v, prior = problem
    weight = (ridge * u.double().square().sum() / 11).sqrt()
    stacked = torch.cat([u, weight * torch.eye(11, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([v, weight * prior])).solution
    assert torch.allclose(solved(u, v, prior, ridge), wanted, atol=1e-5)


def test_sums_are_contiguous(problem):
    """A prior is often a transposed weight; sums over processes take no strides."""
    equations = NormalEquations(problem[2].mT.contiguous().mT)
    assert equations.cross.is_contiguous()
    assert equations.gram.is_contiguous()


def test_an_input_that_is_always_zero_keeps_its_prior(problem):
    u, v, prior = problem
    u[:, 4] = 0.0
    solution = solved(u, v, prior, 0.01)
    assert torch.allclose(solution[4], prior[4])
    assert torch.isfinite(solution).all()


def test_no_signal_at_all_keeps_the_prior(problem):
    u, v, prior = problem
    assert torch.allclose(solved(0 * u, v, prior, 0.1), prior)


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_what_is_lost(problem, ridge, solved):
    """What is lost is right for all inputs, and for some of them."""
    u, v, prior = problem
    for kept in (torch.arange(11), torch.tensor([0, 3, 4, 9])):
        equations = NormalEquations(prior)
        equations.add(u, v)
        equations.restrict(kept, prior[kept])
        a = equations.solve(ridge) if solved else prior[kept]
        wanted = (u[:, kept].double() @ a - v.double()).square().sum() / v.double().square().sum()
        assert equations.lost(a) == pytest.approx(float(wanted), rel=1e-4)


def test_nothing_is_lost_of_nothing(problem):
    u, v, prior = problem
    equations = NormalEquations(0 * prior)
    equations.add(u, 0 * v)
    assert equations.lost(equations.solve(0.1)) == 0
