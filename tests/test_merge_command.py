"""``dotresize merge-ff``, as its users call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import fails

import dotresize
from dotresize.accounting import unique_parameters
from dotresize.cli import comparison, main

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


def test_a_baseline_that_fails_costs_its_row(words, capsys, caplog, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(
        comparison, "recovered", _raising("layers dropped", ValueError("the loss is not finite"))
    )
    assert main([*words, "--recover", "2", "--compare"]) == 0
    assert "layers dropped: the loss is not finite; left out of the comparison" in caplog.text
    assert "soft alignment + recovery" in capsys.readouterr().out


def test_an_interrupted_recovery_goes_on(words, capsys, monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    words += ["--recover", "4", "--learning-rate", "0.003"]
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
        (["--merge", "9"], "--merge 9: must be 2 to 3, the model's layers"),
        (["--anchor", "best"], "--anchor best: must be one of first, middle, last"),
        (["--soft", "0"], "--soft 0: must be positive"),
        (["--soft", "1", "--no-permute"], "--soft 1: must be positive, and without --no-permute"),
        (["--select-windows", "7"], "--select-windows 7: must be 1 to 6"),
        (["--start", "5"], "start 5: a window of 2 begins at 0 to 1"),
        (["--recover", "0"], "--recover 0: must be at least 1 step"),
    ],
    ids=str,
)
def test_the_command_refuses(more, message, words, capsys):
    assert message in fails([*words, *more], capsys)
    assert not Path(words[2]).exists()
