"""What a run says about itself: the table on the terminal, dotresize.json and the model card."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from dotresize import distributed
from dotresize.accounting import STAGES

# What a report says of a model's predictions: by text, and of the text that it writes.
FIGURES = ("perplexity", "kl", "agreement", "generated")
_LABELS = {"dot": "transport", "pca": "PCA", "slicegpt": "SliceGPT"}
# Times the dense perplexity at which a result is warned of. SmolLM2-135M at 80 % of its parameters
# is at 1.7 (docs/compress.md); with ten of its 30 feed-forwards merged at 12 (docs/merge-ff.md).
_BROKEN = 3.0


def say(text: str) -> None:
    """Write a text once, however many processes there are; OSError where nobody can read it."""
    if distributed.rank():
        return
    try:
        if sys.stdout is None:  # Python's way to say that it was closed from the beginning
            raise BrokenPipeError
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except UnicodeError:
        raise
    except (BrokenPipeError, ValueError):
        sys.stdout = None  # nothing more is tried at exit
        raise OSError("standard output is closed") from None


def label(report: dict[str, Any]) -> str:
    """Return a column's heading: the method, and whether its weights were refitted."""
    name = _LABELS.get(report["method"], report["method"])
    width, inner = report.get("width", {}), report.get("feed_forward", {})
    if inner.get("method") and width["new"] == width["old"]:
        name = f"feed-forward, {inner['method']}"
    elif report.get("layers", {}).get("dropped") and width["new"] == width["old"]:
        name = "fewer layers"
    after = [stage for stage in ("refit", "recovery") if report.get(stage)]
    return " + ".join([name, *after])


def cells(reports: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows of a comparison: a name, and one cell for each report.

    Reports of merged models have no widths, and their parameters have one count.
    """
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        rows.append((name, [value(report) for report in reports]))

    widths = all("width" in report for report in reports)
    if widths:
        add("width", lambda r: str(r["width"]["new"]))
        add("feed-forward width", inner_width)
        if len({report["layers"]["new"] for report in reports}) > 1:
            add("layers", lambda r: str(r["layers"]["new"]))
    add("parameters, total", lambda r: millions(r["parameters"]["narrow"]["total"]))
    if widths:
        add("  non-embedding", lambda r: millions(r["parameters"]["narrow"]["non_embedding"]))
        add("tied embeddings", lambda r: "yes" if r["tied"] else "no")
        add("plain checkpoint", lambda r: "yes" if r["plain_checkpoint"] else "no")
    rows += quality_cells(reports, reports[0]["unseen"])
    for stage in STAGES:
        seconds = [report["seconds"].get(stage, 0.0) for report in reports]
        if any(seconds):
            rows.append((f"seconds, {stage}", [f"{v:.1f}" if v else "-" for v in seconds]))
    return rows


def inner_width(report: dict[str, Any]) -> str:
    """Return a feed-forward width, or those of the narrowest and the widest layer."""
    layers = report["feed_forward"].get("layers")
    return f"{min(layers)} to {max(layers)}" if layers else str(report["feed_forward"]["new"])


def quality_cells(
    reports: list[dict[str, Any]], unseen: Sequence[str] = ()
) -> list[tuple[str, list[str]]]:
    """Return the rows of what models' predictions are worth, without those that say nothing.

    reports: what each has of ``FIGURES``. unseen: texts of a kind that the calibration has not.
    """
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[float | None], shown: str) -> None:
        if any(value is not None for value in values):
            rows.append((name, ["-" if v is None else format(v, shown) for v in values]))

    texts = dict.fromkeys(name for report in reports for name in report["perplexity"])
    by_text = {
        "perplexity": ("perplexity", ".2f"),
        "kl": ("KL to the dense model", ".4f"),
        "agreement": ("top-1 agreement", ".1%"),
    }
    for key, (title, shown) in by_text.items():
        for text in texts:
            values = [(report.get(key) or {}).get(text) for report in reports]
            add(f"{title}, {text}{', unseen' if text in unseen else ''}", values, shown)
    written = [report.get("generated") or {} for report in reports]
    add("repeated 4-grams in greedy text", [own.get("repeated") for own in written], ".1%")
    under_dense = [own.get("perplexity") for own in written]
    add("perplexity of that text under the dense model", under_dense, ".2f")
    return rows


def table(reports: list[dict[str, Any]]) -> str:
    """Return reports side by side, one column each; the first is usually the dense model's."""
    return side_by_side([label(r) for r in reports], cells(reports))


def side_by_side(columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """Return a table for the terminal: of each row a name, and a cell for each column."""
    heading = ("", columns)
    first = max(len(name) for name, _ in rows)
    widths = [max(len(column[i]) for _, column in [heading, *rows]) for i in range(len(columns))]
    lines = []
    for name, line in [heading, *rows]:
        padded = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append(f"{name.ljust(first)}  {padded}".rstrip())
    lines.insert(1, "-" * len(lines[1]))
    return "\n".join(lines)


def warning_of(dense: dict[str, float], result: dict[str, float], remedy: str) -> str | None:
    """Return a warning where a result is as good as broken; None where it is not.

    That is a perplexity of at least three times the dense model's; the worst text is named.

    Args:
        dense, result: perplexities by text.
        remedy: what the user could do.
    """
    times = {name: value / dense[name] for name, value in result.items()}
    worst = max(times, key=times.__getitem__, default=None)
    if worst is None or times[worst] < _BROKEN:
        return None
    return (
        f"{worst}: perplexity {result[worst]:.6g} is {times[worst]:.3g} times the dense model's "
        f"{dense[worst]:.6g}; {remedy}"
    )


def millions(count: int) -> str:
    """Return a count of parameters for people."""
    return f"{count / 1e6:.1f} M"
