"""Narrowing the inner width of feed-forward blocks, alone and through compress."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.accounting import count_parameters
from dotresize.compression import FF_METHODS
from dotresize.models import architecture_of, supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.feed_forward import eliminate

pytestmark = pytest.mark.usefixtures("one_thread")


def inner(n: int = 12, rank: int = 12, tokens: int = 500) -> torch.Tensor:
    return torch.randn(tokens, rank, dtype=torch.float64) @ torch.randn(
        rank, n, dtype=torch.float64
    )


def loss_without(gram, cross, kept) -> float:
    """Least squares that are left over, up to the constant |y|^2."""
    block = gram[kept][:, kept]
    return -float((cross[kept] * torch.linalg.solve(block, cross[kept])).sum())


def test_elimination_drops_the_neuron_that_costs_least():
    h, w = inner(), torch.randn(12, 7, dtype=torch.float64)
    gram = h.mT @ h
    cross = gram @ w
    kept = eliminate(gram, cross, 11, ridge=1e-9)
    best = min(
        (torch.tensor(s) for s in itertools.combinations(range(12), 11)),
        key=lambda s: loss_without(gram, cross, s),
    )
    assert kept.tolist() == best.tolist()


def test_elimination_where_rounding_left_an_indefinite_matrix():
    """A Gram matrix of few tokens may be that, with next to no ridge."""
    h, w = inner(rank=5), torch.randn(12, 7, dtype=torch.float64)
    gram = h.mT @ h
    gram -= 1e-9 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.linalg.eigvalsh(gram)[0] < 0
    kept = eliminate(gram, gram @ w, 6, ridge=1e-12)
    assert len(set(kept.tolist())) == 6


def test_elimination_in_blocks_is_near_the_best_set():
    h, w = inner(), torch.randn(12, 7, dtype=torch.float64)
    gram = h.mT @ h
    cross = gram @ w
    losses = sorted(
        loss_without(gram, cross, torch.tensor(s)) for s in itertools.combinations(range(12), 8)
    )
    found = loss_without(gram, cross, eliminate(gram, cross, 8, ridge=1e-9))
    assert found <= losses[len(losses) // 10]  # among the best tenth of all 495


def test_redundant_neurons_go_without_loss():
    """Twelve neurons that span eight directions: the eight that stay say everything."""
    h, w = inner(rank=8), torch.randn(12, 7, dtype=torch.float64)
    gram = h.mT @ h
    for method in ("eliminate", "nystrom"):
        kept, writer = FF_METHODS[method].choose(gram, gram @ w, w, 8)
        error = (h[:, kept] @ writer - h @ w).norm() / (h @ w).norm()
        plain = (h[:, kept] @ w[kept] - h @ w).norm() / (h @ w).norm()
        assert error < 0.15 < plain, method


def test_transport_hands_copies_on():
    """A scaled copy, even of opposite sign, is recombined onto the neuron it copies."""
    h = inner(6)
    h = torch.cat([h, -0.5 * h[:, :2]], 1)
    w = torch.randn(8, 5, dtype=torch.float64)
    w[6:] *= 0.1  # the copies are the weak ones
    gram = h.mT @ h
    kept, writer = FF_METHODS["transport"].choose(gram, gram @ w, w, 6)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]
    error = (h[:, kept] @ writer - h @ w).norm()
    assert error < 0.35 * (h[:, kept] @ w[kept] - h @ w).norm()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


@pytest.mark.parametrize("kind", supported(residual=True, feed_forward=True))
def test_a_narrower_feed_forward_loads_plainly(kind, tokens, tmp_path):
    import transformers

    model = tiny_model(kind)
    narrow, report = compress(model, tokens, ff_width=0.7)
    assert report["width"]["new"] == 24  # only what was asked for
    expected = {"asked": 0.7, "old": 40, "new": 32, "layers": None, "method": "eliminate"}
    assert report["feed_forward"] == expected
    part = architecture_of(model.config).sublayers[-1]
    gone = 3 * (part.stacked * len(part.readers) + 1) * 8 * 24
    before, after = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert before - after == gone
    narrow.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        difference = loaded(input_ids=tokens).logits - narrow(input_ids=tokens).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("method", FF_METHODS)
def test_all_neurons_is_the_identity(method):
    h, w = torch.randn(200, 12, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    kept, rows = FF_METHODS[method].choose(h.mT @ h, h.mT @ h @ w, w, 12)
    assert kept.tolist() == list(range(12))
    assert torch.allclose(rows, w)


def test_least_squares_beats_selection_on_the_calibration_tokens(tokens):
    model = tiny_model()

    def distance(method: str, refit: bool) -> float:
        # Without text of its own, which turns on a machine's last digits.
        choices = {"ff_width": 24, "ridge": 1e-3, "self_windows": 0}
        narrow, _ = compress(model, tokens, ff_method=method, refit=refit, **choices)
        with torch.inference_mode():
            wanted = model.model(input_ids=tokens).last_hidden_state
            return float((narrow.model(input_ids=tokens).last_hidden_state - wanted).norm())

    magnitude = distance("magnitude", refit=False)
    assert distance("nystrom", refit=False) < magnitude
    assert distance("eliminate", refit=True) < 0.9 * magnitude


def test_both_widths_at_once(tokens):
    narrow, report = compress(tiny_model(), tokens, width=16, ff_width=30)
    assert (narrow.config.hidden_size, narrow.config.intermediate_size) == (16, 30)
    assert report["refit"]["ridge"] is None
