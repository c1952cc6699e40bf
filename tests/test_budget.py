"""One parameter budget over two widths."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from test_offload import opened, stored

from dotresize import compress
from dotresize.accounting import count_parameters
from dotresize.compression import make_options
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import (
    POWERS,
    Budget,
    Law,
    Measured,
    best_split,
    parameters_at,
)
from dotresize.narrow.pipeline import narrow_model

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
    room = Budget(model, make_options(params=0.8, params_count="non_embedding"))
    dear, cheap = Law(10.0, 1.0), Law(0.1, 1.0)
    residual_dear = best_split(model, room.pairs(), dear, cheap)
    inner_dear = best_split(model, room.pairs(), cheap, dear)
    assert residual_dear.width == 24 > inner_dear.width
    assert residual_dear.inner < 40 == inner_dear.inner
    for split in (residual_dear, inner_dear):
        parameters = parameters_at(model, "non_embedding")
        assert parameters(split.width, split.inner) <= 0.8 * parameters(24, 40)


def test_a_budget_nothing_fits():
    with pytest.raises(ValueError, match=r"params 0\.001: no pair of widths"):
        Budget(CausalLM.in_memory(tiny_model()), make_options(params=0.001)).pairs()


def test_laws_that_hang_on_the_windows_are_held_in():
    assert Law.through((0.1, 0.2), (0.3, 0.2)).p == POWERS[0]  # less for more removed: noise
    assert Law.through((0.1, 0.2), (1e-9, 5.0)).p == POWERS[1]


def probe_as(excess):
    """Stands in for a measurement: the excess of two widths by a formula."""

    def measured(self, width, inner):
        found = excess(1 - width / 24, 1 - inner / 40)
        self.excesses.append((width, inner, found))
        return found

    return measured


@pytest.mark.parametrize(
    ("excess", "widths"),
    [
        (lambda x, y: 5 * x + y, (24, 16)),  # the cheaper width alone
        (lambda x, y: x + 9 * y, (16, 40)),
        # The laws see x and y alone and expect little of both; together they are dear.
        (lambda x, y: 5 * x**3 + 5 * y**3 + 9 * min(x, y), (16, 40)),
    ],
    ids=["feed-forward", "residual", "not both"],
)
def test_what_is_taken_was_measured(excess, widths, tokens, monkeypatch):
    monkeypatch.setattr(Measured, "excess", probe_as(excess))
    model = tiny_model()
    narrow, report = compress(model, tokens, params=0.7, params_count="non_embedding")
    found = narrow.config.hidden_size, narrow.config.intermediate_size
    tried = [(m["width"], m["ff_width"]) for m in report["budget"]["measured"]]
    assert found in tried
    assert found == widths, report["budget"]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_a_budget_of_one_width(kind, tokens):
    """Where only one width can be cut, the budget is that width, and nothing is measured."""
    model = tiny_model(kind)
    narrow, report = compress(model, tokens, params=0.85, self_windows=0)
    dense, found = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert 0.6 * dense < found <= 0.85 * dense
    assert report["budget"]["measured"] == []
    cut = report["width"] if kind in ("mixtral", "qwen3_moe") else report["feed_forward"]
    assert cut["new"] < cut["old"]


def test_without_a_size_it_is_a_budget(tokens, caplog):
    caplog.set_level("INFO", logger="dotresize")
    _, report = compress(tiny_model(), tokens, self_windows=0)
    assert report["budget"]["asked"] == 0.8
    assert "no size was asked for: params 0.8" in caplog.text
    for choices in ({"method": "slicegpt"}, {"scope": "location"}):
        _, report = compress(tiny_model(), tokens, self_windows=0, **choices)
        assert report["budget"] is None
        assert report["width"]["asked"] == 0.8
    kept = torch.arange(20)
    _, report = compress(tiny_model(), tokens, self_windows=0, method="dot", targets=kept)
    assert report["width"]["new"] == 20
    assert "no size was asked for: width 0.8" in caplog.text


def test_choices_of_the_default_budget(tokens):
    """What needs a budget is taken where the default is one, and refused where it is not."""
    model = tiny_model()
    _, report = compress(model, tokens, self_windows=0, params_count="non_embedding")
    assert report["budget"]["count"] == "non_embedding"
    _, report = compress(tiny_model("gpt2"), tokens, ff_method="nystrom")
    assert report["feed_forward"]["method"] == "nystrom"
    with pytest.raises(ValueError, match="ff_method nystrom: does nothing without"):
        compress(model, tokens, self_windows=0, method="slicegpt", ff_method="nystrom")


@pytest.mark.parametrize(("kind", "size"), [("llama", "width"), ("gpt2", "ff_width")])
def test_a_model_that_stays_in_its_files_has_no_budget(kind, size, tokens, caplog, tmp_path):
    caplog.set_level("INFO", logger="dotresize")
    model = opened(stored(tiny_model(kind), tmp_path / "model"))
    _, report = narrow_model(model, tokens, make_options())
    assert f"no size was asked for: {size} 0.8" in caplog.text
    cut = report["width" if size == "width" else "feed_forward"]
    assert cut["new"] < cut["old"]
    assert report["budget"] is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.5, 0.62, 0.77, 0.78, 0.785, 0.79])
def test_the_smallest_budgets_are_kept_to(kind, share, tokens):
    """No budget chooses a single neuron: a width of 1 means all of them."""
    model = tiny_model(kind)
    if kind == "gpt2" and share < 0.785:  # the other weights alone are more
        with pytest.raises(ValueError, match="has so few"):
            compress(model, tokens, params=share, self_windows=0)
        return
    narrow, _ = compress(model, tokens, params=share, self_windows=0)
    dense, found = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert found <= share * dense


def test_a_gain_is_compared_as_a_loss_is(tokens, monkeypatch):
    """A pair must be better by the margin also where narrowing gains."""
    steep = Law(1.0, 6.0), Law(1.0, 6.0)  # so that a pair is tried
    monkeypatch.setattr(Measured, "laws", lambda self: steep)
    monkeypatch.setattr(Measured, "excess", probe_as(lambda x, y: -0.48 if x and y else -0.5))
    _, report = compress(tiny_model(), tokens, params=0.7, params_count="non_embedding")
    assert report["budget"]["measured"][-1]["excess"] == -0.48
    assert report["budget"]["excess"] == -0.5


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
