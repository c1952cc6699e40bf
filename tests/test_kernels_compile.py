"""Ahead-of-time compilation of the Triton kernels, and their machine code; see aot_compile.py.

``make test`` also installs the oldest supported triton, into a folder of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="triton is for Linux")

OLDEST = Path(sys.prefix) / "triton-3.6"
# Bytes of shared memory that one program can have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


# All four targets with both versions take a quarter of an hour: set AOT_TARGETS for a new kernel.
# Otherwise each version compiles one half: every case of two targets, or what launchers ask for.
USUAL = "sm_90,gfx942"


@pytest.fixture(scope="module", params=["installed", "oldest"])
def script(request, tmp_path_factory):
    """Runs a script of this folder with one triton or the other; what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if request.param == "oldest":
        if not OLDEST.is_dir():
            pytest.skip(f"pip install --no-deps --target {OLDEST} triton==3.6.0")
        environment["PYTHONPATH"] = str(OLDEST)
    everything = "AOT_TARGETS" in environment
    environment.setdefault("AOT_TARGETS", USUAL)
    # A cache of its own: the result must come from this compiler, not from an earlier one.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def run(name: str) -> str:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / name)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.version, run.targets = request.param, set(environment["AOT_TARGETS"].split(","))
    run.everything = everything
    return run


@pytest.fixture(scope="module")
def rows(script):
    if script.version == "oldest" and not script.everything:
        pytest.skip("set AOT_TARGETS to compile every case with this version, too")
    found = [json.loads(line) for line in script("aot_compile.py").splitlines()]
    if script.version == "oldest":
        assert {row["triton"] for row in found} == {"3.6.0"}
    return found


def test_what_the_launchers_ask_for_compiles(script):
    if script.version == "installed" and not script.everything:
        pytest.skip("set AOT_TARGETS to compile these with this version, too")
    names = (
        "begin",
        "finish",
        "l1_backward",
        "l1_cost",
        "minima",
        "quantize",
        "ranges",
        "resident",
    )
    names += ("sinkhorn_column", "sinkhorn_sweep", "start", "store_linear")
    assert script("compile_launches.py").split() == [f"{name}_kernel" for name in names]


def test_every_configuration_compiles_without_spills(script, rows):
    assert len({row["kernel"] for row in rows}) >= 34
    assert {row["target"] for row in rows} == script.targets
    assert [row for row in rows if "error" in row] == []
    # A few loads in a loop of hundreds of instructions do not show; on AMD, registers in all.
    spilled = [r for r in rows if r["spilled"] > 0.03 * sum(r.get("loop", {}).values())]
    assert spilled == []
    assert all(0 < row["registers"] <= 512 for row in rows)
    assert [row for row in rows if row["shared"] > SHARED[row["target"]]] == []


def count(row: dict, *prefixes: str) -> int:
    return sum(number for name, number in row["loop"].items() if name.startswith(prefixes))


def of(rows: list[dict], kernel: str, *targets: str) -> list[dict]:
    found = [r for r in rows if r["kernel"].startswith(kernel) and r["target"] in targets]
    assert found
    return found


def test_l1_takes_two_additions_a_pair_and_reads_16_bytes(rows):
    for row in of(rows, "l1_cost/float32/64x128", "sm_80", "sm_90"):
        assert count(row, "FADD") == 2 * row["elements"], row
        assert sum(row["loop"].values()) <= 2.2 * row["elements"], row
        # Of 8 neurons on each side, two loads of four; what comes from memory waits in no register.
        tokens = row["elements"] // 64
        assert count(row, "LDS.128") == 4 * tokens, row
        assert count(row, "LDGSTS.E.BYPASS.128") == 3, row
        assert count(row, "LDG.") == 0, row
    for row in rows:
        if row["target"] != "sm_100" or not row["kernel"].startswith("l1_cost/float32/64x128"):
            continue
        # Additions in pairs.
        assert 2 * count(row, "FADD2") + row["loop"].get("FADD", 0) == 2 * row["elements"], row


