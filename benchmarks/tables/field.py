"""Tables of the field on the same tokens, from the rows of benchmarks.studies.field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dotresize.cli.report import millions

from ..studies.quality_cases import WINDOWS
from .lines import Row, average, head, line

DENSE = "dense"  # as the study calls it
COLUMNS = (
    *("excess", "of each seed", "KL", "top-1", "choice", "repeated", "perplexity of it"),
    *("time", "memory"),
)


def field(rows: list[Row]) -> str:
    """Return a table for each model and share: means over the seeds, the best excess first."""
    if not rows:
        return "No rows yet."
    lines: list[str] = []
    rows = [row for row in rows if row["windows"] == WINDOWS]
    of_dense = {row["model"]: row for row in rows if row["case"] == DENSE}
    for model, dense in of_dense.items():
        own = [row for row in rows if row["model"] == model]
        for share in sorted({row["share"] for row in own if row["case"] != DENSE}):
            lines += [f"**{_name(model)}, {share:.0%} of the parameters outside the embeddings:**"]
            lines += ["", *head(["", "checkpoint", "parameters", *COLUMNS])]
            cases = _cases([row for row in own if row["share"] == share and row is not dense])
            for case in sorted(cases, key=lambda case: _mean(cases[case], average)):
                lines.append(line([case, _plain(cases[case]), *_cells(cases[case])]))
            lines += [line([DENSE, "plain", *_cells([dense])]), ""]
    row = rows[-1]
    continued, right = row["generated"]["continuations"], dense["accuracy"]
    error = (right * (1 - right) / row["items"]) ** 0.5
    lines += [
        f"Means of the seeds, on three kinds of text; {WINDOWS} windows of 512 tokens for all, and "
        "as many of its own text for dotresize",
        "unless the given text is alone. SLEB, and 2SSP for its attentions, judge on 4 of the "
        f"windows. choice: accuracy of a multiple choice of {row['items']} items",
        f"(chance is 0.25, the standard error about {error:.2f}); repeated: share of 4-grams of "
        f"{continued} greedy continuations that had been there before, and their",
        "perplexity under the dense model. Simulated: at full width, with zeros. Time without "
        "evaluation, two runs at once of a thread each; memory: at most so much",
        f"more than before the model was made. {_devices(rows)}. Rows: "
        "`benchmarks/results/field.jsonl`.",
    ]
    return "\n".join(lines)


def field_short(rows: list[Row], model: str, share: float = 0.8) -> str:
    """Return excess, KL and agreement of every method at one share, this package's in bold."""
    found = [row for row in rows if row["model"] == model and row["share"] == share]
    if not found:
        return "No rows yet."
    cases = _cases(found)
    lines = head(["", "checkpoint", "excess", "of each seed", "KL", "top-1", "time"])
    for case in sorted(cases, key=lambda case: _mean(cases[case], average)):
        _, excess, seeds, kl, top, *_, took, _ = _cells(cases[case])
        name = f"**{case}**" if case.startswith("dotresize") else case
        lines.append(line([name, _plain(cases[case]), excess, seeds, kl, top, took]))
    lines += [
        "",
        f"{_name(model)}, {share:.0%} of the parameters outside the embeddings, "
        f"{found[0]['windows']} windows of 512 tokens for all; {_devices(found)}.",
        "Excess: ln(perplexity / dense perplexity), a mean of three kinds of text. Rows: "
        "`benchmarks/results/field.jsonl`.",
    ]
    return "\n".join(lines)


def _name(model: str) -> str:
    return Path(model).stem.partition(".")[0]


def _devices(rows: list[Row]) -> str:
    """Return which devices measured, each with the days on which it did."""
    days: dict[str, dict[str, None]] = {}
    for row in rows:
        days.setdefault(row["device"], {})[row["date"]] = None
    return "; ".join(f"{device}, {' and '.join(when)}" for device, when in days.items())


def _cases(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault(row["case"], []).append(row)
    return found


def _plain(rows: list[Row]) -> str:
    if rows[0]["plain"]:
        return "plain"
    return "simulated" if "paper" in rows[0] else "GGUF, dotresize.load"


def _mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    return sum(map(value, rows)) / len(rows)


def _of_texts(rows: list[Row], name: str) -> float:
    return _mean(rows, lambda row: sum(row[name].values()) / len(row[name]))


def _cells(rows: list[Row]) -> list[str]:
    """Return the cells of ``COLUMNS``, behind the parameters that are left."""
    texts = [row["generated"] for row in rows]
    return [
        millions(round(_mean(rows, lambda row: row["parameters"]))),
        f"{_mean(rows, average):.3f}",
        ", ".join(f"{average(row):.3f}" for row in rows),
        f"{_of_texts(rows, 'kl'):.3f}",
        f"{_of_texts(rows, 'agreement'):.3f}",
        f"{_mean(rows, lambda row: row['accuracy']):.2f}",
        f"{_mean(texts, lambda text: text['repeated']):.2f}",
        f"{_mean(texts, lambda text: text['perplexity']):.1f}",
        f"{_mean(rows, lambda row: row['seconds']):.0f} s",
        _memory(rows),
    ]


def _memory(rows: list[Row]) -> str:
    """Return what was added at most to the memory in use; rows of before did not measure it."""
    added = [row["added_bytes"] for row in rows if "added_bytes" in row]
    return f"{max(0, sum(added)) / len(added) / 2**30:.1f} GiB" if added else "-"
