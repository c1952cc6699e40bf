"""A pytest plugin: POT's own tests call ``dotresize.ot`` where they mean POT's solvers.

Given to pytest by ``benchmarks/checks/pot_tests.py``, which says what is run, beside ``reached``,
which notes every test that reaches a function of ``dotresize.ot``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import ot
import ot.batch
import pytest

import dotresize.ot

from .reached import counted

METHODS = {
    "sinkhorn_knopp": "sinkhorn",
    "sinkhorn_log": "sinkhorn_log",
    "sinkhorn_stabilized": "sinkhorn_stabilized",
    "sinkhorn_epsilon_scaling": "sinkhorn_epsilon_scaling",
    "greenkhorn": "greenkhorn",
}


def _substitute() -> None:
    """Replace a function in every module of POT, whatever name it has there."""
    ours = dotresize.ot
    new = {
        ot.bregman.sinkhorn: counted(ours.sinkhorn),
        ot.bregman.sinkhorn2: counted(ours.sinkhorn2),
        ot.batch.solve_batch: counted(ours.solve_batch),
    }
    for name, method in METHODS.items():
        new[getattr(ot.bregman, name)] = counted(ours.sinkhorn, method=method)
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "ot"]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in new:
                setattr(module, name, new[value])


def _skip_arg(names: Any, values: Any, reason: str = "", getter: Any = None) -> Callable:
    """Skip backends that POT's tests mark; its own conftest is not distributed."""
    names, values = ((x,) if isinstance(x, str) else x for x in (names, values))

    def mark(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            if all(str(kwargs.get(n)) == v for n, v in zip(names, values, strict=True)):
                pytest.skip(reason)
            return test(*args, **kwargs)

        return run

    return mark


@pytest.fixture(params=["numpy", "torch"])
def nx(request: pytest.FixtureRequest) -> Any:
    backend = {"numpy": ot.backend.NumpyBackend, "torch": ot.backend.TorchBackend}
    return backend[request.param]()


def pytest_configure(config: pytest.Config) -> None:
    for found in pkgutil.walk_packages(ot.__path__, "ot."):
        if found.name.count(".") == 1 and found.name not in ("ot.dr", "ot.plot", "ot.gnn"):
            importlib.import_module(found.name)
    _substitute()
    pytest.skip_arg = _skip_arg  # type: ignore[attr-defined]
    pytest.skip_backend = functools.partial(_skip_arg, "nx")  # type: ignore[attr-defined]
