"""The wheel, where there is nothing else of this project: no sources, and no compiler."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import dotresize

ROOT = Path(__file__).parent.parent

SOLVE = """
import shutil, torch, dotresize
assert shutil.which("g++") is None and shutil.which("cc") is None
assert "site-packages" in dotresize.__file__, dotresize.__file__
result = dotresize.sinkhorn(torch.rand(40, 30), 0.1, backend="cpp")
assert result.converged
print(dotresize.__version__, dotresize.backends()["cpp"]["simd"], float(result.plan.sum()))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("dotresize-*.whl"))
    assert len(found) == 1, "make wheel"
    return found[0]


def test_an_empty_environment_solves_a_problem(wheel, tmp_path):
    """Of the tests' environment it sees what the wheel depends on, and no other dotresize."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    site = next((tmp_path / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # A plain path, whose own .pth files are not read: one of them is the editable install.
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done = subprocess.run(
        [tmp_path / "bin" / "python", "-c", SOLVE],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{dotresize.__version__} ")


def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dotresize/py.typed" in names
    assert "dotresize/kernels/l1_cost.py" in names
    assert "dotresize/benchmarks/command.py" in names
    assert not [name for name in names if name.startswith(("kernels/", "benchmarks/", "tests/"))]
    folders = {name.split("/")[2] for name in names if name.startswith("dotresize/benchmarks/")}
    assert not {"gpu", "studies", "checks", "tables", "demo", "results"} & folders
