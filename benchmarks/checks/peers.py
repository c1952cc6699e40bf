"""Peers' own tests on this package: fetched, run with a plugin, and held against what is expected.

``pot_tests`` and ``peer_tests`` are the commands.
"""

from __future__ import annotations

import collections
import fnmatch
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Expected(NamedTuple):
    """Tests that must fail, and why."""

    tests: str  # a pattern of their ids, as fnmatch takes
    reason: str
    message: str = ""  # a regular expression that is found in their failure
    roundings: float | None = None  # the largest error, which a plugin notes, that is no more

    def explains(self, result: dict[str, Any]) -> bool:
        """Return whether a result is a failure of the kind that is expected."""
        near = self.roundings is None or result.get("roundings", float("inf")) <= self.roundings
        found = re.search(self.message, result["why"]) is not None
        return result["outcome"] == "failed" and found and near


def download(package: str, version: str, folder: Path) -> Path:
    """Download and unpack a source distribution; pip builds its metadata without a compiler."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", package, "--dest", str(folder), f"{package}=={version}"]
    subprocess.run(command, check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run(
    tests: Path, files: Iterable[str], plugin: str, results: Path, left_out: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Return one entry per test that reached this package: its id, outcome, failure and notes."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests)]
    for name in ("reached", plugin):
        command += ["-p", f"dotresize.benchmarks.checks.{name}"]
    command += ["-p", "no:cacheprovider", "--tb=no", "-W", "ignore"]
    command += ["-k", " and ".join(f"not {name}" for name in left_out), *files]
    # One thread: the problems are so small that several only wait for one another.
    settings = {"PEER_TESTS_OUT": str(results), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tests, env=os.environ | settings)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {ended.returncode}: its message is above")
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def wrong(results: Iterable[dict[str, Any]], expected: Sequence[Expected]) -> list[str]:
    """Return a line for each test that did not end as it should."""
    return [
        f"{result['test']}: {result['outcome']} {result['why']}".strip()
        for result in results
        for entry in [_entry(result, expected)]
        if (result["outcome"] == "failed" if entry is None else not entry.explains(result))
    ]


def reasons(results: Iterable[dict[str, Any]], expected: Sequence[Expected]) -> dict[str, int]:
    """Return how many tests failed as they should for each reason."""
    entries = [(_entry(result, expected), result) for result in results]
    return collections.Counter(
        entry.reason for entry, result in entries if entry is not None and entry.explains(result)
    )


def _entry(result: dict[str, Any], expected: Sequence[Expected]) -> Expected | None:
    """Return the first entry that names a test, or None."""
    matches = (entry for entry in expected if fnmatch.fnmatchcase(result["test"], entry.tests))
    return next(matches, None)
