"""The rows of ``benchmarks.gpu`` as Markdown: rates beside their bounds, ratios to the peers."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..workload import Case

Row = dict[str, Any]
# Cases that failed in committed rows: what the error says, and the commit that removed its cause.
MENDED = {
    "sinkhorn ragged, each stops by itself": ("tensors to be on the same device", "02a09cd"),
}
# Bytes of an entry that an iteration has to read at least, unless the problem stays on the device.
BYTES_READ = {
    "dotresize exact": 4,
    "dotresize exact, launched": 2,
    "dotresize exact, launched, of the cost": 4,
    "dotresize u16": 2,
    "dotresize u16, launched": 2,
}
SECTIONS = (
    *(
        "ceiling",
        "check",
        "sinkhorn",
        "tolerance",
        "assignment",
        "l1",
        "gradient",
        "power",
        "batch",
        "stopping",
        "model",
        "serving",
    ),
    "sanitizer",
)


def summary(about: Row, found: list[Row]) -> str:
    return f"# {about['device']}, {about['date']}\n\n{details(about, found)}"


def details(about: Row, found: list[Row]) -> str:
    """Return the summary without its heading."""
    of = {section: [r for r in found if r["section"] == section] for section in SECTIONS}
    rates = ceilings(found)
    parts = [_versions(about)]
    parts += ["", "| ceiling, measured | per second |", "|---|---|"]
    parts += [f"| {name} | {rate:.3g} |" for name, rate in rates.items()]
    wrong = [r for r in of["check"] if "failed" in r]
    parts += ["", f"Correctness: {len(of['check']) - len(wrong)} of {len(of['check'])} cases."]
    parts += list(dict.fromkeys(f"- {r['case']}: {_failure(r)}" for r in wrong))
    parts += [
        f"- {r['case']}: {r.get('failed') or r.get('missing') or 'clean'}" for r in of["sanitizer"]
    ]
    parts += ["", *l1_table(of["l1"], rates), "", *sinkhorn_table(of["sinkhorn"], rates), ""]
    if of["gradient"]:
        parts += [*l1_table(of["gradient"], {}, "L1 gradient", "dotresize"), ""]
    tables = (
        ("tolerance", tolerance_table),
        ("assignment", assignment_table),
        ("serving", serving_table),
    )
    for section, table in tables:
        parts += [*table(of[section]), ""] if of[section] else []
    parts += [
        f"- {r['case']} {r.get('name', '')}: {(r.get('failed') or r['missing'])[:80]}"
        for part in ("l1", "gradient", "sinkhorn", "tolerance", "assignment", "serving")
        for r in of[part]
        if "failed" in r or "missing" in r
    ]
    for row in (*of["power"], *of["batch"], *of["stopping"], *of["model"]):
        named = about.keys() | {"section", "case", "name"}
        numbers = (f"{k} {_short(v)}" for k, v in row.items() if k not in named)
        parts.append(f"- {row.get('name', row['case'])}: {', '.join(numbers)}")
    return "\n".join(parts) + "\n"


def _failure(row: Row) -> str:
    """Return why a case failed, or where its cause was removed since."""
    mended = MENDED.get(row["case"])
    if mended is None or mended[0] not in row["failed"]:
        return row["failed"]
    return f"failed then; its cause was removed in {mended[1]}, and it has not run on a GPU since"


def ceilings(found: list[Row]) -> dict[str, float]:
    return {r["case"]: r["per_s"] for r in found if r["section"] == "ceiling" and "per_s" in r}


def _versions(about: Row) -> str:
    return ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k != "python")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def l1_table(
    found: list[Row], rates: dict[str, float], title: str = "L1 cost", ours: str = "dotresize fp32"
) -> list[str]:
    """Return T pairs per second, the share of the measured ceiling, and times ours."""
    lines = [f"| {title} | time | T pairs/s | of its ceiling | x ours |", "|---|---|---|---|---|"]
    for row in found:
        label = f"{row['case']} {row.get('name', '')}"
        if "median_s" not in row:
            continue
        share = ""
        kinds = {"fp32": "float32", "fp16": "float16", "u8": "bytes"}
        kind = kinds.get(row["name"].removeprefix("dotresize "))
        if f"pairs, {kind}" in rates:
            share = f"{row['pairs_per_s'] / rates[f'pairs, {kind}']:.0%}"
        ratio = _ratio(found, row, ours, "median_s")
        lines.append(
            f"| {label} | {row['median_s'] * 1e3:.2f} ms | {row['pairs_per_s'] / 1e12:.2f} "
            f"| {share} | {ratio} |"
        )
    return lines


def sinkhorn_table(found: list[Row], rates: dict[str, float]) -> list[str]:
    """Return the time of an iteration, and its share of one read of the cost at full bandwidth."""
    lines = ["| Sinkhorn | one iteration | of its bound | x ours |", "|---|---|---|---|"]
    for row in found:
        label = f"{row['case']} {row.get('name', '')}"
        if "per_iteration_s" not in row:
            continue
        share = ""
        width = BYTES_READ.get(row["name"])
        if width and "bytes copied" in rates:
            bound = read_bound(row["case"], width, rates)
            share = f"{bound / row['per_iteration_s']:.0%}"
        ratio = _ratio(found, row, "dotresize exact", "per_iteration_s")
        lines.append(f"| {label} | {row['per_iteration_s'] * 1e6:.1f} us | {share} | {ratio} |")
    return lines


def tolerance_table(found: list[Row]) -> list[str]:
    """Return time of a whole solve, iterations, the error reached, and what each tolerance is."""
    timed = [r for r in found if "median_s" in r]
    lines = ["| Sinkhorn to a tolerance | time | iterations | marginal error | x ours |"]
    lines += ["|---|---|---|---|---|"]
    for row in timed:
        error = f"{row['error']:.1e}{'' if row['reached'] else ', not reached'}"
        ratio = _ratio(found, row, "dotresize exact", "median_s")
        lines.append(
            f"| {row['case']} {row['name']}, {row['dtype']} | {row['median_s'] * 1e3:.2f} ms "
            f"| {row['iterations']} | {error} | {ratio} |"
        )
    means = {row["name"]: row["means"] for row in timed}
    return [*lines, "", *(f"- {name}: {text}." for name, text in means.items())]


def serving_table(found: list[Row]) -> list[str]:
    """Return tokens a second, read and written, each also as a multiple of the dense model's."""
    heads = ("model", "parameters", "batch", "prompt tokens/s", "x dense", "written tokens/s")
    heads += ("x dense", "peak")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    timed = [r for r in found if "read_per_s" in r]
    dense = {(r["way"], r["batch"]): r for r in timed if r["name"] == "dense"}
    for row in timed:
        beside = dense.get((row["way"], row["batch"]))  # none where the dense model failed
        rates = [
            f"{row[k]:.0f} | {'' if beside is None else f'{row[k] / beside[k]:.2f}'}"
            for k in ("read_per_s", "written_per_s")
        ]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
        lines.append(
            f"| {row['name']}, {row['width']} x {row['inner']}, {row['way']} "
            f"| {row['parameters'] / 1e6:.0f} M | {row['batch']} | {' | '.join(rates)} | {peak} |"
        )
    return lines


