"""One table for both ends of a tied model."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.calibration.statistics import collect
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import absorb
from dotresize.narrow.tied_head import choose_table, head_basis

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


@pytest.fixture
def q() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(24, 16, dtype=torch.float64)).Q


def test_the_tied_head_is_the_refitted_one(q):
    """u diag(w') B' E' = u A E', and A is the least-squares reader."""
    x = torch.randn(300, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    scale, table = torch.rand(24, dtype=torch.float64) + 0.5, torch.randn(50, 24).double()
    s = (16 / 24) ** 0.5
    basis, weights, between = head_basis(q, s * q, x.mT @ x, scale, table.mT @ table, 1e-12)
    reader = torch.linalg.lstsq(s * x @ q, x * scale).solution
    assert torch.allclose(between, reader.mT, atol=1e-6)
    assert torch.allclose(basis * weights, between)


def test_the_table_is_as_near_to_the_embeddings_as_a_scale_per_column_allows(q):
    x = torch.randn(300, 24, dtype=torch.float64)
    scale, table = torch.rand(24, dtype=torch.float64) + 0.5, torch.randn(50, 24).double()
    wanted = (16 / 24) ** 0.5 * q
    basis, weights, between = head_basis(q, wanted, x.mT @ x, scale, table.mT @ table, 0.1)
    goal = table @ wanted

    def distance(weights: torch.Tensor) -> torch.Tensor:
        return (table @ (between / weights) - goal).square().sum(0)

    for factor in (0.99, 1.01):
        assert (distance(weights) < distance(factor * weights)).all()
    assert torch.allclose(distance(weights), (table @ basis - goal).square().sum(0))


def test_full_width_changes_nothing(tokens):
    model = CausalLM.in_memory(tiny_model(dtype=torch.float64))
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    for basis in (torch.eye(24, dtype=torch.float64), q):
        narrow = absorb(model, basis)
        table = narrow.module.model.embed_tokens
        before = table.weight.clone()
        moment = collect(model, tokens, cost=False).final
        choose_table(model, narrow, basis, moment, ridge=0.1)
        if basis is not q:
            assert torch.allclose(table.weight, before)
        assert narrow.module.lm_head.weight is table.weight


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("method", ["pca", "dot", "magnitude"])
def test_every_method_is_refitted_with_it(kind, method, tokens):
    model = tiny_model(kind)
    narrow, report = compress(model, tokens, width=16, method=method)
    assert report["tied"]
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    plain, _ = compress(model, tokens, width=16, method=method, refit=False)
    assert not torch.equal(narrow.lm_head.weight, plain.lm_head.weight)
