"""Rows say which code they measured, and tables say where that has changed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import code

    return code


def test_a_digest_is_of_what_changes_figures(code, monkeypatch, tmp_path):
    for folder in code.AREAS["gpu"]:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    before = code.digest("gpu")
    path = tmp_path / "kernels" / "l1_cost.py"
    text = path.read_text()
    path.write_text(text.replace('"""Launches', '"""Starts').replace("# Neurons:", "# What:"))
    assert code.digest("gpu") == before
    path.write_text(re.sub(r"^( {8})(\w)", r"    \2", text, count=1, flags=re.MULTILINE))
    assert code.digest("gpu") != before  # a statement left its block
    path.write_text(text.replace("ALIGNED = 16", "ALIGNED = 32"))
    assert code.digest("gpu") != before


def test_a_table_of_older_rows_says_so(code, monkeypatch):
    from benchmarks.tables import __main__ as tables

    def since(*rows):
        monkeypatch.setattr(tables, "rows", lambda name: list(rows))
        return tables.since("quality")

    today = {"code": {"compressor": code.digest("compressor")}, "commit": "abc1234"}
    old = {"code": {"compressor": "0" * 12}, "commit": "0123456"}
    assert since(today) == ""
    assert "Measured at commit 0123456; this code has changed since." in since(old, today)
    assert "before rows recorded their commit" in since(today, {})


def test_rows_carry_it(code):
    row = code.measured_code()
    assert set(row["code"]) == set(code.AREAS)
    assert all(len(digest) == 12 for digest in row["code"].values())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_sources_without_history_name_the_given_commit(code, monkeypatch, tmp_path):
    known = code.measured_code("fedcba9")["commit"]
    if (ROOT / ".git").exists():
        assert known != "fedcba9"  # git's word counts
    inside = tmp_path / "repository" / "copy"
    (inside / "csrc").mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(inside.parent)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another"], check=True)
    monkeypatch.setattr(code, "ROOT", inside)
    monkeypatch.setattr(code, "AREAS", {"gpu": ()})
    assert code.measured_code()["commit"] is None  # not that of a repository around it
    row = code.measured_code("fedcba9")
    assert row["commit"] == "fedcba9"
    assert len(row["code"]["gpu"]) == 12


def test_gpu_rows_name_the_given_commit(code, monkeypatch, tmp_path):
    from benchmarks.gpu import __main__ as gpu
    from benchmarks.rows import read

    monkeypatch.setattr(code, "_commit", lambda: None)
    arguments = ["gpu", "--out", str(tmp_path), "--sections", "ceiling", "--commit"]
    monkeypatch.setattr(sys, "argv", [*arguments, "0123456789abcdef"])
    assert gpu.main() == 0
    assert {row["commit"] for row in read(tmp_path / "gpu.jsonl")} == {"0123456"}
    monkeypatch.setattr(sys, "argv", [*arguments, "HEAD"])
    with pytest.raises(SystemExit):
        gpu.main()
