"""The code that a row was measured on: the commit, and a digest of the sources it rests on.

A digest says whether a table describes today's code, also where there is no history to ask. It
leaves comments, docstrings and empty lines out, which change no figure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import os
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the figures of a table rest on.
AREAS: dict[str, tuple[str, ...]] = {
    "cpu": ("csrc", "dotresize/ops"),
    "ot": ("csrc", "dotresize/ops", "dotresize/ot"),
    "gpu": ("kernels", "dotresize/ops"),
    "compressor": (
        "dotresize/calibration",
        "dotresize/narrow",
        "dotresize/baselines",
        "dotresize/merging",
        "dotresize/models",
        "dotresize/offload",
        "dotresize/ops",
        "csrc",
        "dotresize/compression.py",
        "dotresize/evaluate.py",
        "dotresize/least_squares.py",
        "dotresize/recovery.py",
    ),
}


AREAS["field"] = (
    *AREAS["compressor"],
    *("benchmarks/studies/peers", "benchmarks/studies/field.py", "benchmarks/studies/choice.py"),
)


def measured_code(commit: str | None = None) -> dict[str, object]:
    """Return what a row says of the code: its commit, and the digest of each area.

    Both are None for an installed package, which has no sources beside it. ``commit`` is what to
    say where git knows none: the sources may have come without their history.
    """
    if not (ROOT / "csrc").is_dir():
        return {"commit": None, "code": None}
    return {"commit": _commit() or commit, "code": {area: digest(area) for area in AREAS}}


def digest(area: str) -> str:
    """Return twelve digits of the SHA-256 of an area's sources."""
    total = hashlib.sha256()
    for name in AREAS[area]:
        place = ROOT / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp"):
                total.update(f"{path.relative_to(ROOT)}\n".encode())
                total.update(_essence(path).encode())
    return total.hexdigest()[:12]


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT)]
    # A repository that holds these sources in one of its folders knows another commit.
    run = functools.partial(
        subprocess.run,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        head = run([*git, "rev-parse", "--short=7", "HEAD"])
        # Rows that are being appended do not change what they measure.
        clean = run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"])
    except OSError:
        return None
    commit = head.stdout.strip()
    return (commit if clean.returncode == 0 else f"{commit}-dirty") if commit else None


def _essence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return "".join(re.sub(r"//[^\n]*", "", text).split())
    lines = text.splitlines()
    # Lines are what all versions of Python agree about; tokens of f-strings are not.
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
