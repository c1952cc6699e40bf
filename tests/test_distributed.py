"""Two processes over gloo give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, fails
from safetensors.torch import load_file

from dotresize import distributed
from dotresize.cli import main


def together(words: list[str]) -> subprocess.CompletedProcess:
    """The command in two processes of one thread each."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dotresize"]
    return subprocess.run(
        [sys.executable, "-m", *command, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def weights(folder: Path) -> dict:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_close(one: Path, other: Path) -> None:
    expected = weights(other)
    for name, weight in weights(one).items():
        error = (weight - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        # Sums in another order; a map for each location makes more of that than one for all.
        assert error < 3e-4, (name, float(error))


@pytest.mark.parametrize(
    "choices",
    [
        ["--memory", "4GB", "--ff-width", "30", "--eval-windows", "1"],
        ["--params", "0.8", "--search", "--layer-widths", "--multiple-of", "4"],
        ["--scope", "location"],
        ["--params", "0.9"],
    ],
    ids=str,
)
def test_same_as_one_process(choices, arguments, tmp_path, one_thread):
    # Not by PCA, whose kept axes are fewer in this process (conftest).
    choices = [*choices, "--method", "dot"]
    if "--params" in choices:  # which decides the width
        i = arguments.index("--width")
        del arguments[i : i + 2]
    done = together([*arguments, *choices])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity, topics") == 1  # one process speaks
    out, alone = Path(arguments[2]), tmp_path / "alone"
    arguments[2] = str(alone)
    assert main([*arguments, *choices]) == 0
    assert_close(out, alone)
    assert not Path(f"{out}.partial").exists()
    report, single = (
        json.loads((folder / "dotresize.json").read_text()) for folder in (out, alone)
    )
    assert report["perplexity"] == pytest.approx(single["perplexity"], rel=1e-3)
    assert report["calibration"] == single["calibration"]
    assert report["feed_forward"] == single["feed_forward"]
    assert report["layers"] == single["layers"]


def test_too_few_windows(arguments, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    words = [*arguments, "--windows", "1", "--self-windows", "0"]
    assert "1 windows are too few for 2 processes" in fails(words, capsys)
    assert not Path(arguments[2]).exists()
