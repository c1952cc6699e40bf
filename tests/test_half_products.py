"""Products of half-precision activations, as a GPU's matrix units form them."""

from __future__ import annotations

import pytest
import torch

from dotresize import least_squares


@pytest.fixture
def matrix_units(monkeypatch):
    """Factors in half precision multiplied exactly and added up in float32, on a CPU."""
    halves = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(least_squares, "_exact", lambda x: x.dtype in halves)
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
