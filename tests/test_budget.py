"""One parameter budget over two widths."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from conftest import tiny_model
from test_compress import logits
from test_offload import opened, stored

from dotresize import compress
from dotresize.accounting import count_parameters
from dotresize.compression import make_options
from dotresize.models import supported
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import Budget, check_budget, parameters_at
from dotresize.narrow.pipeline import narrow_model
from dotresize.narrow.search import Judge, ends_of, middle_of

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


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_ends_and_middle_lie_on_the_line(kind, share):
    model = CausalLM.in_memory(tiny_model(kind))
    options = make_options(params=share, params_count="non_embedding")
    pairs = Budget(model, options).pairs()
    ends = ends_of(pairs, model)
    parameters = parameters_at(model, "non_embedding")
    for pair in pairs:
        assert parameters(*pair) <= share * parameters(24, 40)
    assert set(ends) <= set(pairs)
    middle = middle_of(pairs, ends, model)
    if middle is not None:
        assert middle in pairs
        assert ends[0][0] < middle[0] < ends[1][0]
        assert middle[1] < ends[0][1]


def test_a_budget_nothing_fits():
    with pytest.raises(ValueError, match=r"params 0\.001: no pair of widths"):
        Budget(CausalLM.in_memory(tiny_model()), make_options(params=0.001)).pairs()


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("llama", {}),
        ("llama", {"multiple_of": 20}),
        ("llama", {"untie": True}),
        ("mixtral", {}),
        ("gpt2", {"multiple_of": 16}),
    ],
)
def test_the_least_that_a_refusal_names_can_be_had(kind, choices):
    model = CausalLM.in_memory(tiny_model(kind))
    with pytest.raises(ValueError, match="the least is") as refused:
        check_budget(model, make_options(params=0.001, **choices))
    least = float(str(refused.value).rpartition(" ")[2])
    check_budget(model, make_options(params=least + 0.001, **choices))
    with pytest.raises(ValueError, match="the least is"):
        check_budget(model, make_options(params=least - 0.001, **choices))


def probe_as(excess):
    """Stands in for a measurement: the excess of two widths by a formula."""

    def measured(self, shape, options):
        model = self._given.model
        inner = model.inner_width if shape.inner is None else max(shape.inner)
        return excess(1 - shape.width / model.width, 1 - inner / model.inner_width)

    return measured


WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("excess", "cut"),
    [
        (lambda x, y: 5 * x + y, (False, True)),  # the cheaper width alone
        (lambda x, y: x + 9 * y, (True, False)),
        (lambda x, y: max(x, y) + 9 * min(x, y), (True, False)),
        (lambda x, y: (3 * x) ** 2 + (8 / 3 * y) ** 2, (True, True)),
    ],
    ids=["feed-forward", "residual", "not both", "both"],
)
def test_what_is_taken_was_measured(excess, cut, tokens, monkeypatch):
    monkeypatch.setattr(Judge, "_excess", probe_as(excess))
    choices = {"params": 0.7, "params_count": "non_embedding", "self_windows": 0, "search": True}
    narrow, report = compress(tiny_model(**WIDE), tokens, **choices)
    found = narrow.config.hidden_size, narrow.config.intermediate_size
    tried = [(m["width"], m["ff_width"]) for m in report["budget"]["tried"]]
    assert found in tried
    assert (found[0] < 96, found[1] < 256) == cut, report["budget"]


def test_the_middle_is_taken_only_if_it_is_better(tokens, monkeypatch):
    """Also where neither width alone can meet the budget."""
    both = probe_as(lambda x, y: 9.0 if x < 0.8 and y < 0.8 else 1.0)
    monkeypatch.setattr(Judge, "_excess", both)
    choices = {"params": 0.12, "params_count": "non_embedding", "self_windows": 0, "search": True}
    _, report = compress(tiny_model(**WIDE), tokens, **choices)
    assert report["budget"]["excess"] == 1.0
    ends = probe_as(lambda x, y: 2.0 if x < 0.8 and y < 0.8 else math.inf)
    monkeypatch.setattr(Judge, "_excess", ends)
    _, other = compress(tiny_model(**WIDE), tokens, **choices)
    assert other["budget"]["excess"] == 2.0
    assert 9.0 in [tried["excess"] for tried in report["budget"]["tried"]]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_a_budget_of_one_width(kind, tokens):
    """Where only one width can be cut, the budget is that width."""
    model = tiny_model(kind)
    narrow, report = compress(model, tokens, params=0.85, self_windows=0, search=True)
    dense, found = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert 0.6 * dense < found <= 0.85 * dense
    assert (report["budget"]["tried"] == []) == (kind in ("mixtral", "qwen3_moe"))
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
    kept = torch.arange(16)
    _, report = compress(tiny_model(), tokens, self_windows=0, method="dot", targets=kept)
    assert report["width"]["new"] == 16
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


def test_a_model_that_stays_in_its_files_has_a_budget_of_feed_forwards(tokens, caplog, tmp_path):
    """The same weights as in memory; other shapes cannot be tried."""
    caplog.set_level("INFO", logger="dotresize")
    source = tiny_model(intermediate_size=160)
    model = opened(stored(source, tmp_path / "model"))
    whole, held = compress(source, tokens, self_windows=0)
    narrow, report = narrow_model(model, tokens, make_options(self_windows=0))
    assert "no size was asked for: params 0.8" in caplog.text
    assert report["budget"] == held["budget"]
    assert report["feed_forward"]["new"] == held["feed_forward"]["new"] < 160
    narrow.save(tmp_path / "narrow")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    torch.testing.assert_close(logits(again, tokens), logits(whole, tokens))
    for choices in ({"params": 0.3}, {"params": 0.8, "search": True}):
        with pytest.raises(ValueError, match=r"params 0\.\d: takes a search of shapes, for which"):
            narrow_model(model, tokens, make_options(self_windows=0, **choices))


@pytest.mark.parametrize(("kind", "size"), [("llama", "width"), ("gpt2", "ff_width")])
def test_a_model_that_stays_in_its_files_has_no_other_budget(kind, size, tokens, caplog, tmp_path):
    """Its feed-forwards would keep less than half of their neurons."""
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
    monkeypatch.setattr(Judge, "_excess", probe_as(lambda x, y: -0.48 if x and y else -0.5))
    choices = {"params": 0.7, "params_count": "non_embedding", "self_windows": 0, "search": True}
    _, report = compress(tiny_model(**WIDE), tokens, **choices)
    assert report["budget"]["tried"][-1]["excess"] == -0.48
    assert report["budget"]["excess"] == -0.5


@pytest.mark.parametrize("untie", [False, True])
def test_compress_keeps_to_the_budget(untie, tokens):
    model = tiny_model()
    narrow, report = compress(model, tokens, params=0.7, untie=untie)
    assert report["tied"] is not untie
    dense, found = (count_parameters(CausalLM.in_memory(m))["total"] for m in (model, narrow))
    assert 0.4 * dense < found <= 0.7 * dense
    assert report["budget"]["asked"] == 0.7
    assert report["width"]["new"] == narrow.config.hidden_size
    assert report["feed_forward"]["new"] == narrow.config.intermediate_size
