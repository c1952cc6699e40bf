"""tests/native_check.cpp, compiled and run here as it would be on a machine without Python."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The check linked with every level, compiled with setup.py's own flags."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    helpers = types.ModuleType("pybind11.setup_helpers")  # needed by a build only
    helpers.build_ext = build_ext
    helpers.Pybind11Extension = lambda *args, **options: None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setitem(sys.modules, "pybind11", types.ModuleType("pybind11"))
        patch.setitem(sys.modules, "pybind11.setup_helpers", helpers)
        patch.setattr(setuptools, "setup", lambda **_: None)
        setup = runpy.run_path("setup.py")
    levels = setup["X86_LEVELS"] if setup["IS_X86"] else {}
    folder = tmp_path_factory.mktemp("native")
    compile_ = ["g++", "-std=c++17", "-O2", "-fno-math-errno", "-Icsrc", "-Wno-unknown-pragmas"]
    objects = []
    for source in sorted(ROOT.glob("csrc/*.cpp")):
        if source.name != "module.cpp":
            objects.append(str(folder / f"{source.stem}.o"))
            flags = levels.get(f"csrc/{source.name}", [])
            command = [*compile_, *flags, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True, cwd=ROOT)
    link = [*compile_, "tests/native_check.cpp", *objects, "-o", str(folder / "check"), "-pthread"]
    subprocess.run(link, check=True, cwd=ROOT)
    return folder / "check"


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_level(program, level):
    environment = os.environ | {"DOTRESIZE_SIMD": level}
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment)
    if "this machine runs" in done.stderr and level != "portable":
        pytest.skip(f"this {platform.machine()} has no {level}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"level {level}\n")
    assert done.stdout.count("accepted") > 30
