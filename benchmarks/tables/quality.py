"""Tables of docs/compress.md from the rows of benchmarks.studies.quality."""

from __future__ import annotations

import math
from typing import Any

from dotresize.cli.report import millions

from ..demo.texts import SOURCES
from ..studies.quality_cases import AMOUNTS, HEADLINE, KEPT_SETS, MAPS, WINDOWS
from .lines import Row, average, head, line

Found = dict[tuple[str, str, int], Row]

# Cases that remove a fifth of the parameters in total, or outside the embeddings, or less.
EQUAL_TOTAL = (
    *("magnitude", "transport", "PCA", "SliceGPT"),
    *(f"feed-forward 1024, {name}" for name in ("magnitude", "transport", "nystrom")),
    *("PCA + refit", "feed-forward 1024, eliminate + refit", "budget, 80 % in total"),
)
EQUAL_NON_EMBEDDING = (
    *(f"feed-forward, {name}" for name in ("magnitude", "transport", "nystrom", "eliminate")),
    *("PCA + refit", "feed-forward, eliminate + refit", "both widths + refit"),
    "budget, 80 % outside the embeddings",
)
REFITTED = {
    **{name: f"{name} + refit" for name in ("magnitude", "transport", "SliceGPT")},
    "PCA": "PCA + refit",
    **{name: f"{name} + refit" for name in ("transport per location", "PCA per location")},
}


def headline(rows: list[Row]) -> str:
    """Return excess by case: on each text, calibrated with and without its kind."""
    found = _by_case(rows)
    columns = ["", "widths", "parameters", *SOURCES, "mean"]
    lines = head([*columns, *(f"{text}, left out" for text in SOURCES), "mean"])
    for case in HEADLINE:
        row = found.get((case, "all", 0))
        if row is None:
            continue
        outside = _left_out(found, case, 0)
        cells = [case, *_size(row), *_excess(row)]
        cells += [*(f"{x:.2f}" for x in outside), _mean(outside)] if outside else ["-"] * 4
        lines.append(line(cells))
    last = found[HEADLINE[-1], "all", 0]
    dense = ", ".join(f"{name} {value:.1f}" for name, value in last["dense_perplexity"].items())
    lines += [
        "",
        f"SmolLM2-135M, dense {millions(last['dense_parameters']['total'])} parameters, "
        f"perplexity {dense}. {last['windows']} windows of 512 tokens,",
        f"{last['eval_windows']} windows of each text evaluated. Everything is a plain, tied "
        "checkpoint but SliceGPT's. `PCA + refit`, `eliminate + refit` and",
        f"the budgets calibrate on {last['own_windows']} windows more, of self-generated text. "
        f"{last['device']}, {last['date']}; rows: `benchmarks/results/quality.jsonl`.",
    ]
    return "\n".join(lines)


def study(rows: list[Row]) -> str:
    """Return the other comparisons, one table each."""
    found = _by_case(rows)
    return "\n".join(
        [
            "**At 80 % of all parameters** (468 channels are 81.3 %, 1024 inner neurons 80.3 %):",
            "",
            *_equal(found, EQUAL_TOTAL),
            "",
            "**At 80 % of the parameters outside the embeddings:**",
            "",
            *_equal(found, EQUAL_NON_EMBEDDING),
            "",
            "**Transport added to a pruner**, mean excess, by who chose the kept set:",
            "",
            *_added(found),
            "",
            "**With and without refit**, mean excess; with refit also on self-generated text:",
            "",
            *_refitted(found),
            "",
            "**What the tie costs**, mean excess, and perplexity against a head of its own:",
            "",
            *_ties(found),
            "",
            "**Seeds of the calibration windows**, mean excess over the texts:",
            "",
            *_seeds(found),
            "",
            "**Windows of calibration**, mean excess over the texts:",
            "",
            *_amounts(rows),
        ]
    )


