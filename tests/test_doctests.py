"""Examples in public docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import dotresize
from dotresize import ot

PUBLIC = {
    **{name: getattr(dotresize, name) for name in dotresize.__all__ if name != "ot"},
    **{f"ot.{name}": getattr(ot, name) for name in ("sinkhorn", "sinkhorn2", "solve_batch")},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, one_thread):
    value = PUBLIC[name]
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(value, name, module=inspect.getmodule(value), globs={})
    assert sum(len(test.examples) for test in tests) > 0, f"{name} has no example"
    if name == "recover":
        pytest.importorskip("accelerate")
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
