"""The GPU evidence command, rehearsed in the interpreter on tiny sizes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dotresize.benchmarks.gpu import __main__ as gpu
from dotresize.benchmarks.gpu import correctness as gpu_checks
from dotresize.benchmarks.rows import read
from dotresize.kernels import cuda_graph

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs for real")


def test_every_section_makes_rows(tmp_path, capsys):
    assert gpu.run(tmp_path, peers=False) == 0
    rows = read(tmp_path / "gpu.jsonl")
    sections = {row["section"] for row in rows}
    assert sections == {"ceiling", "check", "l1", "sinkhorn", "batch", "stopping", "model"}
    assert [row for row in rows if "failed" in row] == []
    assert all(row["error"] <= row["accepted"] for row in rows if row["section"] == "check")
    assert sum(row["section"] == "check" for row in rows) >= 20
    assert all(row["device"] and row["versions"] for row in rows)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "dotresize fp16" in text
    assert "dotresize u16" in text


def test_a_wrong_result_is_a_row_and_an_exit_code(tmp_path, monkeypatch):
    def broken(device):
        raise RuntimeError("no such kernel\nand more")

    checks = [("right", lambda d: (0.0, 1.0)), ("wrong", lambda d: (2.0, 1.0))]
    monkeypatch.setattr(gpu_checks, "checks", lambda size: iter([*checks, ("broken", broken)]))
    nothing = {"l1": [], "sinkhorn": [], "batch": ((), 1, 1, 1)}
    monkeypatch.setitem(gpu.SIZES, "tiny", gpu.SIZES["tiny"] | nothing | {"model": (1, 3)})
    assert gpu.run(tmp_path, peers=False) == 1
    found = {row["case"]: row for row in read(tmp_path / "gpu.jsonl") if row["section"] == "check"}
    assert "failed" not in found["right"]
    assert found["wrong"]["failed"] == "error 2.00e+00, accepted 1e+00"
    assert found["broken"]["failed"] == "RuntimeError: no such kernel"
    model = [row for row in read(tmp_path / "gpu.jsonl") if row["section"] == "model"]
    assert all("TypeError" in row["failed"] for row in model)  # and the summary was written still
    assert (tmp_path / "gpu.md").exists()


def test_both_counts_of_a_timing_differ_in_whole_graphs(monkeypatch):
    """What is left of their difference is graphs alone, not a capture or single launches."""
    captured, alone = [], []
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(cuda_graph, "_captured", lambda *given: captured.append(1) or graph)
    on_gpu = SimpleNamespace(is_cuda=True, device=None)
    watch = SimpleNamespace(status=on_gpu, stopped=lambda: False)
    for shape, counts in gpu.SIZES["full"]["sinkhorn"]:
        single = []
        for count in counts:
            captured.clear()
            alone.clear()
            cuda_graph.iterate(alone.append, count + 1, watch)  # and the sweep that looks at it
            assert len(captured) == 1, (shape, count)
            single.append(len(alone))
        assert single[0] == single[1], (shape, counts)


def test_it_says_that_there_is_no_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)],
        env={"PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "torch sees no GPU; set TRITON_INTERPRET=1" in done.stderr