def assignment_table(found: list[Row]) -> list[str]:
    """Return times of both of our ways, and times the one by the host alone."""
    lines = ["| assignment | time | x host alone |", "|---|---|---|"]
    return lines + [
        f"| {row['case']} {row['name']} | {row['median_s'] * 1e3:.2f} ms "
        f"| {_ratio(found, row, 'dotresize cpp', 'median_s')} |"
        for row in found
        if "median_s" in row
    ]


def read_bound(case: str, width: int, rates: dict[str, float]) -> float:
    """Return seconds of one read of (problems, n, m) entries of ``width`` bytes."""
    problems, n, m = ast.literal_eval(case)
    return problems * n * m * width / rates["bytes copied"]


def _ratio(found: list[Row], row: Row, ours: str, key: str) -> str:
    mine = [
        r[key] for r in found if r["case"] == row["case"] and r.get("name") == ours and key in r
    ]
    return f"{row[key] / mine[0]:.2f}" if mine and mine[0] > 0 else ""


def peers_table(found: list[Row], rates: dict[str, float], names: dict[str, str]) -> list[str]:
    """Return a line for each case: time, share of the bound, and times as long each peer took."""
    lines = ["| work | dotresize | of its bound | peers took, times as long |", "|---|---|---|---|"]
    for section, ours, key in (
        ("l1", "dotresize fp32", "median_s"),
        ("sinkhorn", "dotresize exact", "per_iteration_s"),
    ):
        cases = {r["case"]: r for r in found if r.get("name") == ours and key in r}
        for case, mine in cases.items():
            if section == "l1":
                sizes = zip(("tokens", "n", "m"), ast.literal_eval(case), strict=True)
                work = Case("l1", dict(sizes)).label
                time, bound = f"{mine[key] * 1e3:.1f} ms", "pairs, float32"
                share = mine["pairs_per_s"] / rates[bound]
            else:
                sizes = zip(("problems", "n", "m"), ast.literal_eval(case), strict=True)
                work = f"Sinkhorn, an iteration, {Case('sinkhorn', dict(sizes)).shape}"
                time = f"{mine[key] * 1e6:.0f} us"
                share = read_bound(case, 4, rates) / mine[key]
            ratios = (
                f"{names[r['name']]} {r[key] / mine[key]:.1f}"
                for r in found
                if r["case"] == case and r.get("name") in names and key in r
            )
            lines.append(f"| {work} | {time} | {share:.0%} | {', '.join(ratios)} |")
    return lines


