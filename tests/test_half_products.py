"""Products of half-precision activations, as a GPU's matrix units form them."""

from __future__ import annotations

import pytest
import torch

from dotresize import least_squares


@pytest.fixture
def matrix_units(monkeypatch):
    """Factors in half precision multiplied exactly and added up in float32, on a CPU."""
    halves = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(least_squares, "has_matrix_units", lambda x: x.dtype in halves)
    monkeypatch.setattr(least_squares, "_multiply", lambda a, b: (a.double() @ b.double()).float())


def test_three_parts_add_up_to_every_digit():
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-30, 30, 3)] + [torch.zeros(1)])
    parts = least_squares.split_in_three(x)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize(
    "kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_float32_factor_keeps_its_digits(matrix_units, kinds):
    a, b = (torch.randn(70, 70).to(kind) for kind in kinds)
    exact = a.double() @ b.double()
    assert ((least_squares.product(a, b) - exact).norm() / exact.norm()) < 1e-6
    assert ((least_squares.over_tokens(a.mT, b) - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_grams_of_scaled_tokens(matrix_units, kind):
    x, scale = torch.randn(90, 20).to(kind), torch.rand(90, 1) + 0.5
    unit = x.double() * scale.double()
    exact = unit.mT @ unit
    found = least_squares.scaled_gram(x, scale, x.float() * scale)
    assert found.dtype == torch.float32
    # A float16 model's scaled tokens are float32: not taken apart, as halves of less range.
    assert ((found - exact).norm() / exact.norm()) < 1e-6


def test_a_cpu_multiplies_as_float32():
    a = torch.randn(30, 40).bfloat16()
    assert torch.equal(least_squares.over_tokens(a, a), a.float().mT @ a.float())


def test_sums_before_a_map_are_those_after_it():
    """x Q - y met from the products of x and y with u, to float32's rounding."""
    tokens, inputs, width, outputs = 300, 20, 12, 9
    u = torch.randn(tokens, inputs)
    x, y = torch.randn(tokens, width), torch.randn(tokens, outputs)
    q = torch.linalg.qr(torch.randn(width, outputs, dtype=torch.float64)).Q
    prior = torch.randn(inputs, outputs, dtype=torch.float64)
    found = []
    for through, v in ((None, (x @ q.float()) - y), (q, torch.cat([x, y], 1))):
        equations = least_squares.NormalEquations(prior, through=through)
        equations.add(u, v, 2.0)
        equations.total()
        a = equations.solve(0.1)
        found.append((a, equations.lost(a)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_what_is_not_definite_is_solved_for_by_lu():
    values = torch.linspace(-1, 1, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    gram, cross = turn * values @ turn.mT, torch.randn(8, 3, dtype=torch.float64)
    for matrix in (gram, gram @ gram):
        found = least_squares.solve(matrix.clone(), cross.clone(), torch.zeros_like(cross), 0.0)
        assert torch.allclose(matrix @ found, cross, atol=1e-9)
