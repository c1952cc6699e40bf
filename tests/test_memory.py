"""``--memory`` on the command line: what is said, planned, kept and refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, copy_of, fails, tiny_model
from test_cli import start
from test_offload import opened, stored

from dotresize.calibration.activation_cache import ActivationCache
from dotresize.cli import comparison, main
from dotresize.offload.memory_plan import parse, plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def by_parts(arguments):
    return [*arguments, "--memory", "4GB"]


def test_the_command_line_says_what_it_will_take(by_parts, arguments, caplog, tmp_path):
    """And it writes what it writes with the model in memory, own text left out."""
    caplog.set_level("INFO", logger="dotresize")
    assert main(by_parts) == 0
    assert "activations on the host" in caplog.text
    arguments[2] = str(tmp_path / "held")
    assert main([*arguments, "--self-windows", "0"]) == 0
    report, held = (
        json.loads((Path(out) / "dotresize.json").read_text())
        for out in (by_parts[2], arguments[2])
    )
    assert report["perplexity"] == pytest.approx(held["perplexity"], rel=1e-5)
    assert report["calibration"] == held["calibration"]
    assert report["predicted_memory_bytes"]["host"] > 10**8
    assert not Path(f"{by_parts[2]}.partial").exists()


@pytest.mark.parametrize("stage", ["prepare", "narrow_model", "dense_report"])
def test_stopped_and_gone_on(stage, by_parts, capsys, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    whole = [*by_parts]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(comparison, stage, stop)
        capsys.readouterr()
        assert "--resume goes on from it" in fails(by_parts, capsys, code=1)
    # Another budget changes where activations lie, and no weight.
    assert main([*by_parts[:-1], "3GB", "--resume"]) == 0
    shards = sorted(Path(whole[2]).glob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards:
        assert shard.read_bytes() == (Path(by_parts[2]) / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much"], "--memory 'much' is not a size of memory"),
        (["--memory", "0GB"], "--memory '0GB' is not a size"),
        (["--memory", "1MB"], r"--memory 0.00 GB: \d\.\d\d GB are needed, .* by the"),
        (["--compare"], "--compare: needs the whole model in memory; leave --memory out"),
        (["--method", "slicegpt"], "--method slicegpt: needs the whole model"),
        (["--self-windows", "2"], "--self-windows: needs the whole model"),
    ],
    ids=str,
)
def test_refusals(words, message, by_parts, capsys):
    assert re.search(message, fails([*by_parts, *words], capsys))
    assert not Path(f"{by_parts[2]}.partial").exists()


@pytest.mark.parametrize("widths", [[], ["--layer-widths"]])
def test_a_budget_of_feed_forwards(widths, by_parts, model_directory, tmp_path, capsys):
    """It takes no search; a budget that takes one is refused before the model is read."""
    source = copy_of(model_directory, tmp_path / "source")
    tiny_model(intermediate_size=160).save_pretrained(source)
    by_parts[1] = str(source)
    at = by_parts.index("--width")
    by_parts[at : at + 2] = ["--params", "0.8", *widths]
    assert main(by_parts) == 0
    report = json.loads((Path(by_parts[2]) / "dotresize.json").read_text())
    total = report["parameters"]
    assert 0.7 < total["narrow"]["total"] / total["dense"]["total"] <= 0.8
    assert report["width"]["new"] == 24
    capsys.readouterr()
    by_parts[2] += "-2"
    assert "--search: needs the whole model" in fails([*by_parts, "--search"], capsys)
    by_parts[at + 1] = "0.3"
    assert "--params 0.3: takes a search of shapes, for which the whole" in fails(by_parts, capsys)
    assert not Path(f"{by_parts[2]}.partial").exists()


def test_only_directories_have_parts(by_parts, capsys, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    by_parts[1] = str(tmp_path / "model.gguf")
    assert "--memory: reads a model directory by parts" in fails(by_parts, capsys)


@pytest.mark.parametrize("place", ["host", "disk", "device"])
def test_activations_come_back_as_they_were(place):
    kept = ActivationCache(2, place)
    first, second = torch.randn(3, 4).bfloat16(), torch.randn(2, 4)
    kept[0], kept[1] = first, second
    first_was = first.clone()
    first.zero_()  # what is kept is a copy
    assert torch.equal(kept[0], first_was)
    kept[1] = second[:1]
    assert torch.equal(kept[1], second[:1])
    with pytest.raises(IndexError, match="batch 0 was never written"):
        ActivationCache(1, place)[0]


def test_no_more_files_than_a_process_may_open():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        kept = ActivationCache(400)
        for i in range(400):
            kept[i] = torch.full((3,), i)
        assert [int(x[0]) for x in kept] == list(range(400))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_budget_too_small_does_not_cost_what_is_finished(by_parts, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "dense_report", stop)
        fails(by_parts, capsys, code=1)
    kept = Path(f"{by_parts[2]}.partial")
    assert "GB are needed" in fails([*by_parts[:-1], "1MB", "--resume"], capsys)
    assert (kept / "narrow" / "config.json").is_file()
    assert main([*by_parts, "--resume"]) == 0
    assert not kept.exists()


def test_the_peak_of_experts(by_parts, model_directory, tmp_path):
    """Nothing is computed for all experts at once."""
    size = {"hidden_size": 512, "intermediate_size": 256, "num_local_experts": 96}
    folder = copy_of(model_directory, tmp_path / "experts")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    stored(tiny_model("mixtral", num_hidden_layers=1, **size), folder, "30MB")
    by_parts[1] = str(folder)
    by_parts[by_parts.index("--width") + 1] = "408"
    process = start(by_parts)
    assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
    report = json.loads((Path(by_parts[2]) / "dotresize.json").read_text())
    predicted, met = (report[f"{name}_memory_bytes"]["host"] for name in ("predicted", "peak"))
    assert 0.6 * predicted < met <= predicted


def test_long_texts_to_evaluate_on_are_planned_for(tmp_path):
    model = opened(stored(tiny_model(), tmp_path / "dense"))
    few = torch.zeros(2, 8, dtype=torch.int64)
    small, large = (plan(model, few, 16, 40, 4, 10**12, n) for n in (0, 10**7))
    assert large.host - small.host > 10**7 * 24 * 4 - 10**6


@pytest.mark.parametrize(
    ("size", "bytes_"), [("3GB", 3e9), ("2.5 GiB", 2.5 * 2**30), ("800m", 8e8), ("4096", 4096)]
)
def test_sizes_of_memory(size, bytes_):
    assert parse(size) == bytes_


def test_the_peak_is_not_that_of_who_started_it():
    code = "from dotresize.accounting import peak_memory; print(peak_memory()['host'])"
    held = torch.ones(2 * 10**8)  # 0.8 GB
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 10**8 < int(child.stdout) < held.nbytes