def _most(values: Iterable[float]) -> str:
    found = max(values, default=None)
    return "-" if found is None else f"{found:.1e}"


def kept_plan(rows: list[Row]) -> str:
    """Return iterations with the cost and with the kept plan, over all norms, by reg."""
    lines = [
        "| reg over the mean cost | norms that converge | iterations | with the kept plan "
        "| of them, reading the cost | largest error of a plan's columns | plans apart, at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio in sorted({row["reg_over_mean"] for row in rows}):
        found = [row for row in rows if row["reg_over_mean"] == ratio]
        done = [row for row in found if row["exact_converged"] and row["kept_converged"]]
        total = {
            name: sum(row[name] for row in found) / len(found)
            for name in ("exact_iterations", "kept_iterations", "kept_sweeps_of_the_cost")
        }
        errors = [max(row[f"{name}_true_errors"][1] for row in found) for name in ("exact", "kept")]
        both = (sum(row[f"{name}_converged"] for row in found) for name in ("exact", "kept"))
        lines.append(
            f"| {ratio:g} | {' / '.join(map(str, both))} of {len(found)} "
            f"| {total['exact_iterations']:.1f} | {total['kept_iterations']:.1f} "
            f"| {total['kept_sweeps_of_the_cost'] - 1:.1f} | {errors[0]:.1e} / {errors[1]:.1e} "
            f"| {_most(row['apart'] for row in done)} |"
        )
    row = rows[-1]
    place = f"{row['device']}{', interpreter' if row['interpreter'] else ''}"
    return "\n".join(
        [
            *lines,
            "",
            f"Costs of every norm of SmolLM2-135M, {row['n']} x {row['m']}, float32, with "
            f"momentum, to marginal error {row['tol']:g} or",
            f"{row['max_iter']} iterations; means over the norms. {place}, {row['date']}. Rows: "
            "`benchmarks/results/kept_plan.jsonl`,",
            "by `python -m benchmarks.studies.kept_plan`.",
        ]
    )
