"""The GPU evidence command, rehearsed in the interpreter on tiny sizes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dotresize.benchmarks.gpu import __main__ as gpu
from dotresize.benchmarks.gpu import correctness as gpu_checks
from dotresize.benchmarks.gpu import times as gpu_times
from dotresize.benchmarks.gpu import tolerance
from dotresize.benchmarks.rows import read
from dotresize.benchmarks.tables.gpu import SECTIONS, serving_table, tolerance_table
from dotresize.benchmarks.workload import need
from dotresize.kernels import cuda_graph

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs for real")


@pytest.fixture
def steady(monkeypatch):
    """Timings that each take a little longer than the one before, whatever else the machine does.

    And few iterations before the exact finish of an assignment, for the interpreter.
    """
    ticks = (tick**2 * 1e-6 for tick in itertools.count())
    monkeypatch.setattr(gpu_times, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr("dotresize.ops.assignment_launch.SINKHORN_ITERATIONS", 3)


def test_every_section_makes_rows(tmp_path, capsys, steady):
    assert gpu.run(tmp_path, peers=False) == 0
    rows = read(tmp_path / "gpu.jsonl")
    sections = {row["section"] for row in rows}
    assert sections == set(SECTIONS) - {"sanitizer"}
    assert [row for row in rows if "failed" in row] == []
    assert all(row["error"] <= row["accepted"] for row in rows if row["section"] == "check")
    assert sum(row["section"] == "check" for row in rows) >= 20
    assert all(row["device"] and row["versions"] for row in rows)
    assert all(row["reached"] for row in rows if row["section"] == "tolerance")
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    for words in ("dotresize u8", "L1 gradient", "tol 0.001 dotresize", "2 of 5 x 5, uniform"):
        assert words in text


def test_a_longer_run_that_took_no_longer_is_no_time(monkeypatch):
    clock = gpu_times.Clock(torch.device("cpu"))
    times = itertools.count(100, -1)
    monkeypatch.setattr(gpu_times.Clock, "__call__", lambda self, call: (call(), next(times))[1])
    rows = gpu_times.sinkhorn_rows((1, 4, 3), (1, 2), clock, peers=False)
    assert all(row["failed"] == "2 iterations took no longer than 1" for row in rows)
    assert all("per_iteration_s" not in row for row in rows)


def test_a_wrong_result_is_a_row_and_an_exit_code(tmp_path, monkeypatch):
    def broken(device):
        raise RuntimeError("no such kernel\nand more")

    checks = [("right", lambda d: (0.0, 1.0)), ("wrong", lambda d: (2.0, 1.0))]
    monkeypatch.setattr(gpu_checks, "checks", lambda size: iter([*checks, ("broken", broken)]))
    nothing = dict.fromkeys(("l1", "gradient", "power", "sinkhorn", "tolerance", "assignment"), ())
    nothing["batch"] = ((), 1, 1, 1)
    monkeypatch.setitem(gpu.SIZES, "tiny", gpu.SIZES["tiny"] | nothing | {"model": (1, 3)})
    assert gpu.run(tmp_path, peers=False) == 1
    found = {row["case"]: row for row in read(tmp_path / "gpu.jsonl") if row["section"] == "check"}
    assert "failed" not in found["right"]
    assert found["wrong"]["failed"] == "error 2.00e+00, accepted 1e+00"
    assert found["broken"]["failed"] == "RuntimeError: no such kernel"
    model = [row for row in read(tmp_path / "gpu.jsonl") if row["section"] == "model"]
    assert all("TypeError" in row["failed"] for row in model)  # and the summary was written still
    assert (tmp_path / "gpu.md").exists()


def test_solves_to_a_tolerance_are_checked_and_the_missing_named(monkeypatch):
    """Someone who stops too early is a row with the error that was reached."""
    shape, clock = (2, 9, 7), gpu_times.Clock(torch.device("cpu"))

    def early(cost, reg):
        potentials = torch.full((2, 9), -2.0), torch.full((2, 7), -2.0)
        return lambda tol: tolerance._from_potentials(cost, reg, 1, *potentials)

    def absent(cost, reg):
        return need("no_such_module", "no-such-package")

    monkeypatch.setattr(tolerance, "PEERS", {"OTT-JAX, jit": early, "mdot-tnt": absent})
    rows = {row["name"]: row for row in tolerance.rows(shape, 3.0, 1e-4, clock, peers=True)}
    assert rows["dotresize exact"]["reached"]
    assert rows["dotresize exact"]["error"] <= 1e-4
    assert not rows["OTT-JAX, jit"]["reached"]
    assert rows["OTT-JAX, jit"]["error"] > 0.1
    assert rows["mdot-tnt"] == {
        "name": "mdot-tnt",
        "missing": "not installed: pip install no-such-package",
    }
    found = [row | {"section": "tolerance", "case": "c"} for row in rows.values()]
    assert ", not reached |" in "\n".join(tolerance_table(found))


def test_narrowed_models_are_shown_where_the_dense_one_failed():
    """A model too large for the device leaves the others their rates, without a ratio."""
    served = {"way": "eager", "batch": 1, "width": 8, "inner": 9, "parameters": 10**6}
    rates = {"read_per_s": 50.0, "written_per_s": 20.0, "peak_bytes": None}
    failed = served | {"name": "dense", "failed": "OutOfMemoryError"}
    narrow = served | {"name": "narrow"} | rates
    assert "| 50 |  | 20 |  |" in serving_table([failed, narrow])[-1]
    dense = served | {"name": "dense", "read_per_s": 25.0, "written_per_s": 40.0}
    dense["peak_bytes"] = None
    assert "| 50 | 2.00 | 20 | 0.50 |" in serving_table([dense, narrow])[-1]


def test_both_counts_of_a_timing_differ_in_whole_graphs(monkeypatch):
    """What is left of their difference is graphs alone, not a capture or single launches."""
    replayed, alone = [], []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    monkeypatch.setattr(cuda_graph.Steps, "_captured", lambda steps: graph)
    monkeypatch.setattr(cuda_graph.Steps, "_stopped", lambda steps, looks, running: False)
    for shape, counts in gpu.SIZES["full"]["sinkhorn"]:
        kept = cuda_graph.Steps(alone.append, SimpleNamespace(is_cuda=True))
        kept.run(40, -1)  # captures
        for fresh in (False, True):
            single = []
            for count in counts:
                replayed.clear()
                alone.clear()
                new = cuda_graph.Steps(alone.append, SimpleNamespace(is_cuda=True))
                (new if fresh else kept).run(count + 1, -1)  # and the sweep that looks at it
                assert len(alone) + cuda_graph.IN_GRAPH * len(replayed) == count + 1
                assert replayed
                single.append(len(alone))
            assert single == [2, 2], (shape, counts)


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