def maps(rows: list[Row]) -> str:
    """Return the mean excess of each map, on the calibration's kinds of text and on others."""
    found = _by_case(rows)
    seeds = sorted({seed for _, _, seed in found})
    columns = [""]
    for group in ("calibrated kinds", "kinds left out"):
        columns += [*(f"{group}, seed {seed}" for seed in seeds), "mean"]
    lines = head(columns)
    for case in MAPS:
        inside = [found.get((case.name, "all", seed)) for seed in seeds]
        groups = [
            [None if row is None else average(row) for row in inside],
            [_mean_or_none(_left_out(found, case.name, seed)) for seed in seeds],
        ]
        cells = [case.name]
        for values in groups:
            known = [value for value in values if value is not None]
            each = ["-" if value is None else f"{value:.3f}" for value in values]
            complete = len(known) == len(seeds)
            cells += [*each, f"{sum(known) / len(known):.3f}" if complete else "-"]
        lines.append(line(cells))
    last = rows[-1]
    lines += [
        "",
        f"Mean excess on three kinds of text; left out: each of them in turn, and measured on that "
        f"one. SmolLM2-135M, {last['width']} of 576 channels,",
        f"{last['windows']} windows of 512 tokens and {last['own_windows']} of the model's own, "
        f"{last['eval_windows']} windows of each text evaluated. {last['device']},",
        f"{last['date']}. Rows: `benchmarks/results/maps.jsonl`.",
    ]
    return "\n".join(lines)


def amounts(rows: list[Row]) -> str:
    """Return the excess with and without refit, by windows of calibration text."""
    if not rows:
        return "No rows yet."
    counts = sorted({row["windows"] for row in rows})
    mixtures = sorted({row["mixture"] for row in rows} - {"all"})
    sizes = dict.fromkeys(case.name.partition(",")[0] for case in AMOUNTS)
    columns = ["windows, given and its own"]
    for size in sizes:
        columns += [f"{size}: no refit", "refit"]
        columns += [f"{mixture}: no refit, refit" for mixture in mixtures]
    lines = head(columns)
    for count in counts:
        found = _by_case(rows, count)
        own = {row["own_windows"] for row in rows if row["windows"] == count}
        cells = [f"{count} and {' or '.join(map(str, sorted(own)))}"]
        for size in sizes:
            cases = [f"{size}, no refit", f"{size}, refit"]
            inside = [found.get((case, "all", 0)) for case in cases]
            cells += ["-" if row is None else f"{average(row):.3f}" for row in inside]
            for mixture in mixtures:
                text = mixture.removeprefix("without ")
                apart = [found.get((case, mixture, 0)) for case in cases]
                cells.append(
                    ", ".join("-" if row is None else f"{row['excess'][text]:.3f}" for row in apart)
                )
        lines.append(line(cells))
    last = rows[-1]
    lines += [
        "",
        "Mean excess on three calibrated kinds of text, or on the kind that was left out. "
        "SmolLM2-135M;",
        f"windows of 512 tokens, given and of the model's own. {last['device']}, {last['date']}. "
        "Rows: `benchmarks/results/amounts.jsonl`.",
    ]
    return "\n".join(lines)


def recipes(rows: list[Row]) -> str:
    """Return the excess by how much text is read, in how long windows, and whose it is."""
    if not rows:
        return "No rows yet."
    columns = ["", "calibration", "windows, given and its own", "tokens of each"]
    lines = head([*columns, *SOURCES, "mean", "time"])
    for row in sorted(rows, key=lambda row: (row["mixture"], row["windows"], -row["window"])):
        count = f"{row['windows']} and {row['own_windows']}"
        cells = [row["case"], row["mixture"], count, str(row["window"]), *_excess(row)]
        lines.append(line([*cells, f"{row['seconds']:.0f} s"]))
    last = rows[-1]
    lines += [
        "",
        "SmolLM2-135M, 1126 of 1536 inner neurons in every layer; one seed, so read nothing into "
        f"less than 0.03. {last['device']}, {last['date']}.",
        "Time without evaluation, and without the model's writing; other work ran beside. Rows: "
        "`benchmarks/results/recipes.jsonl`.",
    ]
    return "\n".join(lines)


