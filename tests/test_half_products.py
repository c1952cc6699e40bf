"""Products of half-precision activations, as a GPU's matrix units form them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dotresize import compress, least_squares
from dotresize.narrow import refit


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


def test_sums_before_a_map_are_those_after_it(matrix_units):
    """x Q - y met from the products of x and y with u, also where one channel is massive."""
    tokens, inputs, width, outputs = 300, 20, 12, 9
    u, x = torch.randn(tokens, inputs), torch.randn(tokens, width)
    x[:, 3] *= 900
    q = torch.linalg.qr(torch.randn(width, outputs, dtype=torch.float64)).Q
    y = x @ q.float() - torch.randn(tokens, outputs) / 10
    u, x, y = u.bfloat16(), x.bfloat16(), y.bfloat16()
    prior = torch.randn(inputs, outputs, dtype=torch.float64)
    found = []
    for through, v in ((None, x.double() @ q - y.double()), (q, torch.cat([x, y], 1))):
        equations = least_squares.NormalEquations(prior, through=through)
        equations.add(u, v, 2.0)
        equations.total()
        a = equations.solve(0.1)
        found.append((a, equations.lost(a)))
    (a, lost), (other, other_lost) = found
    assert ((a - other).norm() / a.norm()) < 1e-4
    assert other_lost == pytest.approx(lost, rel=1e-3)


def test_a_feed_forward_is_refitted_from_both_streams(matrix_units, monkeypatch):
    """A GPU's way gives a model in half precision the same weights, to its rounding."""
    model, tokens = tiny_model(dtype=torch.bfloat16, tied=False), torch.randint(259, (6, 24))
    choices = {"width": 16, "self_windows": 0, "sensitivity": False}
    found = []
    for apart in (False, True):
        monkeypatch.setattr(refit, "has_matrix_units", lambda _, apart=apart: apart)
        narrow, report = compress(model, tokens, **choices)
        found.append((narrow.state_dict(), report["feed_forward_lost"]))
    (weights, lost), (others, others_lost) = found
    for name, weight in weights.items():
        error = (weight.float() - others[name].float()).norm() / weight.float().norm()
        assert error < 0.02, name
    assert others_lost == pytest.approx(lost, rel=1e-2)


def test_what_is_not_definite_is_solved_for_by_lu():
    values = torch.linspace(-1, 1, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    gram, cross = turn * values @ turn.mT, torch.randn(8, 3, dtype=torch.float64)
    for matrix in (gram, gram @ gram):
        found = least_squares.solve(matrix.clone(), cross.clone(), torch.zeros_like(cross), 0.0)
        assert torch.allclose(matrix @ found, cross, atol=1e-9)
