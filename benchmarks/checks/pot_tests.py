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
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

from ..rows import append, where
from .peers import Expected, download, reasons, run, wrong

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
EXPECTED = [
    Expected(
        "*::test_nan_warning[[]*]", "reg = 0: refused here, where POT divides by it and warns"
    ),
    Expected(
        "*test_solve_batch_vs_solve[[]*-auto-None]", "reg is None: exact transport is refused"
    ),
    Expected("*test_solve_batch_vs_solve[[]*-auto-0]", "reg = 0: exact transport is refused"),
    Expected(
        "*test_solve_batch_vs_solve[[]*-proximal-None]", "reg is None: exact transport is refused"
    ),
    Expected("*test_solve_batch_vs_solve[[]*-proximal-0]", "reg = 0: exact transport is refused"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="an unpacked POT, not a download")
    parser.add_argument("--out", type=Path, help="a JSON line is appended to this file")
    arguments = parser.parse_args()
    version = importlib.metadata.version("POT")
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.source or download("POT", version, Path(folder))
        tests = source.resolve() / "test"
        files = [name for name in FILES if (tests / name).exists()]
        results = run(tests, files, "pot_plugin", Path(folder) / "results.jsonl", LEFT_OUT)
    unexpected = show(results)
    if arguments.out is not None:
        outcomes = collections.Counter(result["outcome"] for result in results)
        row = {"tests": "POT", "passed": outcomes["passed"], "failed": outcomes["failed"]}
        row |= {"wrong": unexpected, "expected": {entry.tests: entry.reason for entry in EXPECTED}}
        row |= {"left_out": LEFT_OUT}
        append(arguments.out, [where(threads=1) | row])
    return 1 if unexpected or not results else 0


def show(results: list[dict[str, Any]]) -> list[str]:
    """Print the table and return the tests that did not end as they should."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for result in results:
        counts[result["test"].split("::")[0]][result["outcome"]] += 1
    print(f"\n{'POT tests that reach dotresize.ot':36} passed  failed")
    for name, outcomes in counts.items():
        print(f"{name:36} {outcomes['passed']:6}  {outcomes['failed']:6}")
    for reason, count in reasons(results, EXPECTED).items():
        print(f"expected to fail, {count}: {reason}")
    for name, reason in LEFT_OUT.items():
        print(f"left out, *{name}*: {reason}")
    unexpected = wrong(results, EXPECTED)
    for line in unexpected:
        print(f"WRONG {line}")
    return unexpected


if __name__ == "__main__":
    raise SystemExit(main())
