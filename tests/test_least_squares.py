"""Ridge regression from sums per source, and the ridge chosen on sources left out."""

from __future__ import annotations

import math

import pytest
import torch

from dotresize.least_squares import NormalEquations, choose_ridge


def equations_of(sources: list[tuple[torch.Tensor, torch.Tensor]]) -> NormalEquations:
    u, v = sources[0]
    equations = NormalEquations(len(sources), torch.empty(u.shape[1], v.shape[1]))
    for i, (inputs, outputs) in enumerate(sources):
        for part in zip(inputs.split(7), outputs.split(7), strict=True):
            equations.add(i, *part)
    return equations


@pytest.fixture
def sources() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three sources that agree on the map: v = u A + noise."""
    truth = torch.randn(11, 5)
    made = []
    for scale in (1.0, 3.0, 0.2):
        u = scale * torch.randn(60, 11)
        made.append((u, u @ truth + 0.1 * scale * torch.randn(60, 5)))
    return made


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_solution_is_that_of_the_stacked_problem(sources, ridge):
    prior = torch.randn(11, 5, dtype=torch.float64)
    u = torch.cat([u for u, _ in sources]).double()
    v = torch.cat([v for _, v in sources]).double()
    weight = (ridge * u.square().sum() / 11).sqrt()
    stacked = torch.cat([u, weight * torch.eye(11, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([v, weight * prior])).solution
    assert torch.allclose(equations_of(sources).solve(prior, ridge), wanted, atol=1e-5)


def test_infinite_ridge_is_the_prior(sources):
    prior = torch.randn(11, 5, dtype=torch.float64)
    assert torch.equal(equations_of(sources).solve(prior, math.inf), prior)


def test_held_out_error_is_that_of_a_solution_without_the_source(sources):
    equations = equations_of(sources)
    prior = torch.zeros(11, 5, dtype=torch.float64)
    errors = equations.held_out_errors(prior, 0.1)
    for i, (u, v) in enumerate(sources):
        others = equations_of([pair for j, pair in enumerate(sources) if j != i])
        residual = u.double() @ others.solve(prior, 0.1) - v
        assert errors[i] == pytest.approx(float(residual.square().sum() / v.square().sum()), 1e-3)


def test_sources_that_agree_choose_a_small_ridge_and_those_that_do_not_keep_the_prior(sources):
    prior = torch.zeros(11, 5, dtype=torch.float64)
    assert choose_ridge(equations_of(sources), prior) <= 0.03
    opposed = [(u, v if i else -v) for i, (u, v) in enumerate(sources[:2])]
    assert choose_ridge(equations_of(opposed), prior) == math.inf


def test_an_input_that_is_always_zero_keeps_its_prior(sources):
    prior = torch.randn(11, 5, dtype=torch.float64)
    for u, _ in sources:
        u[:, 4] = 0.0
    solution = equations_of(sources).solve(prior, 0.01)
    assert torch.allclose(solution[4], prior[4])
    assert torch.isfinite(solution).all()
