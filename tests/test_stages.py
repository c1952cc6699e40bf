"""An interrupted run goes on from its last finished stage and ends with the same weights."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import PATIENCE, copy_of, fails
from test_cli import start

from dotresize.cli import comparison, main
from dotresize.cli.choices import RecoveryChoices, Source, TextChoices, settings
from dotresize.cli.parser import make_parser
from dotresize.cli.resume import FIRST_TOKEN, Stages, refuse_changes
from dotresize.narrow.options import Options

pytestmark = pytest.mark.usefixtures("one_thread")


def stop(*_, **__):
    raise KeyboardInterrupt


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def whole(arguments, tmp_path) -> bytes:
    words = [*arguments]
    words[2] = str(tmp_path / "whole")
    assert main(words) == 0
    assert not Path(f"{words[2]}.partial").exists()
    return weights(Path(words[2]))


@pytest.mark.parametrize("stage", ["prepare", "narrow_model", "dense_report", "evaluate_into"])
def test_stopped_in_every_stage(stage, whole, arguments, capsys, monkeypatch):
    """What was finished is not done again, and the result is the same to the last bit."""
    out, partial = Path(arguments[2]), Path(f"{arguments[2]}.partial")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, stage, stop)
        message = fails(arguments, capsys, code=1)
    assert not out.exists()
    kept = {path.name for path in partial.iterdir()} if partial.exists() else set()
    done = {"prepare": set(), "narrow_model": {"settings.json", "calibration"}}
    assert kept == done.get(stage, {"settings.json", "calibration", "narrow"})
    if not kept:
        assert "nothing was left behind" in message
        return
    assert "--resume goes on from it" in message
    assert "holds an unfinished run" in fails(arguments, capsys)
    assert "another ridge (None then, 0.5 now)" in fails(
        [*arguments, "--resume", "--ridge", "0.5"], capsys
    )
    with monkeypatch.context() as patch:
        for name, folder in (("prepare", "calibration"), ("narrow_model", "narrow")):
            if folder in kept:
                patch.setattr(comparison, name, stop)
        assert main([*arguments, "--resume"]) == 0
    assert weights(out) == whole
    assert not partial.exists()
    assert json.loads((out / "dotresize.json").read_text())["seconds"]["calibration"] > 0


def test_killed_at_some_moments(arguments, tmp_path):
    """SIGKILL leaves no chance to clean up."""
    # Not by PCA, whose kept axes are fewer in this process (conftest) than in those killed.
    arguments += ["--method", "dot"]
    whole = [*arguments]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    words = [*arguments, "--resume"]
    for wait in (0.0, 0.15, 0.4):
        process = start(words)
        if "width 24 -> 16" in process.stderr.readline():
            time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert main(words) == 0
    assert weights(Path(arguments[2])) == weights(Path(whole[2]))
    assert not Path(f"{arguments[2]}.partial").exists()


def test_sliced_models_are_kept_too(arguments, capsys, monkeypatch, tmp_path):
    words = [*arguments, "--method", "slicegpt", "--no-refit"]
    again = [*words]
    again[2] = str(tmp_path / "again")
    assert main(words) == 0

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "dense_report", stop)
        assert main(again) == 1
    assert main([*again, "--resume"]) == 0
    assert weights(Path(again[2])) == weights(Path(words[2]))


@pytest.mark.parametrize("content", [None, "[1]", "nonsense"])
def test_a_folder_that_is_not_ours_is_left_alone(content, arguments, capsys):
    folder = Path(f"{arguments[2]}.partial")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if content is not None:
        (folder / "settings.json").write_text(content)
    assert "is not what an unfinished run leaves" in fails([*arguments, "--resume"], capsys)
    assert (folder / "notes.txt").read_text() == "mine"
    shutil.rmtree(folder)


def test_every_option_is_compared(arguments):
    """What decides the weights follows from the fields of dataclasses: none can be forgotten."""
    args = make_parser().parse_args(arguments)
    recorded = settings(args, Source, Options, TextChoices, RecoveryChoices)
    assert {"method", "scope", "ridge", "no_refit", "seed", "windows", "recover"} <= recorded.keys()
    unrecorded = {
        field.metadata.get("flag", field.name)
        for kind in (Options, TextChoices, RecoveryChoices)
        for field in fields(kind)
    } - recorded.keys()
    defaults = {"default_window", "default_windows"}
    assert unrecorded == {"backend", "batch_windows", "figures", *defaults}
    other = make_parser().parse_args([*arguments, "--factor", "qr"])
    with pytest.raises(ValueError, match=r"made with another factor \(None then, qr now\)"):
        refuse_changes(Path("out"), settings(other, Options), recorded | FIRST_TOKEN)


def test_a_name_that_ends_in_a_slash(arguments):
    arguments[2] += "/"
    assert main(arguments) == 0
    assert not Path(f"{arguments[2][:-1]}.partial").exists()


def test_bad_choices_leave_nothing_to_go_on_from(arguments, capsys):
    """Found out after the calibration: the corrected command must not be refused."""
    wrong = [*arguments, "--method", "dot", "--reg"]
    assert "span has collapsed" in fails([*wrong, "1e15"], capsys)
    assert main([*wrong, "3"]) == 0


def test_what_a_kill_after_the_end_leaves_is_removed(arguments, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "remove", lambda self: None)
        assert main(arguments) == 0
    assert Path(f"{arguments[2]}.partial").exists()
    assert main([*arguments, "--resume"]) == 0
    assert not Path(f"{arguments[2]}.partial").exists()


def test_an_output_inside_the_model(arguments, model_directory, tmp_path, monkeypatch):
    inside = copy_of(model_directory, tmp_path / "model")
    arguments[1:3] = [str(inside), str(inside / "narrow")]

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "dense_report", stop)
        assert main(arguments) == 1
    assert main([*arguments, "--resume"]) == 0
