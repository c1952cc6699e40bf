"""Names of what a run leaves beside its output; nothing is imported for them."""

from __future__ import annotations

from pathlib import Path

# What follows an output's name in that of the folder with its finished stages.
PARTIAL = ".partial"


def partial_folder(out: str) -> Path:
    """Return the folder beside an output directory, whatever slashes its name ends in."""
    path = Path(out)
    return path.with_name(f"{path.name}{PARTIAL}")
