"""What the package looks like from its imports: rooms, levels, arrows, circles, look-ups.

    python tests/structure.py [CHECKOUT]

prints the counts of this checkout, or of another one. Nothing is imported: the sources are read.
A room is a module or a package at the top of ``dotresize/`` (``kernels/`` is one of them, as it is
installed). An import inside a function, or under TYPE_CHECKING, is an import.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A room may import the rooms to its right; those with a comma between them do not know each other.
# A room in two chains may import what either allows. The package's own face, ``__init__.py``, may
# import all, and the command line alone imports the face.
DIRECTION = (
    "cli > checkpoint, compression, recovery > baselines > narrow > evaluate, merging"
    " > calibration > offload > accounting, least_squares > models, ops, distributed",
    "ot > ops > kernels > ops.constants",
)

COMPILED = "dotresize._cpp"
LOOK_UPS = ("architecture_of", "shelf_of", "resident")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of the package by their dotted names, without stubs and benchmarks."""
    found = {}
    for folder, package in (("dotresize", "dotresize"), ("kernels", "dotresize.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Return the modules of the package that one of them imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            base = node.module or ""
            within = {f"{base}.{alias.name}" for alias in node.names} - {COMPILED}
            found |= {full if full in known else base for full in within}
    return (found & known) - {name}


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return which modules each module imports."""
    files = modules(root)
    return {name: imports(name, path, set(files)) for name, path in files.items()}


def rooms(root: Path = ROOT) -> list[str]:
    """Return the modules and packages at the top of ``dotresize/``."""
    return sorted(
        path.stem
        for path in (root / "dotresize").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    )


def room_of(module: str) -> str:
    """Return the room of a module; the package's own face, ``dotresize``, is none of them.

    What the kernels share with the operators is a room of its own.
    """
    name = module.removeprefix("dotresize").removeprefix(".")
    return name if name == "ops.constants" else name.partition(".")[0]


def between_rooms(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        others = found.setdefault(room_of(name), set())
        others |= {room_of(target) for target in targets} - {room_of(name)}
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reach = {name: reached(arrows, name) for name in arrows}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in arrows
        if name in reach[name]
    }
    return sorted(map(list, groups))


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Return the modules that one of them imports, directly or through others."""
    seen: set[str] = set()
    left = [start]
    while left:
        for target in arrows.get(left.pop(), set()) - seen:
            seen.add(target)
            left.append(target)
    return seen


def levels(arrows: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports; modules of a circle count as one."""
    leader = {name: min([name, *group]) for group in circles(arrows) for name in group}
    merged: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        own = leader.get(name, name)
        merged.setdefault(own, set()).update(leader.get(t, t) for t in targets)
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((of(t) for t in merged[name] - {name}), default=0)
        return depth[name]

    return max(map(of, merged))


def against_the_direction(arrows: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield the imports that ``DIRECTION`` does not allow."""
    chains = [[step.split(", ") for step in chain.split(" > ")] for chain in DIRECTION]

    def place(room: str, chain: list[list[str]]) -> int | None:
        return next((i for i, step in enumerate(chain) if room in step), None)

    for name, targets in arrows.items():
        for target in targets:
            here, there = room_of(name), room_of(target)
            if here in ("", "__main__", there) or (here == "cli" and there == ""):
                continue
            places = [(place(here, chain), place(there, chain)) for chain in chains]
            if not any(a is not None and b is not None and a < b for a, b in places):
                yield name, target


def calls(name: str, root: Path = ROOT) -> int:
    """Return how often a function or method is called in ``dotresize/``."""
    texts = (path.read_text(encoding="utf-8") for path in (root / "dotresize").rglob("*.py"))
    trees = (ast.parse(text) for text in texts)
    called = (node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = (f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called)
    return sum(found == name for found in names)


def importers(library: str, root: Path = ROOT) -> list[str]:
    """Return the modules that import a library."""
    pattern = re.compile(rf"^\s*(?:import|from) {re.escape(library)}\b", re.MULTILINE)
    files = modules(root).items()
    return [name for name, path in files if pattern.search(path.read_text(encoding="utf-8"))]


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    arrows = graph(root)
    between = between_rooms(arrows)
    counts = {
        "modules and packages at the top": len(rooms(root)),
        "modules": len(arrows),
        "levels of imports, modules": levels(arrows),
        "levels of imports, rooms": levels(between),
        "arrows between modules": sum(map(len, arrows.values())),
        "arrows between rooms": sum(map(len, between.values())),
        "circles": len(circles(arrows)),
    }
    counts |= {f"calls of {name}": calls(name, root) for name in LOOK_UPS}
    for what, count in counts.items():
        sys.stdout.write(f"{what:34}{count:5}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
