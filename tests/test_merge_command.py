"""``dotresize merge-ff``, as its users call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import fails, tiny_model

import dotresize
from dotresize.accounting import unique_parameters
from dotresize.cli import comparison, main, report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(model_directory, text_file, tmp_path):
    small = ["--window", "32", "--windows", "6", "--eval-windows", "4", "--quiet"]
    return [
        *("merge-ff", str(model_directory), str(tmp_path / "out"), "--merge", "2"),
        *("--calibration", str(text_file), "--eval", str(text_file), *small),
    ]


def test_the_command(words, capsys):
    assert main([*words, "--compare", "--anchor", "last"]) == 0
    table = capsys.readouterr().out
    for name in ("dense", "merged", "without permutation", "soft alignment", "layers dropped"):
        assert f" {name} " in f"{table.splitlines()[0]} "
    out = Path(words[2])
    report = json.loads((out / "dotresize.json").read_text())
    assert len(report["stacks"]["decoder"]["profile"]) == 2
    parameters = {name: row["parameters"] for name, row in report["rows"].items()}
    assert parameters["dense"] - parameters["merged"] == 3 * 24 * 40
    assert parameters["merged"] == parameters["soft alignment"] > parameters["layers dropped"]
    assert main(["eval", str(out), *words[6:7], "--window", "32", "--quiet"]) == 0
    assert main(["merge-ff", str(out), f"{out}2", *words[3:]]) == 2  # what is merged is merged


def test_recovery_trains_what_is_shared(words, capsys):
    pytest.importorskip("accelerate")
    import transformers

    training = ["--recover", "4", "--learning-rate", "0.003"]
    assert main([*words, *training, "--compare"]) == 0
    rows = json.loads((Path(words[2]) / "dotresize.json").read_text())["rows"]
    for name in ("merged", "without permutation", "soft alignment", "layers dropped"):
        after = rows[f"{name} + recovery"]
        assert after["parameters"] == rows[name]["parameters"]
        assert after["perplexity"] != rows[name]["perplexity"]
    loaded = dotresize.load(words[2])
    assert unique_parameters(loaded) == rows["merged"]["parameters"]
    out = Path(words[2])
    words[2] += "-alone"
    assert main([*words, *training]) == 0
    one, other = (folder / "model.safetensors" for folder in (out, Path(words[2])))
    assert one.read_bytes() == other.read_bytes()
    words[2] += "-plain"
    assert main([*words, *training, "--compare", "--plain"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(words[2])
    for name, weight in loaded.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name


def test_a_baseline_that_fails_costs_its_row(words, capsys, caplog, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(
        comparison, "recovered", _raising("layers dropped", ValueError("the loss is not finite"))
    )
    assert main([*words, "--recover", "2", "--compare"]) == 0
    assert "layers dropped: the loss is not finite; left out of the comparison" in caplog.text
    assert "soft alignment + recovery" in capsys.readouterr().out


def test_plain_output_loads_everywhere(words, model_directory, capsys):
    import transformers

    shared, plain = Path(words[2]), Path(f"{words[2]}-plain")
    assert main(words) == 0
    assert f"{shared} loads with dotresize.load" in capsys.readouterr().out
    words = [*words[:2], str(plain), *words[3:], "--plain"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith(f"\n{plain} loads with plain transformers\n")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(plain)
    tokens = torch.randint(0, 256, (2, 20))
    with torch.inference_mode():
        wanted = dotresize.load(shared)(input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens).logits, wanted)
    assert loaded.config.model_type == "llama"
    dense = (model_directory / "model.safetensors").stat().st_size
    assert (plain / "model.safetensors").stat().st_size == dense
    # What is saved and what is not, in the record and on the card.
    for folder, sentence in (
        (plain, "Saved in this directory: nothing."),
        (shared, "Saved: 0.0 M parameters, in the file and in memory"),
    ):
        assert json.loads((folder / "dotresize.json").read_text())["saved"].startswith(sentence)
        assert sentence in (folder / "README.md").read_text()
    words[-1] = "--resume"
    assert "made with another plain (True then, False now)" in fails(words, capsys)


@pytest.fixture
def easily_broken(words, model_directory, tmp_path):
    """The command on a model whose feed-forwards do nothing until they are averaged.

    Each writes nothing: one by its gate, the other by its writer, and their average by neither.
    Without them the model repeats the last byte, which is all that the text does.
    """
    torch.manual_seed(2)
    model = tiny_model()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.up_proj.weight.mul_(30)
            (layer.mlp.gate_proj if i % 2 else layer.mlp.down_proj).weight.zero_()
    folder, text = tmp_path / "fragile", tmp_path / "repeated.txt"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_directory / name).read_bytes())
    text.write_text("a" * 2000)
    changed = [str(text) if word == words[6] else word for word in words]
    changed[1] = str(folder)
    return changed


@pytest.mark.parametrize("evaluated", [True, False], ids=["--eval", "held out"])
def test_a_broken_result_is_warned_of(evaluated, easily_broken, caplog, capsys):
    pytest.importorskip("accelerate")
    words = easily_broken
    if not evaluated:
        words = [*words[: words.index("--eval")], *words[words.index("--eval") + 2 :]]
    assert main(words) == 0
    found = json.loads((Path(words[2]) / "dotresize.json").read_text())
    name = "repeated" if evaluated else "repeated (held out)"
    dense, merged = (found["rows"][row]["perplexity"][name] for row in ("dense", "merged"))
    last = caplog.records[-1]
    assert last.levelname == "WARNING"
    assert last.message == (
        f"{name}: perplexity {merged:.6g} is {merged / dense:.3g} times the dense model's "
        f"{dense:.6g}; train it with --recover"
    )
    # It is the final model that counts.
    caplog.clear()
    words[2] += "-recovered"
    assert main([*words, "--recover", "40", "--learning-rate", "0.01"]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_warning_names_the_worst_text():
    dense = {"wikipedia": 20.0, "news": 30.0}
    assert report.warning_of(dense, {"wikipedia": 59.9, "news": 89.9}, "help") is None
    assert report.warning_of({}, {}, "help") is None
    text = report.warning_of(dense, {"wikipedia": 60.0, "news": 12345.6}, "help")
    assert text == "news: perplexity 12345.6 is 412 times the dense model's 30; help"
    assert report.warning_of(dense, {"wikipedia": 60.0, "news": 30.0}, "help") is not None


@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["shared", "--plain"])
def test_an_interrupted_recovery_goes_on(plain, words, capsys, monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    words += [*plain, "--recover", "4", "--learning-rate", "0.003"]
    whole = [*words]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        stop = _raising("merged", KeyboardInterrupt(), after=True)
        patch.setattr(comparison, "recovered", stop)
        capsys.readouterr()
        assert "--resume goes on from it" in fails(words, capsys, code=1)
    assert "holds an unfinished run" in fails(words, capsys)
    other = [*words[:-3], "6", *words[-2:], "--resume"]  # steps
    assert "another recover (4 then, 6 now)" in fails(other, capsys)
    other = [word for word in words if word != "--plain"] if plain else [*words, "--plain"]
    assert "another plain" in fails([*other, "--resume"], capsys)
    assert main([*words, "--resume"]) == 0
    assert not Path(f"{words[2]}.partial").exists()
    one, other = (Path(w[2]) / "model.safetensors" for w in (words, whole))
    assert one.read_bytes() == other.read_bytes()


def _raising(name, error, *, after=False):
    """What trains, but for one model, whose training is done where the error comes after it."""
    recovered = comparison.recovered

    def train(dense, model, tokens, row, *choices):
        wanted = row["method"] == name
        if wanted and not after:
            raise error
        found = recovered(dense, model, tokens, row, *choices)
        if wanted:
            raise error
        return found

    return train


def test_the_profile_is_drawn(words, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*words, "--plot", str(tmp_path / "profile.svg")]) == 0
    assert "first layer of the window" in (tmp_path / "profile.svg").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plot", "x.svg", "--start", "0"], "--plot: there is nothing to draw with --start"),
        (["--plot", "x.txt"], "--plot x.txt: must be a .svg, .png or .pdf file"),
        (["--plot", "/no/where/x.svg"], "its directory does not exist"),
        (["--merge", "9"], "--merge 9: must be 2 to 3, the layers of the decoder"),
        (["--anchor", "best"], "--anchor best: must be one of first, middle, last"),
        (["--soft", "0"], "--soft 0: must be positive"),
        (["--soft", "1", "--no-permute"], "--soft 1: must be positive, and without --no-permute"),
        (["--select-windows", "7"], "--select-windows 7: must be 1 to 6"),
        (["--start", "5"], "--start 5: must be 0 to 1 for 3 layers"),
        (["--recover", "0"], "--recover 0: must be at least 1 step"),
    ],
    ids=str,
)
def test_the_command_refuses(more, message, words, capsys):
    assert message in fails([*words, *more], capsys)
    assert not Path(words[2]).exists()
