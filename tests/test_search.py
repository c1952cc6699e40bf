"""The search for the shape that a budget is spent on, beyond two widths."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import tiny_model
from test_compress import logits

from dotresize import compress, load
from dotresize.accounting import count_parameters
from dotresize.cli import main
from dotresize.compression import make_options
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.calibrate import with_own_text
from dotresize.narrow.search import Judge, Split, Tried, shape_of, split_budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (8, 33))


def with_idle_layers(kind: str, *numbers: int):
    """Return a model of 16 layers, some of which write nothing."""
    model = tiny_model(kind, num_hidden_layers=16)
    for i in numbers:
        for name, weight in model.model.layers[i].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.zero_()
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_layers_that_do_nothing_are_left_out(kind, tokens, tmp_path, monkeypatch):
    """And what they took is left to the feed-forwards of the others; the checkpoint is plain."""
    model = with_idle_layers(kind, 5, 11)
    monkeypatch.setattr(Judge, "_excess", lambda _, shape, __: 1.0 - len(shape.dropped))
    choices = {"params": 0.88, "params_count": "non_embedding", "self_windows": 0}
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
    _, report = compress(tiny_model(), tokens, params=0.7, self_windows=0)
    assert report["layers"] == {"old": 3, "new": 3, "dropped": []}


def test_a_width_for_each_layer_within_a_budget(tokens, tmp_path):
    choices = {"params": 0.7, "params_count": "non_embedding", "layer_widths": True}
    model = with_idle_layers("llama", 5)
    narrow, report = compress(model, tokens, self_windows=0, **choices)
    dense, found = (report["parameters"][name]["non_embedding"] for name in ("dense", "narrow"))
    assert found <= 0.7 * dense
    tried = report["budget"]["tried"]
    assert sum(own["by_layer"] for own in tried) == 3  # with no, one and two layers less
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
    options = make_options(params=0.8, layer_widths=layer_widths, self_windows=2)
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


def test_the_command_says_what_it_left_out(arguments, tmp_path, capsys, caplog):
    source = tmp_path / "source"
    transformers.AutoTokenizer.from_pretrained(arguments[1]).save_pretrained(source)
    with_idle_layers("llama", 5, 11).save_pretrained(source)
    command = [word for word in arguments if word != "--quiet"]
    command[1] = str(source)
    command[command.index("--width") : command.index("--width") + 2] = [
        *("--params", "0.88", "--params-count", "non_embedding")
    ]
    assert main([*command, "--compare"]) == 0
    assert "without layer 5 and 11" in caplog.text
    said = capsys.readouterr().out
    layers = next(line for line in said.splitlines() if line.startswith("layers"))
    assert layers.split() == ["layers", "16", *["14"] * (len(layers.split()) - 2)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- layers 16 -> 14, without layer 5 and 11 (counted from 0)" in card
    assert main([*command, "--compare", "--resume"]) == 0
