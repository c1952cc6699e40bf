"""``python -m benchmarks.checks.peer_tests``: tests of SciPy, lapx and torch run on the solvers.

SciPy's tests are those that it installs; lapx's come from its last source distribution that has
them. They run with ``peer_plugin``, which puts this package's functions in the place of theirs;
tests that reach one are counted. torch distributes no tests, but the shapes that they use:
``cdist_cases`` runs those, and more like them. POT's tests have a command of their own,
``pot_tests``. Fails if a test fails that is not listed in PEERS, or if one passes that is. With
``--out FILE`` a JSON line is appended.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy

from ..rows import append, where
from .peers import Expected, download, reasons, run, wrong


class Peer(NamedTuple):
    """Test files of a peer that are run, and which of their tests fail on purpose."""

    name: str
    package: str
    version: str  # "" is the installed one's
    files: Sequence[str]
    expected: Sequence[Expected]


def _other_words(tests: str, message: str) -> Expected:
    reason = "ValueError in other words, which say what is wrong and where"
    return Expected(tests, reason, f"Regex pattern did not match.*{message}")


def _ties(tests: str, message: str) -> Expected:
    return Expected(tests, "equal costs: another assignment, as good", message)


def _infeasible(tests: str) -> Expected:
    reason = "no assignment without a forbidden pair: ValueError, where lapx returns inf"
    return Expected(tests, reason, "ValueError: score of problem 0: its forbidden pairs")


def _float32(tests: str) -> Expected:
    # Two roundings of the numbers, one of the difference, and those of a sum of few: 2.2 was the
    # most that was seen.
    reason = "results are float32 by contract; these are right to its rounding"
    return Expected(tests, reason, "Not equal to tolerance", roundings=4.0)


def _broadcast(tests: str) -> Expected:
    message = r"all but the last axis must be as in x|must be \(T, n\) or \(B, T, n\)"
    return Expected(tests, "one batch axis, the same in x and y: nothing is broadcast", message)


PEERS = [
    Peer(
        "SciPy, linear_sum_assignment",
        "scipy",
        "",
        ["scipy/optimize/tests/test_linear_assignment.py"],
        [
            _other_words("*_input_shape", r"score has shape \(3,\): must be"),
            Expected("*_input_bool", "boolean scores: refused", "score has dtype torch.bool"),
            _other_words("*_input_nan", "score of problem 0 is nan at row 0, column 0"),
            _other_words("*_input_neginf", "score of problem 0 is -inf at row 1, column 1"),
            _other_words("*_input_inf", "score of problem 0: its forbidden pairs"),
            _ties("*test_constant_cost_matrix", "Arrays are not equal"),
        ],
    ),
    Peer(
        "SciPy, cdist and pdist, L1",
        "scipy",
        "",
        ["scipy/spatial/tests/test_distance.py"],
        [
            *map(
                _float32,
                ("*dist_calling_conventions[[]cityblock]", "*::test_pdist_cityblock_random"),
            ),
            *map(_float32, ("*::test_?dist_minkowski_random*[[]1.0]", "*_cityblock_iris")),
            _float32("*::test_pdist_cityblock_random_float32"),
            Expected(
                "*dist_out[[]cityblock]",
                "out is float32, and the whole matrix",
                "out is torch.float64",
            ),
            Expected(
                "*test_Xdist_non_negative_weights[[]cityblock]",
                "weights: l1_cost has none",
                "unexpected keyword argument 'w'",
            ),
        ],
    ),
    Peer(
        "lapx, lapjv",
        "lapx",
        "0.5.12",  # later ones distribute no tests, or not their data
        ["test_lapjv.py", "test_arr_loop.py"],
        [
            Expected(
                "*::test_lapjv_cost_limit",
                "cost_limit: assignments are of all rows",
                "unexpected keyword argument 'cost_limit'",
            ),
            # An earlier line of the test has compared the sums.
            *(_ties(f"*::test_square[[]cost{i}-*", "all at .*array") for i in (4, 7, 9, 10)),
            *map(_infeasible, ("*::test_infs_unsolvable", "*::test_inf_col")),
            *map(_infeasible, ("*::test_inf_row", "*::test_all_inf")),
        ],
    ),
    Peer(
        "torch, cdist, p = 1",
        "torch",
        "",
        ["cdist_cases.py"],
        [
            *map(_broadcast, ("*::test_sample[[]0x4x5-3x5]", "*::test_sample[[]4x5-0x3x5]")),
            *map(_broadcast, ("*::test_sample[[]0x4x5-1x3x5]", "*::test_sample[[]1x4x5-0x3x5]")),
            *map(_broadcast, ("*::test_sample[[]*x*x*x*-*", "*::test_sample[[]*-*x*x*x*")),
            _broadcast("*::test_broadcast[[]*"),
            Expected("*::test_no_features[[]*", "no tokens: refused", "x has no tokens"),
            Expected("*::test_double", "float64 activations: refused", "x has dtype torch.float64"),
            Expected(
                "*::test_not_finite[[]*",
                "activations that are not finite: refused",
                "activations x of problem 0, neuron 1 are not finite",
            ),
        ],
    ),
]
# Peers whose source distribution has no tests: looked for anew each time.
WITHOUT = [("OTT-JAX", "ott-jax", "0.6.0")]
LEFT_OUT = {"lapx, test_lapmod.py": "lapmod is for sparse costs"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON line is appended to this file")
    arguments = parser.parse_args()
    rows = []
    for peer in PEERS:
        with tempfile.TemporaryDirectory() as folder:
            tests = folder_of(peer, Path(folder))
            missing = [name for name in peer.files if not (tests / name).exists()]
            if missing:
                raise SystemExit(f"{peer.name}: {missing[0]} is not distributed")
            results = run(tests, peer.files, "peer_plugin", Path(folder) / "results.jsonl")
        rows.append(row_of(peer, results))
    for name, package, version in WITHOUT:
        with tempfile.TemporaryDirectory() as folder:
            source = download(package, version, Path(folder))
            found = [str(path.relative_to(source)) for path in source.rglob("test_*.py")]
        lines = [f"its distribution carries tests: {path}" for path in found]
        rows.append({"peer": name, "version": version, "wrong": lines})
    show(rows)
    if arguments.out is not None:
        append(arguments.out, [where(threads=1) | {"tests": "peers", "peers": rows}])
    return 1 if any(row["wrong"] for row in rows) else 0


def folder_of(peer: Peer, folder: Path) -> Path:
    """Return the folder that a peer's files lie in, if need be by a download into ``folder``."""
    if peer.package == "torch":
        return Path(__file__).parent
    if peer.package == "scipy":
        return Path(scipy.__file__).parent.parent
    # Under a name of its own: "lap" is what the tests import.
    source = download(peer.package, peer.version, folder)
    return Path(shutil.copytree(source / "lap" / "tests", folder / "lapx_tests"))


