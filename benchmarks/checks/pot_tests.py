"""``python -m benchmarks.checks.pot_tests``: POT's own tests of Sinkhorn, run on ``dotresize.ot``.

pip fetches the source distribution of the POT that is installed, into a temporary folder. Its tests
run with ``pot_plugin``, which puts ``dotresize.ot`` in the place of POT's solvers wherever POT
itself or a test calls them, with NumPy and torch; those that reach it are counted. POT does not
distribute its tests of ``ot.batch``: ``--source FOLDER``, a checkout, runs them as well. Fails if
a test fails that is not listed in EXPECTED, or if one passes that is. With ``--out FILE`` a JSON
line is appended.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ..rows import append, where

FILES = (
    *("test_bregman.py", "test_solvers.py", "test_da.py", "test_optim.py", "test_smooth.py"),
    *("test_stochastic.py", "test_factored.py", "test_coot.py"),
    "batch/test_solve_batch.py",
)
# Of these none or few reach Sinkhorn, and they take minutes.
LEFT_OUT = {
    "bary_2d": "convolutional barycentres have iterations of their own",
    "test_barycenter": "barycentres have iterations of their own",
    "gromov": "Gromov solvers reach Sinkhorn inside their own loops only",
}
# Patterns of test ids that must fail, with the reason.
EXPECTED = {
    "*::test_nan_warning[[]*]": "reg = 0: refused here, where POT divides by it and warns",
    "*test_solve_batch_vs_solve[[]*-auto-None]": "reg is None: exact transport is refused",
    "*test_solve_batch_vs_solve[[]*-auto-0]": "reg = 0: exact transport is refused",
    "*test_solve_batch_vs_solve[[]*-proximal-None]": "reg is None: exact transport is refused",
    "*test_solve_batch_vs_solve[[]*-proximal-0]": "reg = 0: exact transport is refused",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="an unpacked POT, not a download")
    parser.add_argument("--out", type=Path, help="a JSON line is appended to this file")
    arguments = parser.parse_args()
    version = importlib.metadata.version("POT")
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.source or download(version, Path(folder))
        results = run(source.resolve() / "test", Path(folder) / "results.jsonl")
    wrong = show(results)
    if arguments.out is not None:
        outcomes = collections.Counter(result["outcome"] for result in results)
        row = {"tests": "POT", "passed": outcomes["passed"], "failed": outcomes["failed"]}
        row |= {"wrong": wrong, "expected": EXPECTED, "left_out": LEFT_OUT}
        append(arguments.out, [where(threads=1) | row])
    return 1 if wrong or not results else 0


def download(version: str, folder: Path) -> Path:
    """Download and unpack a source distribution; pip builds its metadata without a compiler."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "POT", "--dest", str(folder), f"POT=={version}"]
    subprocess.run(command, check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if (path / "test").is_dir())


def run(tests: Path, results: Path) -> list[dict[str, Any]]:
    """Return one entry per test that reached ``dotresize.ot``."""
    files = [name for name in FILES if (tests / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests)]
    command += ["-p", "dotresize.benchmarks.checks.pot_plugin", "-p", "no:cacheprovider", "--tb=no"]
    command += ["-W", "ignore", "-k", " and ".join(f"not {name}" for name in LEFT_OUT), *files]
    # One thread: the problems are so small that several only wait for one another.
    settings = {"POT_TESTS_OUT": str(results), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tests, env=os.environ | settings)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {ended.returncode}: its message is above")
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def show(results: list[dict[str, Any]]) -> list[str]:
    """Print the table and return the tests that did not end as they should."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter = collections.Counter()
    wrong = []
    for result in results:
        test = result["test"]
        reason = next((EXPECTED[p] for p in EXPECTED if fnmatch.fnmatchcase(test, p)), None)
        counts[test.split("::")[0]][result["outcome"]] += 1
        if reason is not None and result["outcome"] == "failed":
            reasons[reason] += 1
        elif result["outcome"] == "failed" or (reason is not None):
            wrong.append(f"{test}: {result['outcome']} {result['why']}")
    print(f"\n{'POT tests that reach dotresize.ot':36} passed  failed")
    for name, outcomes in counts.items():
        print(f"{name:36} {outcomes['passed']:6}  {outcomes['failed']:6}")
    for reason, count in reasons.items():
        print(f"expected to fail, {count}: {reason}")
    for name, reason in LEFT_OUT.items():
        print(f"left out, *{name}*: {reason}")
    for line in wrong:
        print(f"WRONG {line}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