def test_l1_of_bytes_takes_one_instruction_for_four_tokens(script, rows):
    """At half the rate of others: what else there is goes out beside it."""
    for row in of(rows, "l1_cost/bytes/64x128", "sm_80", "sm_90", "sm_100"):
        assert row["loop"]["VABSDIFF4.U8.ACC"] == row["elements"], row
        share = 0.84 if row["target"] == "sm_80" else 0.85
        assert sum(row["loop"].values()) <= row["elements"] / share, row
        assert count(row, "LDL", "STL", "LDG.") == 0, row
    if "gfx942" in script.targets:
        assert all(row["sad"] > 0 for row in of(rows, "l1_cost/bytes/64x128", "gfx942"))


def test_l1_keeps_totals_out_of_memory(rows):
    for row in of(rows, "l1_cost/float32", "sm_80", "sm_90", "sm_100"):
        assert row["loads"] == 0 or row["kernel"].endswith("/more"), row


def test_the_gradient_of_l1_reaches_four_fifths_of_its_bound(rows):
    """A difference, its step and the sum: three instructions; nothing is read from memory."""
    for row in of(rows, "l1_backward/64x64", "sm_80", "sm_90", "sm_100"):
        if row["kernel"].endswith("/1"):
            continue
        assert count(row, "FFMA.SAT") == row["elements"], row
        assert sum(row["loop"].values()) <= 3 * row["elements"] / 0.8, row
        assert count(row, "LDS.128") == 3 * row["elements"] // 32, row
        assert count(row, "LDG.") == 0, row


def test_packed_l1_takes_one_instruction_a_pair(rows):
    for row in of(rows, "l1_cost/packed/64x128", "sm_80", "sm_90", "sm_100"):
        sums = row["loop"]["HADD2.F32"]  # what ends a chunk
        # The first token of a chunk is not added to anything.
        assert count(row, "HADD2", "HFMA2") - sums == row["elements"] - 32, row
        assert sum(row["loop"].values()) <= 1.2 * row["elements"], row
        assert count(row, "LDS.128") == row["elements"] // 64 * 2, row


def test_a_kept_plan_takes_few_instructions_an_entry(rows):
    """Loads of 16 bytes, conversions and two multiply-adds, and little else beside memory's time.

    Where rows are short, their sums across threads weigh more.
    """
    launched = of(rows, "sinkhorn_sweep/fp32", "sm_80", "sm_90", "sm_100")
    launched = [r for r in launched if r["kept_elements"]]
    assert len(launched) >= 8
    for row in launched:
        most = 6.5 if "/11469/" in row["kernel"] else 12.5
        loop = row["kept"][0]
        assert sum(loop.values()) <= most * row["kept_elements"], row
        assert loop["LDG.E.128"] == row["kept_elements"] // 8, row
        assert loop["HADD2.F32"] == row["kept_elements"], row
    resident = of(rows, "resident/", "sm_80", "sm_90", "sm_100")
    resident = [r for r in resident if "/kept/" in r["kernel"]]
    assert {r["kernel"].split("/")[1] for r in resident} >= {"64x576x464", "1x4096x3072"}
    for row in resident:
        loop = row["kept"][-1]
        assert sum(loop.values()) <= 7.5 * row["kept_elements"], row
        assert loop["LDS.128"] == row["kept_elements"] // 8, row
        assert sum(n for name, n in loop.items() if name.startswith("LDG")) <= 8, row


def test_minima_read_a_cost_once(rows):
    """And take a third of the time that its bytes take: 30 instructions an entry would take it."""
    held = [r for r in of(rows, "minima/fp32", "sm_90") if "streamed" not in r["kernel"]]
    for row in held:
        assert count(row, "LDG.E.128") == row["elements"] // 4, row
        if row["kernel"].endswith("/11469"):
            assert sum(row["loop"].values()) <= 10 * row["elements"], row


def test_sinkhorn_takes_one_exponential_an_entry_and_reads_16_bytes(rows):
    resident = [
        row
        for row in of(rows, "sinkhorn_sweep/fp32", "sm_80", "sm_90", "sm_100")
        if "streamed" not in row["kernel"]
    ]
    assert len(resident) >= 8
    for row in resident:
        # Twice that as written: the second half is for rows that have drifted too far.
        exponentials = count(row, "MUFU.EX2")
        assert 2 * row["elements"] < exponentials <= 2.3 * row["elements"], row
        size = 2 if row["kernel"].endswith("u16") else 4
        reads = 2 * row["elements"] * size // 16
        assert count(row, "LDG.E.128") == reads, row
