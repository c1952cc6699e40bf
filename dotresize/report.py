"""What a run says about itself: the table on the terminal, dotresize.json and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dotresize.accounting import STAGES

_LABELS = {"dot": "transport", "pca": "PCA", "slicegpt": "SliceGPT"}


def label(report: dict[str, Any]) -> str:
    """A column's heading: the method, and what corrected the weights after it."""
    name = _LABELS.get(report["method"], report["method"])
    after = [stage for stage in ("refit", "recovery") if report.get(stage)]
    return " + ".join([name, *after])


def cells(reports: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the comparison: a name, and one cell for each report."""
    texts = list(dict.fromkeys(name for report in reports for name in report["perplexity"]))
    rows: list[tuple[str, list[str]]] = [
        ("width", [str(r["width"]["new"]) for r in reports]),
        ("feed-forward width", [str(r["feed_forward"]["new"]) for r in reports]),
        ("parameters, total", [_millions(r["parameters"]["narrow"]["total"]) for r in reports]),
        (
            "  non-embedding",
            [_millions(r["parameters"]["narrow"]["non_embedding"]) for r in reports],
        ),
        ("tied embeddings", ["yes" if r["tied"] else "no" for r in reports]),
        ("plain checkpoint", ["yes" if r["plain_checkpoint"] else "no" for r in reports]),
    ]
    for name in texts:
        values = [r["perplexity"].get(name) for r in reports]
        apart = ", unseen" if name in reports[0]["unseen"] else ""
        rows.append(
            (f"perplexity, {name}{apart}", ["-" if v is None else f"{v:.2f}" for v in values])
        )
    for stage in STAGES:
        values = [r["seconds"].get(stage, 0.0) for r in reports]
        rows.append((f"seconds, {stage}", [f"{v:.1f}" if v else "-" for v in values]))
    return rows


def table(reports: list[dict[str, Any]]) -> str:
    """Reports side by side, one column each; the first is usually the dense model's."""
    rows = cells(reports)
    heading = ("", [label(r) for r in reports])
    first = max(len(name) for name, _ in rows)
    widths = [max(len(column[i]) for _, column in [heading, *rows]) for i in range(len(reports))]
    lines = []
    for name, line in [heading, *rows]:
        padded = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append(f"{name.ljust(first)}  {padded}".rstrip())
    lines.insert(1, "-" * len(lines[1]))
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def write(report: dict[str, Any], folder: Path, source: str) -> None:
    """dotresize.json and README.md into an output directory."""
    (folder / "dotresize.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_model_card(report, source), encoding="utf-8")


def _model_card(report: dict[str, Any], source: str) -> str:
    width, parameters = report["width"], report["parameters"]
    perplexity = _perplexities(report)
    loading = (
        "A plain checkpoint: `AutoModelForCausalLM.from_pretrained` loads it without custom code."
        if report["plain_checkpoint"]
        else "It has adapters on its residual connections: `dotresize.load` loads it."
    )
    inner = report["feed_forward"]
    if inner["method"]:
        loading = f"Feed-forward width {inner['old']} -> {inner['new']}.\n{loading}"
    name = Path(source).resolve().name if Path(source).exists() else source
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {json.dumps(name)}
tags: [dotresize, compressed]
---

# {name}, narrowed

Narrowed by {label(report)}, with dotresize {report["versions"]["dotresize"]}.
Residual width {width["old"]} -> {width["new"]}.
Parameters {_millions(parameters["dense"]["total"])} -> {_millions(parameters["narrow"]["total"])}
(tied tensors counted once); embeddings {"tied" if report["tied"] else "not tied"}.
{loading}
{perplexity}
Every parameter of the run is in `dotresize.json`.
"""


def _perplexities(report: dict[str, Any]) -> str:
    """A table for the model card, if anything was evaluated; what recovery did stands apart."""
    found = report["perplexity"]
    if not found:
        return ""
    columns = [("base", report["dense_perplexity"]), ("this model", found)]
    if report.get("recovery"):
        columns.insert(1, ("without recovery", report["training_free"]["perplexity"]))
    lines = ["", "| perplexity | " + " | ".join(name for name, _ in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for text in found:
        cells = " | ".join(f"{values[text]:.2f}" for _, values in columns)
        lines.append(f"| {text} | {cells} |")
    return "\n".join([*lines, ""])
