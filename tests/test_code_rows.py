"""Rows say which code they measured, and tables say where that has changed."""

from __future__ import annotations

import re
import shutil
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
