"""A pytest plugin: which of a peer's tests reach a function of this package, and how they end.

Given to pytest by ``peers.run``, beside a plugin that puts this package's functions in the place of
the peer's. Every test that calls a function wrapped by ``counted`` becomes a JSON line in the file
that PEER_TESTS_OUT names.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_LENGTH = 400  # of a failure's text, without its line ends
_notes: dict[str, dict[str, float]] = {}


def notes() -> dict[str, float]:
    """Return what is noted of the running test, to be added to; it counts as reached from then."""
    return _notes.setdefault(os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0], {})


def counted(function: Callable, **fixed: Any) -> Callable:
    """Return the function with some arguments given; a test that calls it is counted."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        notes()
        return function(*args, **fixed, **kwargs)

    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[Any]:
    report = yield
    if call.when == "call" and item.nodeid in _notes:
        why = "" if call.excinfo is None else " ".join(call.excinfo.exconly().split())
        line = {"test": item.nodeid, "outcome": report.outcome, "why": why[:_LENGTH]}
        with open(os.environ["PEER_TESTS_OUT"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line | _notes[item.nodeid]) + "\n")
    return report
