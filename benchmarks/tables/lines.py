"""What the tables of models are made of: their lines, and figures as they are shown."""

from __future__ import annotations

from typing import Any

from ..demo.texts import SOURCES

Row = dict[str, Any]


def head(names: list[str]) -> list[str]:
    """Return the heading of a table, and the rule below it."""
    return [line(names), "|---" * len(names) + "|"]


def line(cells: list[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def span(widths: list[int]) -> str:
    """Return one width, or the narrowest and the widest of several."""
    least, most = min(widths), max(widths)
    return str(most) if least == most else f"{least} to {most}"


def average(row: Row) -> float:
    """Return a row's mean excess over the texts."""
    return sum(row["excess"][text] for text in SOURCES) / len(SOURCES)
