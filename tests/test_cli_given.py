"""What people type: names, files, folders of a hub's cache, closed pipes, short models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import copy_of, fails
from safetensors.torch import load_file, save_file

from dotresize.cli import main, presets
from dotresize.cli.choices import TextChoices
from dotresize.cli.presets import PRESETS

COMMAND = [sys.executable, "-m", "dotresize"]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, **options
    )


def test_an_output_with_a_long_name(arguments, capsys):
    """A name of 247 bytes is taken; a longer one leaves no room for that of the unfinished run."""
    parent = Path(arguments[2]).parent
    for name in ("x" * 250, "é" * 125, "x" * 300):
        arguments[2] = str(parent / name)
        for more in ([], ["--resume"]):
            assert "at most 247" in fails([*arguments, *more], capsys)
    arguments[2] = str(parent / ("x" * 247))
    assert main(arguments) == 0
    assert (parent / ("x" * 247) / "config.json").is_file()


def test_an_output_with_no_name(arguments, capsys):
    arguments[2] = "/"
    assert "output" in fails(arguments, capsys)


def hub_cache(model_directory: Path, folder: Path, commits: tuple[str, ...]) -> Path:
    cache = folder / "models--some--tiny"
    for commit in commits:
        shutil.copytree(model_directory, cache / "snapshots" / commit)
    return cache


def test_a_cache_folder_of_a_hub_is_a_model(model_directory, arguments, tmp_path, capsys):
    cache = hub_cache(model_directory, tmp_path, ("abc",))
    arguments[1] = str(cache)
    assert main(arguments) == 0
    capsys.readouterr()
    shutil.copytree(cache / "snapshots" / "abc", cache / "snapshots" / "def")
    arguments[2] += "-2"
    assert "holds 2 snapshots; give one" in fails(arguments, capsys)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def\n")
    assert main(arguments) == 0


def test_the_same_file_twice_is_named(arguments, text_file, tmp_path, capsys):
    (tmp_path / "link.txt").symlink_to(text_file)
    for other in (str(text_file), str(tmp_path / "link.txt")):  # it is there once already
        line = fails([*arguments, "--calibration", other], capsys)
        assert f"--calibration {other}: is given twice" in line


def test_windows_are_no_longer_than_the_model(model_directory, text_file, tmp_path, capsys):
    """The default of 512 is 256 for a model of 256 positions; a number that was typed is kept."""
    assert main(["eval", str(model_directory), str(text_file)]) == 0
    short = capsys.readouterr().out
    assert main(["eval", str(model_directory), str(text_file), "--window", "256"]) == 0
    assert capsys.readouterr().out == short
    arguments = ["compress", str(model_directory), str(tmp_path / "out"), "--width", "16"]
    arguments += ["--calibration", str(text_file), "--windows", "3", "--quiet"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "dotresize.json").read_text())
    assert report["calibration"]["tokens"] == 6 * 256  # half of them its own
    capsys.readouterr()
    arguments[2] += "-2"
    assert "256 positions" in fails([*arguments, "--window", "300"], capsys)


def test_no_multiple_is_spoken_of_where_the_width_stays(arguments, caplog):
    at = arguments.index("--width")
    arguments[at : at + 2] = ["--ff-width", "30"]
    assert main(arguments) == 0
    assert "width 24 ->" not in caplog.text
    assert "width 24 is no multiple" not in caplog.text
    assert "feed-forward width 30 is no multiple of 32" in caplog.text


def with_a_head(model_directory: Path, folder: Path) -> Path:
    """A directory whose config says tied, and whose files hold another head."""
    other = copy_of(model_directory, folder / "another head")
    path = other / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    assert config["tie_word_embeddings"]
    return other


@pytest.mark.parametrize("more", [[], ["--memory", "3GB"]])
@pytest.mark.parametrize("size", [["--width", "24"], ["--ff-width", "40", "--width", "24"]])
def test_a_head_that_is_not_the_embedding(model_directory, arguments, tmp_path, size, more):
    import transformers

    source = with_a_head(model_directory, tmp_path)
    arguments[1] = str(source)
    at = arguments.index("--width")
    arguments[at : at + 2] = size
    assert main([*arguments, "--no-refit", *more]) == 0
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        wanted, found = (
            transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
            for folder in (source, arguments[2])
        )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    config = json.loads((Path(arguments[2]) / "config.json").read_text())
    assert not config["tie_word_embeddings"]


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_of_several_dtypes(model_directory, arguments, tmp_path, named):
    """With and without --memory the weights come out in the dtype that transformers gives them."""
    source = copy_of(model_directory, tmp_path / "several")
    path = source / "model.safetensors"
    stored = load_file(path)
    for name in stored:
        stored[name] = stored[name].to(torch.float32 if "norm" in name else torch.bfloat16)
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    if not named:
        del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    arguments[1] = str(source)
    found = []
    for i, more in enumerate(([], ["--memory", "3GB"])):
        out = f"{arguments[2]}-{i}"
        assert main([*arguments[:2], out, *arguments[3:], *more]) == 0
        files = sorted(Path(out).glob("*.safetensors"))
        found.append({n: w.dtype for file in files for n, w in load_file(file).items()})
    assert found[0] == found[1]
    assert set(found[0].values()) == {torch.bfloat16}


def test_a_closed_standard_output():
    done = run(["info"], preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (1, "dotresize: OSError: standard output is closed\n")
    process = subprocess.Popen(
        [*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # long before it says anything
    said = process.stderr.read()
    assert process.wait() == 1
    assert said.splitlines()[-1] == "dotresize: OSError: standard output is closed"


@pytest.mark.parametrize("wait", [0.3, 0.8, 1.5])
def test_ctrl_c_while_modules_are_imported(wait):
    process = subprocess.Popen([*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    lines = said.decode().splitlines()
    if process.returncode == 0:
        assert lines == []  # it had ended before
    elif process.returncode == 1:
        assert lines == ["dotresize: interrupted; nothing was left behind"]
    else:
        # Python itself was still starting, and knew of no handler.
        assert process.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_which_an_import_makes_another_error(kind):
    """NumPy, interrupted while it loads under a module that goes on without it, fails later."""
    code = (
        "import signal, sys, time\n"
        "from dotresize.cli import commands, main\n"
        "def run(_):\n"
        f"    try: signal.raise_signal({int(kind)}); time.sleep(60)\n"
        "    except KeyboardInterrupt: raise ImportError('cannot load module') from None\n"
        "commands.run = run\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dotresize: interrupted; nothing was left behind\n"


def test_a_preset_takes_no_more_than_the_texts_hold(caplog):
    """Half of the shortest, of each; or what any text gives; and what was typed is typed."""
    caplog.set_level("INFO", "dotresize")
    choices = TextChoices(window=10, eval_windows=None, windows=384, default_windows=True)
    streams = [torch.zeros(1200), torch.zeros(5000)]
    assert choices.within(streams).windows == 120
    assert "the texts have room for 120 windows, not for 384" in caplog.text
    assert choices.within([torch.zeros(200)]).windows == 32
    assert replace(choices, windows=12).within(streams).windows == 12
    assert replace(choices, default_windows=False).within(streams).windows == 384


def test_a_search_without_a_budget_is_refused(arguments, capsys):
    line = fails([*arguments, "--no-search"], capsys)
    assert "--search: there is none without --params" in line


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, arguments, monkeypatch):
    """Each says how much text is read and whether shapes are tried; options say otherwise."""
    monkeypatch.setitem(
        presets.PRESETS, preset, replace(PRESETS[preset], windows={"cpu": 4, "cuda": 4})
    )
    for option in ("--width", "--windows"):
        at = arguments.index(option)
        del arguments[at : at + 2]
    whole = [*arguments, "--preset", preset, "--params", "0.9"]
    assert main(whole) == 0
    report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
    assert report["calibration"]["tokens"] == 8 * 32  # half of them its own
    searched = bool(report["budget"]["tried"])
    assert searched == (PRESETS[preset].search is True)
    other = "--no-search" if PRESETS[preset].search else "--search"
    whole[2] += "-3"
    assert main([*whole, other, "--compare"]) == 0
    report = json.loads((Path(whole[2]) / "dotresize.json").read_text())
    assert bool(report["budget"]["tried"]) != searched
    assert len(report["compared"]) > 1
    for others in (["--width", "16"], ["--memory", "2GB"], ["--scope", "location"]):
        arguments[2] += "-2"
        assert main([*arguments, "--preset", preset, "--windows", "3", *others]) == 0
        report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
        given = report["calibration"]["tokens"] // 32 - report["calibration"]["self_windows"]
        assert given == 3