def map_time(rows: list[Row]) -> str:
    """Return the time of transport's limit beside that of twenty transports."""
    lines = head(
        ["channels", "kept", "plan, s", "eigenvectors, s", "limit, s", "20 transports, s", "ratio"]
    )
    for row in {row["width"]: row for row in rows}.values():
        took = row["seconds"]
        parts = [took[name] for name in ("plan", "eigenvectors", "limit", "twenty")]
        shown = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in parts]
        ratio = f"{took['twenty'] / took['limit']:.1f}"
        lines.append(line([str(row["width"]), str(row["kept"]), *shown, ratio]))
    last = rows[-1]
    lines += [
        "",
        f"Medians of {last['rounds']}; each of the twenty takes what one was timed to take. "
        f"{last['device']}, {last['date']}. Rows:",
        "`benchmarks/results/map_time.jsonl`, by `python -m benchmarks.studies.map_time`.",
    ]
    return "\n".join(lines)


def _mean_or_none(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def speed(rows: list[Row]) -> str:
    """Return tokens a second and memory of each model, as it was measured last."""
    last = {row["model"]: row for row in rows}
    names = list(rows[0]["median"])
    lines = head(["", *(name.replace("peak MiB", "peak memory, MiB") for name in names)])
    for model, row in last.items():
        lines.append(line([model, *(f"{row['median'][name]:.0f}" for name in names)]))
    row = rows[-1]
    lines += [
        "",
        f"Tokens a second: prefill of {row['prompt']}, decode of {row['new_tokens']} more with the "
        f"cache, medians of runs in turns, float32,",
        f"{row['device']}, {row['date']}. The dense model was read from 4-bit GGUF, which peaks "
        "while it is unpacked.",
    ]
    return "\n".join(lines)


def multiple_choice(rows: list[Row]) -> str:
    """Return accuracies of the last run of ``benchmarks.lm_eval_task``, and their difference."""
    if not rows:
        return "No rows yet."
    names = [*SOURCES, "overall"]

    def figures(table: Row, key: str = "acc") -> list[str]:
        return [f"{table[key][name]:.3f} ± {table[f'{key}_stderr'][name]:.3f}" for name in names]

    last = rows[-1]
    lines = head(["accuracy", "widths", *names])
    for row in rows:
        widths = f"{row['width']} / {row['ff_width']}"
        lines.append(line([row["model"], widths, *figures(row)]))
        lines.append(line([f"{row['model']}, by length", widths, *figures(row, "acc_norm")]))
    lines.append(line(["difference", "", *figures(last["difference"])]))
    counts = ", ".join(f"{name} {last['items'][name]}" for name in SOURCES)
    lines += [
        "",
        f"Items: {counts}; chance is 0.25. lm-eval {last['versions']['lm-eval']}, "
        f"{last['device']}, {last['date']}. Rows:",
        "`benchmarks/results/lm_eval.jsonl`.",
    ]
    return "\n".join(lines)


def recovered(rows: list[Row]) -> str:
    """Return a narrowed model before and after the short training of ``--recover``."""
    row = rows[-1]
    texts = list(row["perplexity"])
    recovery, tokens = row["recovery"], row["recovery"]["tokens"]
    lines = head(["", *texts])
    for name, found in (
        ("training-free", row["training_free"]["perplexity"]),
        (f"after {recovery['steps']} steps", row["perplexity"]),
    ):
        lines.append(line([name, *(f"{found[text]:.1f}" for text in texts)]))
    lines += [
        "",
        f"Perplexity; {tokens} tokens in {recovery['seconds']:.0f} s, after the demo's command. "
        f"{row['device']}, {row['date']}.",
    ]
    return "\n".join(lines)


def _equal(found: Found, cases: tuple[str, ...]) -> list[str]:
    lines = head(["", "widths", "parameters", *SOURCES, "mean"])
    rows = [found[case, "all", 0] for case in cases if (case, "all", 0) in found]
    return lines + [line([row["case"], *_size(row), *_excess(row)]) for row in rows]


def _added(found: Found) -> list[str]:
    lines = head(["kept set", "selection alone", "transport", "transport + refit"])
    alone = {"largest magnitudes": ("magnitude", "transport", "transport + refit")}
    for name in KEPT_SETS:
        labels = ("selection", "transport", "transport + refit")
        alone[name] = tuple(f"{label}, kept set {name}" for label in labels)  # type: ignore[assignment]
    return lines + [line([name, *_means(found, cases)]) for name, cases in alone.items()]


def _refitted(found: Found) -> list[str]:
    lines = head(["", "as it is", "refitted"])
    for plain, refitted in REFITTED.items():
        lines.append(line([plain, *_means(found, (plain, refitted))]))
    return lines


def _ties(found: Found) -> list[str]:
    lines = head(["", "tied", "untied", "cost"])
    for name in ("transport", "PCA", "PCA + refit"):
        pair = [found.get((case, "all", 0)) for case in (name, f"{name}, untied")]
        if None not in pair:
            tied, untied = (average(row) for row in pair if row is not None)
            cost = f"{math.expm1(tied - untied):+.1%}"
            lines.append(line([name, f"{tied:.3f}", f"{untied:.3f}", cost]))
    return lines


def _seeds(found: Found) -> list[str]:
    """Return a line for each case and calibration that has been run with several seeds."""
    seeds = sorted({seed for _, _, seed in found})
    columns = ["", "calibration", *(f"seed {seed}" for seed in seeds)]
    cases = dict.fromkeys((case, mixture) for case, mixture, _ in found)
    return _complete(columns, {key: [found.get((*key, seed)) for seed in seeds] for key in cases})


def _amounts(rows: list[Row]) -> list[str]:
    """Return a line for each case that has been run on several amounts of text."""
    counts = sorted({row["windows"] for row in rows})
    each = [_by_case(rows, count) for count in counts]
    cases = dict.fromkeys(row["case"] for row in rows)
    runs = {(case,): [found.get((case, "all", 0)) for found in each] for case in cases}
    return _complete(["", *map(str, counts)], runs)


def _complete(columns: list[str], runs: dict[Any, list[Row | None]]) -> list[str]:
    """Return the mean excess of each run, a line for each key whose runs are all there."""
    lines = head(columns)
    for key, rows in runs.items():
        if None not in rows:
            lines.append(line([*key, *(f"{average(row):.3f}" for row in rows if row)]))
    return lines


def _by_case(rows: list[Row], windows: int = WINDOWS) -> Found:
    """Return the rows of one amount of calibration text."""
    return {
        (row["case"], row["mixture"], row["seed"]): row for row in rows if row["windows"] == windows
    }


def _left_out(found: Found, case: str, seed: int) -> list[float]:
    """Return excess on each text by the calibration without it; nothing unless all are there."""
    apart = [found.get((case, f"without {text}", seed)) for text in SOURCES]
    excess = [row["excess"][text] for row, text in zip(apart, SOURCES, strict=True) if row]
    return excess if len(excess) == len(SOURCES) else []


def _means(found: Found, cases: tuple[str, ...]) -> list[str]:
    rows = [found.get((case, "all", 0)) for case in cases]
    return [f"{average(row):.2f}" if row else "-" for row in rows]


def _size(row: Row) -> list[str]:
    return [f"{row['width']} / {row['ff_width']}", millions(row["parameters"]["total"])]


def _excess(row: Row) -> list[str]:
    values = [row["excess"][text] for text in SOURCES]
    return [*(f"{value:.2f}" for value in values), _mean(values)]


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f}"
