"""Ahead-of-time compilation of the Triton kernels; see aot_compile.py."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="triton is for Linux")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    import os
    import subprocess
    import sys

    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A cache of its own: the result must come from this compiler, not from an earlier one.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(here / "aot_compile.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_configuration_compiles_without_spills(rows):
    assert len({row["kernel"] for row in rows}) >= 30
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["spilled"]] == []
    assert all(0 < row["registers"] <= 256 for row in rows)
