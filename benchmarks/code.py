"""Which code a row was measured on: the commit, and a digest of the sources it rests on.

A digest says whether a table describes today's code, also where there is no history to ask. It
leaves comments, docstrings and layout out, which change no figure.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the figures of a table rest on.
AREAS = {
    "cpu": ("csrc", "dotresize/ops"),
    "gpu": ("kernels", "dotresize/ops"),
    "compressor": (
        "dotresize/calibration",
        "dotresize/narrow",
        "dotresize/baselines",
        "dotresize/merging",
        "dotresize/models",
    ),
}


def measured_code() -> dict[str, object]:
    """Return what a row says of the code: its commit, and the digest of each area.

    Both are None for an installed package, which has no sources beside it.
    """
    if not (ROOT / "csrc").is_dir():
        return {"commit": None, "code": None}
    return {"commit": _commit(), "code": {area: digest(area) for area in AREAS}}


def digest(area: str) -> str:
    """Return twelve digits of the SHA-256 of an area's sources."""
    total = hashlib.sha256()
    for folder in AREAS[area]:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp"):
                total.update(f"{path.relative_to(ROOT)}\n".encode())
                total.update(_essence(path).encode())
    return total.hexdigest()[:12]


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _essence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return "".join(re.sub(r"//[^\n]*", "", text).split())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    lines = {
        line
        for node in nodes
        if ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return " ".join(
        token.string for token in tokens if token.type not in layout and token.start[0] not in lines
    )
