"""Ridge regression from sums over chunks of tokens."""

from __future__ import annotations

import pytest
import torch

from dotresize.least_squares import NormalEquations, add_to, gram


def solved(
    u: torch.Tensor, v: torch.Tensor, prior: torch.Tensor, ridge: float, **choices
) -> torch.Tensor:
    equations = NormalEquations(prior)
    for part in zip(u.split(7), v.split(7), strict=True):
        equations.add(*part)
    assert equations.tokens_per_input == len(u) / u.shape[1]
    return equations.solve(ridge, **choices)


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


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_sizes_of_inputs_do_not_matter_to_a_proportional_ridge(problem, ridge):
    u, v, prior = problem
    scale = torch.logspace(-2, 2, 11)
    wanted = solved(u, v, prior, ridge, proportional=True)
    found = solved(u * scale, v, prior / scale[:, None], ridge, proportional=True)
    assert torch.allclose(found * scale[:, None], wanted, rtol=1e-4, atol=1e-5)
    weight = (ridge * u.double().square().sum(0)).sqrt()
    stacked = torch.cat([u, torch.diag(weight)])
    exact = torch.linalg.lstsq(stacked, torch.cat([v, weight[:, None] * prior])).solution
    assert torch.allclose(wanted, exact, atol=1e-5)


def test_sums_are_contiguous(problem):
    """A prior is often a transposed weight; sums over processes take no strides."""
    equations = NormalEquations(problem[2].mT.contiguous().mT)
    assert equations.cross.is_contiguous()
    assert equations.gram.is_contiguous()


def test_an_input_that_is_always_zero_keeps_its_prior(problem):
    u, v, prior = problem
    u[:, 4] = 0.0
    for proportional in (True, False):
        solution = solved(u, v, prior, 0.01, proportional=proportional)
        assert torch.allclose(solution[4], prior[4])
        assert torch.isfinite(solution).all()


def test_no_signal_at_all_keeps_the_prior(problem):
    u, v, prior = problem
    for proportional in (True, False):
        assert torch.allclose(solved(0 * u, v, prior, 0.1, proportional=proportional), prior)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_what_is_lost(problem, ridge, solved, proportional):
    """What is lost is right for all inputs, and for some of them."""
    u, v, prior = problem
    for kept in (torch.arange(11), torch.tensor([0, 3, 4, 9])):
        equations = NormalEquations(prior)
        equations.add(u, v)
        equations.restrict(kept, prior[kept])
        a = equations.solve(ridge, proportional=proportional) if solved else prior[kept]
        wanted = (u[:, kept].double() @ a - v.double()).square().sum() / v.double().square().sum()
        assert equations.lost(a) == pytest.approx(float(wanted), rel=1e-4)


def test_nothing_is_lost_of_nothing(problem):
    u, v, prior = problem
    equations = NormalEquations(0 * prior)
    equations.add(u, 0 * v)
    assert equations.lost(equations.solve(0.1)) == 0


def test_inputs_alone_are_met_by_what_the_prior_makes_of_them(problem):
    u, _, prior = problem
    given, alone = NormalEquations(prior), NormalEquations(prior, met_by_prior=True)
    given.add(u, u.double() @ prior, 3.0)
    alone.add(u, None, 3.0)
    for equations in (given, alone):
        equations.total()
    assert alone.tokens_per_input == given.tokens_per_input
    torch.testing.assert_close(alone.cross, given.cross, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(alone.squares, given.squares, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [1, 7, 16, 37, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gram_matrices_are_whole(width, dtype):
    u = torch.randn(50, width).to(dtype)
    found = gram(u)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), u.double().mT @ u.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("met_by_prior", [False, True])
def test_tokens_that_wait_for_others_count_as_any(problem, monkeypatch, met_by_prior):
    monkeypatch.setattr("dotresize.least_squares.FEW", 20)
    u, v, prior = problem
    at_once, waiting = (NormalEquations(prior, met_by_prior=met_by_prior) for _ in range(2))
    for i, (some, wanted) in enumerate(zip(u.split(7), v.split(7), strict=True)):
        target = None if met_by_prior else wanted
        at_once.add(some, target, 1.0 + i % 2)
        waiting.add_few(some, target, 1.0 + i % 2)
        some.zero_()  # a batch's memory is written again
    for equations in (at_once, waiting):
        equations.total()
    assert waiting.tokens_per_input == at_once.tokens_per_input
    for name in ("gram", "cross", "squares"):
        found = getattr(waiting, name), getattr(at_once, name)
        assert torch.allclose(*found, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 70_000), (513, 129), (0, 3)])
def test_parts_are_added_in_float64(rows, columns):
    total, part = torch.randn(rows, columns, dtype=torch.float64), torch.randn(rows, columns)
    wanted = total + 0.3 * part.double()
    add_to(total, part, 0.3)
    assert torch.allclose(total, wanted, rtol=1e-15, atol=1e-15)
