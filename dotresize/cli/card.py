"""The output directory, and its model card: what was done, what it is worth, where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dotresize import checkpoint
from dotresize.checkpoint.gguf_file import SHAPES
from dotresize.checkpoint.origin import Origin, origin_of
from dotresize.cli.report import inner_width, millions, quality_cells
from dotresize.models.causal_lm import CausalLM

# What the methods are called where nobody knows this project's words.
_RESIDUAL = {
    "pca": "principal directions of its activations",
    "dot": "optimal transport of its channels (DOTResize, arXiv 2507.04517)",
    "magnitude": "keeping the channels of largest magnitude",
    "slicegpt": "SliceGPT's principal directions for each location (arXiv 2401.15024)",
}
_FEED_FORWARD = {
    "eliminate": "backward elimination of its neurons",
    "nystrom": "keeping its largest neurons, their output solved by least squares (Nystrom)",
    "magnitude": "keeping its largest neurons",
    "transport": "optimal transport of its neurons' output",
}

Card = Callable[[dict[str, Any], str, Origin], str]


def write_output(
    out: str,
    model: CausalLM,
    tokenizer: Any,
    report: dict[str, Any],
    card: Card,
    source: str,
) -> None:
    """Make the output directory: a model, dotresize.json, the model card README.md, licence texts.

    card: of a report, the base model's name, and where that came from.
    """
    origin, path = origin_of(source), Path(source)
    name = origin.hub_id or (path.resolve().stem if path.is_file() else path.resolve().name)

    def fill(folder: Path) -> None:
        checkpoint.write_directory(model, tokenizer, folder)
        text = json.dumps(report, indent=2) + "\n"
        (folder / "dotresize.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(card(report, name, origin), encoding="utf-8")
        origin.copy_files(folder)

    checkpoint.write_whole(out, fill)


def narrowed_card(report: dict[str, Any], name: str, origin: Origin) -> str:
    """Return the model card of a narrowed model."""
    width, inner, parameters = report["width"], report["feed_forward"], report["parameters"]
    lines = [f"A narrower {name}, made by dotresize {report['versions']['dotresize']}:", ""]
    if width["new"] < width["old"]:
        by = _RESIDUAL.get(report["method"], report["method"])
        where = ", with a map for each location" if report["scope"] == "location" else ""
        lines.append(f"- residual width {width['old']} -> {width['new']}, by {by}{where}")
    if inner["method"]:
        by = _FEED_FORWARD.get(inner["method"], inner["method"])
        lines.append(f"- feed-forward width {inner['old']} -> {inner_width(report)}, by {by}")
    if report["layers"]["dropped"]:
        which = " and ".join(map(str, report["layers"]["dropped"]))
        old, new = report["layers"]["old"], report["layers"]["new"]
        lines.append(f"- layers {old} -> {new}, without layer {which} (counted from 0)")
    if report["refit"]:
        lines.append("- the weights around them refitted by least squares on the same text")
    if report.get("recovery"):
        steps = report["recovery"]["steps"]
        lines.append(f"- then trained for {steps} steps to predict as the base model does")
    before, after = (millions(parameters[which]["total"]) for which in ("dense", "narrow"))
    tied = "tied" if report["tied"] else "not tied"
    calibration = report["calibration"]
    lines += [
        "",
        f"Parameters {before} -> {after}, tied tensors counted once; embeddings {tied}.",
        f"Calibrated on {calibration['tokens']} tokens{_first(calibration)}.",
        "A plain checkpoint: `AutoModelForCausalLM.from_pretrained` loads it without custom code."
        if report["plain_checkpoint"]
        else _loaded(report),
    ]
    if report["plain_checkpoint"] and inner["layers"]:
        lines.append(
            "Feed-forwards narrower than the widest are filled up with zeros, which the count of "
            "parameters includes."
        )
    if report["model_type"]["new"] != report["model_type"]["old"]:
        old, new = report["model_type"]["old"], report["model_type"]["new"]
        lines.append(f"Saved as {new}, as {old} takes no such width: the same function.")
    base = {"perplexity": report["dense_perplexity"], "generated": report["dense_generated"]}
    columns: dict[str, dict[str, Any]] = {"base": base}
    if report.get("recovery"):
        columns["without recovery"] = report["training_free"]
    columns["this model"] = report
    library = "transformers" if report["plain_checkpoint"] else "dotresize"
    cells = quality_cells(list(columns.values()))
    return model_card(f"{name}, narrowed", origin, library, lines, list(columns), cells)


def _loaded(report: dict[str, Any]) -> str:
    """Return how a model is loaded that plain transformers does not load."""
    if report["scope"] == "global":
        exported = ""
        if report["model_type"]["new"] in SHAPES:
            exported = ", and `dotresize export` writes it for llama.cpp"
        return (
            "Its layers have feed-forwards of different widths, which transformers does not load "
            f"yet: `dotresize.load` does{exported}."
        )
    return "It has adapters on its residual connections: `dotresize.load` loads it."


def _first(calibration: dict[str, Any]) -> str:
    token = calibration.get("first_token")
    return "" if token is None else f", every window beginning with token {token} (BOS)"


def model_card(
    title: str,
    origin: Origin,
    library: str,
    lines: list[str],
    columns: list[str],
    figures: list[tuple[str, list[str]]],
    *,
    pipeline: str = "text-generation",
) -> str:
    """Return a model card.

    Args:
        origin: of the base model; its hub id and licence go into the metadata, as far as known.
        library: which loads it.
        lines: what was done, and how to load the result.
        columns: the models whose figures are shown.
        figures: lines of the table: a name, and one cell for each model.
        pipeline: what the hub calls the task.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name=library,
        pipeline_tag=pipeline if library == "transformers" else None,
        base_model=origin.hub_id,
        tags=["dotresize", "compressed"],
        **origin.licence,
    )
    table = []
    if figures:
        table = ["", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        table += [f"| {name} | {' | '.join(values)} |" for name, values in figures]
    body = "\n".join([*lines, *table, ""])
    return f"""---
{metadata.to_yaml()}
---

# {title}

{body}
Every parameter of the run is in `dotresize.json`.
"""
