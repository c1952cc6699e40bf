"""One parameter budget over two widths."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dotresize import compress
from dotresize.accounting import count_parameters
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import Law, best_split, parameters_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 33))


@pytest.mark.parametrize("kind", supported(residual=True, feed_forward=True))
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_a_narrowed_model(kind, tied, tokens):
    changes = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = tiny_model(kind, tied=tied, **changes)
    for width, inner in ((24, 40), (12, 7)):
        narrow, _ = compress(
            model, tokens, width=width, ff_width=inner, refit=False, self_windows=0
        )
        counted = count_parameters(CausalLM.in_memory(narrow))
        for count in ("total", "non_embedding"):
            assert parameters_at(CausalLM.in_memory(model), count)(width, inner) == counted[count]


def test_a_law_goes_through_its_points():
    law = Law.through((0.1, 0.2), (0.05, 0.4))
    assert law(0.1) == pytest.approx(0.05)
    assert law(0.2) == pytest.approx(0.4)
    assert law(0.0) == 0.0


def test_the_cheaper_width_is_cut_first():
    model = CausalLM.in_memory(tiny_model())
    dear, cheap = Law(10.0, 1.0), Law(0.1, 1.0)
    residual_dear = best_split(model, 0.8, "non_embedding", 4, dear, cheap)
    inner_dear = best_split(model, 0.8, "non_embedding", 4, cheap, dear)
    assert residual_dear.width == 24 > inner_dear.width
    assert residual_dear.inner < 40 == inner_dear.inner
    for split in (residual_dear, inner_dear):
        parameters = parameters_at(model, "non_embedding")
        assert parameters(split.width, split.inner) <= 0.8 * parameters(24, 40)


def test_a_budget_nothing_fits():
    model, law = CausalLM.in_memory(tiny_model()), Law(1.0, 1.0)
    with pytest.raises(ValueError, match=r"params 0\.001: no pair of widths"):
        best_split(model, 0.001, "total", 4, law, law)


@pytest.mark.parametrize("untie", [False, True])
def test_compress_keeps_to_the_budget(untie, tokens):
    model = tiny_model()
    narrow, report = compress(model, tokens, params=0.7, untie=untie)
    assert report["tied"] is not untie
    dense, found = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert 0.45 * dense < found <= 0.7 * dense
    assert report["budget"]["asked"] == 0.7
    assert report["width"]["new"] == narrow.config.hidden_size
    assert report["feed_forward"]["new"] == narrow.config.intermediate_size
