"""Tables of docs/compress.md and docs/studies.md: the shapes that a size is spent on."""

from __future__ import annotations

from dotresize.cli.report import millions

from ..demo.texts import SOURCES
from .lines import Row, average, head, line, span


def layers(rows: list[Row]) -> str:
    """Return the excess with equal feed-forward widths, with one for each layer, and by depth.

    A line has the mean over its seeds, and then the mean of each.
    """
    if not rows:
        return "No rows yet."
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        model = row["model"].partition(".")[0]
        groups.setdefault((model, row["windows"], row["case"]), []).append(row)
    columns = ["model", "windows, given and its own", "", "feed-forward", "outside the embeddings"]
    lines = head([*columns, *SOURCES, "mean", "of each seed"])
    for (model, windows, case), found in groups.items():
        found.sort(key=lambda row: row["seed"])
        shapes = list(dict.fromkeys(map(_shape, found)))
        counted = [row["parameters"]["non_embedding"] - row["zeros"] for row in found]
        sizes = list(dict.fromkeys(map(millions, counted)))
        texts = [sum(r["excess"][text] for r in found) / len(found) for text in SOURCES]
        each = [average(row) for row in found]
        shown = [f"{value:.3f}" for value in [*texts, sum(each) / len(each)]]
        given = f"{windows} and {found[0]['own_windows']}"
        cells = [model, given, case, " or ".join(shapes), " or ".join(sizes), *shown]
        lines.append(line([*cells, ", ".join(f"{value:.3f}" for value in each)]))
    last = rows[-1]
    devices = " and ".join(dict.fromkeys(f"{row['device']}, {row['date']}" for row in rows))
    lines += [
        "",
        f"Excess; windows of 512 tokens, {last['eval_windows']} of each text evaluated, nothing "
        f"trained. {devices}.",
        "Zeros that layers are filled up with are not counted. Rows: "
        "`benchmarks/results/layers.jsonl`.",
    ]
    return "\n".join(lines)


def _shape(row: Row) -> str:
    """Return the feed-forward widths of a row, and how many layers went."""
    own, dropped = row["layer_widths"], row["layers"]["dropped"]
    widths = span(own["widths"] if own else [row["ff_width"]])
    return f"{widths}, {len(dropped)} layers less" if dropped else widths


def budget(rows: list[Row]) -> str:
    """Return what the budget chose, and the excess of what it tried, by windows and seed."""
    kinds = ("residual alone", "feed-forward alone", "without a layer", "without two")
    lines = head(["windows", "seed", "chosen", *kinds])
    for row in rows:
        found = dict.fromkeys(kinds, "-")
        for tried in row["tried"]:
            if tried["excess"] is None:
                continue
            dropped = len(tried.get("dropped", ()))
            kind = kinds[dropped + 1]
            if not dropped and tried["width"] < 576:
                kind = kinds[0]
            if tried["width"] == 576 or tried["ff_width"] == 1536:  # the middle is in no column
                shown = f"{tried['width']} / {tried['ff_width']}"
                found[kind] = f"{shown}: {tried['excess']:.2f}"
        chosen = f"{row['width']} / {row['inner']}"
        chosen += f", without {row['dropped']}" if row.get("dropped") else ""
        lines.append(line([str(row["windows"]), str(row["seed"]), chosen, *found.values()]))
    about = (
        f"SmolLM2-135M, 80 % of all parameters; excess on held-out windows. {rows[-1]['device']}, "
    )
    return "\n".join([*lines, "", f"{about}{rows[-1]['date']}."])
