"""Every script in examples/ runs, passes its own comparison, and stays short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
HELPERS = ("small_network.py", "tiny_llama.py")
# What a script imports from a folder of its own, which ``make test`` installs.
APART = {"llm_compressor_width.py": Path(sys.prefix) / "llm-compressor"}
# Python puts a script's own folder first on the path, in the place of the current one.
RUN = "import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2], None, '__main__')"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short_and_its_comparison_holds(path, run_python):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    if path.name not in HELPERS:
        apart = APART.get(path.name)
        if apart and not apart.is_dir():
            pytest.skip(f"{apart} is not there: see the Makefile")
        environment = {"PYTHONPATH": str(apart)} if apart else {}
        done = run_python(RUN, str(FOLDER), str(path), **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout
