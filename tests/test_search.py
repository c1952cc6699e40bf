"""The search for the shape that a budget is spent on, beyond two widths."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from conftest import copy_of, tiny_model
from test_compress import logits

from dotresize import compress, load
from dotresize.accounting import count_parameters
from dotresize.cli import comparison, main
from dotresize.compression import make_options
from dotresize.models import architecture_of
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import SameParts
from dotresize.models.layer_widths import set_inner_widths
from dotresize.narrow.absorb import absorb
from dotresize.narrow.calibrate import with_own_text
from dotresize.narrow.curves import curves_of
from dotresize.narrow.pipeline import prepare
from dotresize.narrow.refit import FIRST_WEIGHT
from dotresize.narrow.search import Judge, _predicted, split_budget
from dotresize.narrow.split import Split, Tried, shape_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (8, 33))


def with_idle_layers(kind: str, *numbers: int):
    """Return a model of 16 layers, some of which write nothing."""
    model = tiny_model(kind, num_hidden_layers=16)
    for i in numbers:
        layer = model.get_submodule(architecture_of(model.config).layers)[i]
        for name, weight in layer.named_parameters():
            if ".c_proj." in name or name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.zero_()
    return model


def test_curves_go_as_far_as_the_narrowest_share(tokens):
    """The widest layer keeps the least share of its neurons."""
    model = tiny_model()
    set_inner_widths(architecture_of(model.config), model, [40, 12, 16])
    handle = CausalLM.in_memory(model)
    options = make_options(params=0.9, params_count="non_embedding")
    found = next(iter(_predicted(handle, tokens, options)))
    equal = [min(found.inner, own) for own in handle.inner_widths]
    assert found.inner < 40
    whole = curves_of(handle, tokens, sum(equal) / 68, options, first=FIRST_WEIGHT)
    assert found.tried[0].predicted == pytest.approx(whole.predicted(equal), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_that_do_nothing_are_left_out(kind, tokens, tmp_path, monkeypatch):
    """And what they took is left to the feed-forwards of the others; the checkpoint is plain."""
    model = with_idle_layers(kind, 5, 11)
    monkeypatch.setattr(Judge, "_excess", lambda _, shape, __: 1.0 - len(shape.dropped))
    choices = {"params": 0.88, "params_count": "non_embedding", "self_windows": 0, "search": True}
    narrow, report = compress(model, tokens, **choices)
    assert report["layers"] == {"old": 16, "new": 14, "dropped": [5, 11]}
    dense, found = (report["parameters"][name]["non_embedding"] for name in ("dense", "narrow"))
    assert found == count_parameters(CausalLM.in_memory(narrow))["non_embedding"]
    assert found <= 0.88 * dense
    tried = report["budget"]["tried"]
    chosen = [own for own in tried if own["dropped"] == (5, 11)]
    assert len(chosen) == 1
    assert chosen[0]["excess"] == report["budget"]["excess"]
    assert chosen[0]["predicted"] == min(
        own["predicted"] for own in tried if own["predicted"] is not None
    )
    narrow.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokens), logits(narrow, tokens))


def test_no_layer_of_a_few_is_left_out(tokens):
    _, report = compress(tiny_model(), tokens, params=0.7, self_windows=0, search=True)
    assert report["layers"] == {"old": 3, "new": 3, "dropped": []}


@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3"])
def test_no_layer_is_left_out_where_they_differ_by_number(kind, tokens):
    """llama.cpp has their pattern in its code: behind a gap it would be another one."""
    model = tiny_model(kind, num_hidden_layers=16)
    _, report = compress(model, tokens, params=0.85, self_windows=0, search=True)
    assert report["layers"]["dropped"] == []
    assert all(own["dropped"] == () for own in report["budget"]["tried"])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_widest_layer_may_be_left_out(kind, tokens, tmp_path):
    """What stays is of one width, which the config then has."""
    model = tiny_model(kind, num_hidden_layers=16)
    architecture = architecture_of(model.config)
    set_inner_widths(architecture, model, [40] + [28] * 15)
    handle = CausalLM.in_memory(model)
    made = handle.derived(SameParts(handle, (0,))).module
    absorbed = absorb(handle, torch.eye(24, dtype=torch.float64), dropped=(0,)).module
    for one in [made] if architecture.fixed_residual else [made, absorbed]:
        assert one.config.intermediate_size == 28
        folder = tmp_path / str(id(one))
        one.save_pretrained(folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(again, tokens), logits(one, tokens))


def test_padding_with_a_layer_less(tokens, monkeypatch):
    """An uneven model that loses a layer and is filled up: the widths are those of what stays."""
    model = with_idle_layers("llama", 1)
    set_inner_widths(architecture_of(model.config), model, [40, 24] * 8)
    monkeypatch.setattr(Judge, "_excess", lambda _, shape, __: 1.0 - len(shape.dropped))
    choices = {"params": 0.96, "params_count": "non_embedding", "self_windows": 0, "search": True}
    narrow, report = compress(model, tokens, layer_widths=True, pad=True, **choices)
    assert report["layers"]["dropped"] == [1]
    assert report["plain_checkpoint"]
    assert (logits(narrow, tokens) - logits(model, tokens)).abs().max() < 0.05


def test_a_shape_without_finite_predictions_is_never_taken(tokens, monkeypatch):
    """A half-precision stream that overflows without a layer is no reason to stop."""
    model = tiny_model(num_hidden_layers=8, mlp_bias=True, dtype=torch.float16)
    for i, sign in zip((3, 4, 5, 6), (1, -1, 1, -1), strict=True):
        model.model.layers[i].mlp.down_proj.bias.data[0] = sign * 4e4
    assert torch.isfinite(logits(model, tokens)).all()
    _, report = compress(model, tokens, params=0.8, self_windows=0, search=True)
    assert report["layers"]["dropped"] not in ([4], [5])
    json.dumps(report, allow_nan=False)
    monkeypatch.setattr(Judge, "_excess", lambda *_: math.inf)
    with pytest.raises(ValueError, match=r"params 0\.8: no shape that was tried has a finite"):
        compress(tiny_model(), tokens, params=0.8, self_windows=0, search=True)


def test_what_was_prepared_is_what_is_asked_for(tokens):
    model = CausalLM.in_memory(tiny_model())
    for made, asked in ((True, False), (False, True)):
        options = make_options(params=0.8, layer_widths=made, self_windows=0)
        prepared = prepare(model, tokens, options)
        with pytest.raises(ValueError, match=r"were prepared for no budget of params 0\.8"):
            compress(model.module, tokens, params=0.8, layer_widths=asked, statistics=prepared)


def test_a_width_for_each_layer_within_a_budget(tokens, tmp_path):
    choices = {"params": 0.7, "params_count": "non_embedding", "layer_widths": True, "search": True}
    model = with_idle_layers("llama", 5)
    narrow, report = compress(model, tokens, self_windows=0, **choices)
    dense, found = (report["parameters"][name]["non_embedding"] for name in ("dense", "narrow"))
    assert found <= 0.7 * dense
    tried = report["budget"]["tried"]
    assert sum(own["by_layer"] for own in tried) >= 1
    equal = {own["dropped"]: own["predicted"] for own in tried if not own["by_layer"]}
    for own in tried:
        if own["by_layer"] and equal.get(own["dropped"]) is not None:
            assert own["predicted"] <= equal[own["dropped"]]
    if report["feed_forward"]["layers"] is not None:
        assert CausalLM.in_memory(narrow).inner_widths == report["feed_forward"]["layers"]
        CausalLM.in_memory(narrow).save(tmp_path)
        assert torch.equal(logits(load(tmp_path), tokens), logits(narrow, tokens))


@pytest.mark.parametrize("layer_widths", [False, True])
def test_a_split_passes_through_json(layer_widths, tokens):
    model = CausalLM.in_memory(with_idle_layers("llama", 3))
    options = make_options(params=0.8, layer_widths=layer_widths, self_windows=2, search=True)
    written, _ = with_own_text(model, tokens, options)
    split = split_budget(model, written, options, 2)
    again = Split.recorded(**json.loads(json.dumps(split.record())))
    assert again == split
    assert shape_of(again, model) == shape_of(split, model)
    assert split.excess is not None


def test_the_excess_is_that_of_the_shape():
    tried = (Tried(24, 32, (1,), excess=1.0), Tried(24, 32, excess=2.0), Tried(24, 30))
    assert Split(24, 32, tried=tried).excess == 2.0
    assert Split(24, 32, dropped=(1,), tried=tried).excess == 1.0
    assert Split(24, 30, tried=tried).excess is None


def test_the_command_says_what_it_left_out(arguments, tmp_path, capsys, caplog, monkeypatch):
    # One layer less and two are much the same to a random model.
    monkeypatch.setattr(Judge, "_excess", lambda _, shape, __: 1.0 - len(shape.dropped))
    source = tmp_path / "source"
    transformers.AutoTokenizer.from_pretrained(arguments[1]).save_pretrained(source)
    with_idle_layers("llama", 5, 11).save_pretrained(source)
    command = [word for word in arguments if word != "--quiet"]
    command[1] = str(source)
    command[command.index("--width") : command.index("--width") + 2] = [
        *("--params", "0.88", "--params-count", "non_embedding", "--search")
    ]
    assert main([*command, "--compare"]) == 0
    assert "without layer 5 and 11" in caplog.text
    said = capsys.readouterr().out
    layers = next(line for line in said.splitlines() if line.startswith("layers"))
    assert layers.split() == ["layers", "16", "16", "16", "16", "14"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- layers 16 -> 14, without layer 5 and 11 (counted from 0)" in card
    report = json.loads((tmp_path / "out" / "dotresize.json").read_text())
    dense, neurons, channels, paper = report["compared"]
    assert neurons["feed_forward"]["method"] == "magnitude"
    assert channels["method"] == "magnitude"
    assert (paper["method"], paper["map"]["steps"], paper["map"]["factor"]) == ("dot", 1, "qr")
    room = 0.88 * dense["parameters"]["narrow"]["non_embedding"]
    for row in (neurons, channels, paper, report):
        assert row["refit"] is None or row is report
        assert 0.7 * room < row["parameters"]["narrow"]["non_embedding"] <= room
    assert main([*command, "--compare", "--resume"]) == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt2", ["feed-forward, magnitude"]),
        ("mixtral", ["magnitude", "transport"]),
    ],
)
def test_a_budget_is_compared_on_the_widths_that_can_change(
    kind, expected, arguments, model_directory, tmp_path, capsys
):
    folder = copy_of(model_directory, tmp_path / "other")
    tiny_model(kind).save_pretrained(folder)
    arguments[1] = str(folder)
    arguments[3:5] = ["--params", "0.9"]
    assert main([*arguments, "--compare"]) == 0
    heading = capsys.readouterr().out.splitlines()[0].split("  ")
    names = [name.strip() for name in heading if name.strip()]
    assert names[:-1] == ["dense", *expected]


def test_what_cannot_be_compared_costs_its_row(arguments, tmp_path, monkeypatch, capsys, caplog):
    """The result is written; a choice of neurons is not handed to what narrows the residual."""
    arguments[3:5] = ["--params", "0.9", "--ff-method", "nystrom"]
    found = comparison.narrow_model

    def fails_once(model, tokens, options, prepared):
        if options.method.name == "dot" and options.params is None:
            raise ValueError("its map collapsed")
        return found(model, tokens, options, prepared)

    monkeypatch.setattr(comparison, "narrow_model", fails_once)
    assert main([*arguments, "--compare"]) == 0
    heading = capsys.readouterr().out.splitlines()[0].split("  ")
    names = [name.strip() for name in heading if name.strip()]
    assert names[:-1] == ["dense", "feed-forward, magnitude", "magnitude"]
    assert "to compare with, dot is left out: its map collapsed" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_nothing_is_compared_where_the_budget_is_everything(arguments, caplog, capsys):
    caplog.set_level("INFO", logger="dotresize")
    arguments[3:5] = ["--params", "1"]
    assert main([*arguments, "--compare"]) == 0
    assert "nothing was cut" in caplog.text
    assert capsys.readouterr().out.splitlines()[0].split() == ["dense", "transport", "+", "refit"]


@pytest.mark.parametrize("share", [0.85, 0.6])
def test_the_default_searches_where_feed_forwards_are_not_enough(share, tokens):
    """They are narrowed alone as long as they keep half of their neurons."""
    model = tiny_model()
    choices = {"params": share, "params_count": "non_embedding", "self_windows": 0}
    alone, report = compress(model, tokens, search=False, **choices)
    enough = report["feed_forward"]["new"] >= 20
    assert enough == (share == 0.85)
    narrow, report = compress(model, tokens, **choices)
    assert bool(report["budget"]["tried"]) != enough
    if enough:
        assert torch.equal(logits(narrow, tokens), logits(alone, tokens))
    searched = compress(model, tokens, search=True, **choices)[1]
    assert searched["budget"]["tried"]


def test_a_choice_about_the_residual_has_it_tried(tokens):
    """Which would do nothing otherwise; without a search it is refused."""
    choices = {"params": 0.85, "params_count": "non_embedding", "self_windows": 0}
    for name, choice in {"reg": {"reg": 1.0}, "method": {"method": "pca"}}.items():
        _, report = compress(tiny_model(), tokens, **choices, **choice)
        assert any(own["width"] < 24 for own in report["budget"]["tried"])
        with pytest.raises(ValueError, match=f"{name}.*: without search the residual keeps its"):
            compress(tiny_model(), tokens, search=False, **choices, **choice)


def test_no_search_narrows_feed_forwards_alone(tokens):
    """And searches all the same where they have too few parameters for that."""
    model = tiny_model()
    choices = {"params_count": "non_embedding", "self_windows": 0, "search": False}
    narrow, report = compress(model, tokens, params=0.8, **choices)
    dense, found = (report["parameters"][name]["non_embedding"] for name in ("dense", "narrow"))
    assert 0.75 * dense < found <= 0.8 * dense
    assert report["width"]["new"] == 24
    assert report["layers"]["dropped"] == []
    assert report["budget"]["tried"] == []
    again, _ = compress(model, tokens, ff_width=report["feed_forward"]["new"], self_windows=0)
    assert torch.equal(logits(narrow, tokens), logits(again, tokens))
    _, report = compress(model, tokens, params=0.8, layer_widths=True, **choices)
    assert report["parameters"]["narrow"]["non_embedding"] <= 0.8 * dense
    assert all(own["excess"] is None for own in report["budget"]["tried"])
    _, report = compress(model, tokens, params=0.4, **choices)
    assert report["width"]["new"] < 24
    assert [own for own in report["budget"]["tried"] if own["excess"] is not None]
    for search in (True, False):
        with pytest.raises(ValueError, match="search: there is none without params"):
            compress(model, tokens, width=16, search=search)
    handle = CausalLM.in_memory(model)
    searched = prepare(handle, tokens, make_options(params=0.8, self_windows=0))
    with pytest.raises(ValueError, match=r"for no budget of params 0\.8 with search False"):
        compress(model, tokens, params=0.8, search=False, statistics=searched)
