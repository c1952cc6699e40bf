"""dotresize bench: what it checks before it times, what it reports, and the numbers it fits."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from dotresize.benchmarks import assignment, command, harness, l1, plot, scaling, sinkhorn
from dotresize.benchmarks.workload import Case, Competitor, NotHere, Workload, need
from dotresize.cli import main

L1 = Case("l1", {"tokens": 300, "n": 40, "m": 30})
SINKHORN = Case("sinkhorn", {"problems": 1, "n": 40, "m": 30, "iterations": 50})
NEURONS = Case("assignment", {"problems": 3, "n": 40, "m": 40}, "unrelated neurons")
BATCH = Case("sinkhorn", {"problems": 3, "n": 40, "m": 30, "iterations": 50})
# Compiling takes longer than everything else here; the others are in the test environment.
QUICK = ("torch.cdist", "scipy", "logsumexp loop", "POT", "dotresize", "mdot", "torch-linear")


@pytest.mark.parametrize(
    ("module", "case"),
    [(l1, L1), (sinkhorn, SINKHORN), (sinkhorn, BATCH), (assignment, NEURONS)],
    ids=str,
)
def test_competitors_are_right_and_the_missing_are_named(module, case, monkeypatch):
    # In Triton's interpreter; the finish is exact from any potentials.
    monkeypatch.setattr("dotresize.ops.assignment_launch.SINKHORN_ITERATIONS", 5)
    work = module.build(case)
    assert set(work.competitors) | set(work.missing) >= set(module.PEERS)
    assert not set(work.competitors) & set(work.missing)
    assert all(reason for reason in work.missing.values())
    ran = 0
    for name, competitor in work.competitors.items():
        quick = any(word in name for word in QUICK) and "compile" not in name
        if quick and competitor.checked:
            error = work.error(competitor.call())
            assert error <= competitor.accepted, name
            ran += 1
    assert ran >= (3 if module is assignment else 5)


def test_the_check_sees_a_wrong_result():
    for module, case in ((l1, L1), (sinkhorn, BATCH)):
        work = module.build(case, peers=False)
        right = torch.as_tensor(work.competitors[l1.OURS].call()).clone()
        assert work.error(right) < 1e-5
        right.view(-1)[-1] += 0.01 * right.norm()  # one entry, of the last problem
        assert work.error(right) > 1e-3


def odd_workload(case: Case, peers: bool) -> Workload:
    """Competitors that are right, wrong, slow, failing and absent; built in the worker."""

    def slow() -> float:
        time.sleep(2.5)
        return 0.0

    def absent() -> Competitor:
        return Competitor(need("no_such_module", "no-such-package").call)

    def failing() -> float:
        raise MemoryError("too much\nfor this machine")

    work = Workload(error=float)
    work.add("right", lambda: Competitor(lambda: 0.0))
    work.add("large", lambda: Competitor(lambda: 1e-6, temporaries=True))
    work.add("wrong", lambda: Competitor(lambda: 0.5))
    work.add("nan", lambda: Competitor(lambda: float("nan")))
    work.add("slow", lambda: Competitor(slow))
    work.add("failing", lambda: Competitor(failing))
    work.add("absent", absent)
    work.add("dies", lambda: Competitor(lambda: os._exit(9)))
    work.add("broken", lambda: 1 / 0)
    calls = []

    def fails_later() -> float:
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("later")
        return 0.0

    work.add("later", lambda: Competitor(fails_later))
    work.add("bound", lambda: Competitor(lambda: None, checked=False))
    return work


def test_only_what_is_right_and_fast_enough_is_timed():
    rows = harness.measure(L1, odd_workload, rounds=3, threads=1, limit_s=2.0)
    found = {(row["name"], row.get("allocator")): row for row in rows}
    timed = {key for key, row in found.items() if "median_s" in row}
    assert timed == {
        *(("right", "default"), ("large", "default"), ("large", "heap"), ("bound", "default"))
    }
    assert found["bound", "default"]["error"] is None
    assert found["dies", "default"]["failed"] == "its process died, code 9"
    assert found["later", "default"]["failed"] == "ValueError: later"
    assert found["broken", None]["missing"].startswith("cannot be prepared: ZeroDivisionError")
    assert all(found[key]["rounds"] == 3 for key in timed)
    assert "relative error 5.0e-01" in found["wrong", "default"]["failed"]
    assert "relative error nan" in found["nan", "default"]["failed"]
    assert found["failing", "default"]["failed"] == "MemoryError: too much"
    assert "not timed" in found["slow", "default"]["failed"]
    assert found["absent", None]["missing"] == "not installed: pip install no-such-package"
    text = command.table(L1, rows)
    for name, _ in found:
        assert name in text


def environment_workload(case: Case, peers: bool) -> Workload:
    heap = "MALLOC_MMAP_MAX_" in os.environ
    threads = torch.get_num_threads()
    work = Workload(error=lambda _: 0.0)
    for name in (f"heap={heap}", f"threads={threads}"):
        work.add(name, lambda: Competitor(lambda: None, temporaries=True))
    return work


def test_workers_differ_in_the_allocator_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    seen = {}
    for heap in harness.ALLOCATORS:
        worker = harness.Worker(environment_workload, {"case": L1, "peers": False}, 1, heap)
        seen[heap] = list(worker.competitors)
        worker.close()
    assert seen == {
        "default": ["heap=False", "threads=1"],
        "heap": ["heap=True", "threads=1"],
    }
    assert "MALLOC_MMAP_MAX_" not in os.environ


def test_command_line(monkeypatch, tmp_path, capsys):
    cases = (L1, NEURONS)
    monkeypatch.setattr(command, "_plan", lambda what, sizes: [([case], False) for case in cases])
    out, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    options = ["--rounds", "2", "--threads", "1", "--out", str(out), "--plot", str(chart)]
    assert main(["bench", "--quiet", *options]) == 0
    printed = capsys.readouterr().out
    assert L1.label in printed
    assert "Assignment, unrelated neurons, 3 of 40 x 40" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [row for row in rows if row["name"] == l1.OURS]
    assert {row["operator"] for row in ours} == {"l1", "assignment"}
    for row in ours:
        assert row["median_s"] > 0
        assert row["error"] < 1e-4
        assert row["threads"] == 1
        assert row["versions"]["torch"] == torch.__version__
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cdist"], "bench 'cdist': must be l1, gradient, sinkhorn, assignment or scaling"),
        (["--sizes", "huge"], "must be small or all"),
        (["--rounds", "1"], "must be at least 2"),
        (["--threads", "0"], "must be from 1 to"),
        (["--threads", "100000"], "must be from 1 to"),
        (["--limit", "nan"], "must be a positive number of seconds"),
        (["--out", "/no/such/folder/rows.jsonl"], "must be a file in a folder that exists"),
        (["--plot", "/tmp"], "must be a file in a folder that exists"),
        (["--plot", "chart.bmp"], "must end in .png, .svg or .pdf"),
    ],
)
def test_wrong_options(options, message, capsys):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_exponents_of_known_growth():
    rows = []
    for _, _, cases in scaling.sweeps():
        for case in cases:
            row = {"case": case.label, "operator": case.operator} | case.sizes
            seconds = 1e-9 * case.work ** (1.0 if case.operator == "l1" else 1.5)
            rows.append(row | {"name": "x", "allocator": "default", "median_s": seconds})
            rows.append(row | {"name": "x", "allocator": "heap", "median_s": 1.0})
    fits = scaling.fits(rows, "x")
    assert len(fits) == 10
    for fit in fits:
        expected = (1.0 if fit["operator"] == "l1" else 1.5) * (1 + (fit["size"] == "n and m"))
        assert fit["exponent"] == pytest.approx(expected)
    assert "tokens 512 to 8192" in command.exponents(fits)
    assert scaling.fits(rows, "nobody") == []


def test_plot_needs_matplotlib(monkeypatch, tmp_path):
    def nothing(module: str, install: str):
        raise NotHere("not installed: pip install matplotlib")

    monkeypatch.setattr(command, "need", nothing)
    assert main(["bench", "--plot", str(tmp_path / "a.png")]) == 2
    monkeypatch.setattr(plot, "need", nothing)
    with pytest.raises(NotHere):
        plot.chart([], tmp_path / "a.png")


def test_tile_alone_does_the_work_it_is_asked_for():
    from dotresize.ops.backends import cpp

    for pairs, threads in ((1, 1), (10**7, 1), (10**7, 2)):
        done = cpp().l1_tile_alone(pairs, threads)
        assert pairs <= done <= pairs + threads * 256 * 8 * 32