def row_of(peer: Peer, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of a peer's tests."""
    unexpected = wrong(results, peer.expected) if results else ["no test reached this package"]
    on_purpose = reasons(results, peer.expected)
    outcomes = collections.Counter(result["outcome"] for result in results)
    return {
        "peer": peer.name,
        "version": peer.version or importlib.metadata.version(peer.package),
        "passed": outcomes["passed"],
        "on_purpose": sum(on_purpose.values()),
        "failed": outcomes["failed"] - sum(on_purpose.values()),
        "reasons": on_purpose,
        "without_weights": sum("weights" in result for result in results),
        "wrong": unexpected,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'tests that reach dotresize':44} passed  on purpose  failed")
    for row in rows:
        name = f"{row['peer']} ({row['version']})"
        if "passed" in row:
            print(f"{name:44} {row['passed']:6}  {row['on_purpose']:10}  {row['failed']:6}")
        elif not row["wrong"]:
            print(f"{name:44} its distribution carries no tests")
    for row in rows:
        for reason, count in row.get("reasons", {}).items():
            print(f"fails on purpose, {row['peer']}, {count}: {reason}")
        if row.get("without_weights"):
            count = row["without_weights"]
            print(f"without their weighted part, {row['peer']}, {count}: l1_cost has no weights")
    for name, reason in LEFT_OUT.items():
        print(f"left out, {name}: {reason}")
    for row in rows:
        for line in row["wrong"]:
            print(f"WRONG {row['peer']}: {line}")


if __name__ == "__main__":
    raise SystemExit(main())
