"""Tables about models: families, large ones, merged ones."""

from __future__ import annotations

from typing import Any

from dotresize.models import FAMILIES
from dotresize.models.stacks import STACKS

from ..code import digest
from ..studies.large import SHARDS, TOKENS, WINDOW, llama
from ..studies.large_counts import SHAPES, counts, gpu_bytes, parameters


def families() -> str:
    """Return what can be narrowed of which family, from the axis tables."""
    lines = [
        "| model types | residual | feed-forward | widths that configs accept | merging |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        asked = "any"
        if family.width_divisors:
            asked = "multiples of the heads; others are saved as mistral, unless there are biases"
        elif family.width_multiple > 1:
            asked = f"multiples of {family.width_multiple}"
        inner = "yes" if family.has_inner_width else "no: experts"
        types = ", ".join(family.model_types)
        residual = f"no: {family.fixed_residual}" if family.fixed_residual else "yes"
        merging = "yes" if family.model_types[0] in STACKS else "no: experts"
        lines.append(f"| {types} | {residual} | {inner} | {asked} | {merging} |")
    narrowed = {name for family in FAMILIES for name in family.model_types}
    lines += [f"| {name} | - | - | - | yes |" for name in STACKS if name not in narrowed]
    return "\n".join(lines)


def first_token(table: list[dict[str, Any]]) -> str:
    """Return what a model loses by how often the first token of a window counts."""
    if not table:
        return "No rows yet."
    lines = [
        "| model | calibrated on windows | their first token counts | excess |",
        "|---|---|---|---|",
    ]
    for row in table:
        bos = row["first_token"] is not None
        begun = "as they lie in the text" if not bos else "that begin with BOS"
        begun = "without BOS" if bos and row["calibrated_with"] is None else begun
        times = "as any other" if row["counts"] == 1 else f"{row['counts']:,.0f} times"
        lines.append(f"| {row['model']} | {begun} | {times} | {row['excess']:.3f} |")
    last = table[-1]
    with_bos = next((row for row in table if "dense_without" in row), None)
    lines += [
        "",
        f"Feed-forward width x 0.75, {last['windows']} windows of {last['window']} tokens, three "
        f"texts, evaluated as users run the model; {last['device']}, {last['date']}.",
    ]
    if with_bos is not None:
        pairs = ", ".join(
            f"{name} {with_bos['dense_without'][name]:.1f} and {with_bos['dense'][name]:.1f}"
            for name in with_bos["dense"]
        )
        lines.append(f"Dense perplexity of {with_bos['model']} without BOS and with it: {pairs}.")
    return "\n".join([*lines, "Rows: `benchmarks/results/first_token.jsonl`."])


def large(table: list[dict[str, Any]]) -> str:
    """Return memory and time by stage of models that stayed in their files."""
    stages = ("calibration", "cost", "sinkhorn", "factorisation", "absorption", "refit")
    lines = [
        "| parameters | width | method | tokens | on | " + " | ".join(stages) + " | in all |",
        "|---" * (6 + len(stages)) + "|",
    ]
    memory = ["", "| parameters | memory of the | peak predicted | peak met |", "|---|---|---|---|"]
    for row in {row["model"]: row for row in table}.values():
        size = f"{row['parameters']['dense']['total'] / 1e6:.0f} M"
        cells = [size, f"{row['width']['old']} -> {row['width']['new']}", row["method"]]
        cells += [str(row["calibration"]["tokens"]), row["device"]]
        cells += [f"{row['seconds'][stage]:.0f} s" for stage in stages]
        lines.append(f"| {' | '.join(cells)} | {sum(row['seconds'].values()):.0f} s |")
        for place, met in row["peak_memory_bytes"].items():
            expected = row["predicted_memory_bytes"][place]
            memory.append(f"| {size} | {place} | {expected / 1e9:.2f} GB | {met / 1e9:.2f} GB |")
    about = (
        f"Random bfloat16 weights in {SHARDS} shards; the last of {table[-1]['date']}. The host's "
    )
    about += "peak is of resident memory,"
    return "\n".join(
        [*lines, *memory, "", about, "libraries included. Rows: `benchmarks/results/large.jsonl`."]
    )


def projected(table: list[dict[str, Any]], met: list[dict[str, Any]]) -> str:
    """Return operations and bytes of large shapes; seconds where a device's rates were measured.

    What the products leave of a run that was measured on that device is taken to grow with the
    bytes of the model. It is left out where the run is of other code than today's.
    """
    kinds = ("forward", "gram", "float64")
    names = ("1.1B", "8B", "70B")
    found = {name: counts(SHAPES[name], TOKENS, 3) for name in names}
    rates = table[-1]["rates"]
    products = {n: sum(found[n][kind] / rates[kind] for kind in kinds) for n in names}
    run = next(r for r in reversed(met) if r["device"] == table[-1]["device"])
    stages = ("calibration", "factorisation", "absorption", "refit")
    rest = None
    if (run.get("code") or {}).get("compressor") == digest("compressor"):
        rest = sum(run["seconds"][stage] for stage in stages) - products[run["model"]]
    size = {n: parameters(SHAPES[n]) for n in names}
    head = ["shape", *(f"{kind}, 10^15" for kind in kinds), "products", "the rest"]
    lines = [
        f"| {' | '.join([*head, 'greediest stage', 'activations'])} |",
        "|---" * (len(head) + 2) + "|",
    ]
    for name in names:
        memory = gpu_bytes(llama(SHAPES[name]), TOKENS, WINDOW)
        cells = [name, *(f"{found[name][kind] / 1e15:.2f}" for kind in kinds)]
        cells += [f"{products[name]:.0f} s"]
        cells += ["-" if rest is None else f"{rest * size[name] / size[run['model']]:.0f} s"]
        cells += [f"{memory[what] / 1e9:.1f} GB" for what in ("stages", "activations")]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"Seconds by the rates of an {table[-1]['device']}, {table[-1]['date']} "
    about += f"({', '.join(f'{kind} {rates[kind] / 1e12:.0f}' for kind in kinds)} T a second)."
    return "\n".join([*lines, "", about])


def merging(table: list[dict[str, Any]]) -> str:
    """Return what merging leaves: accuracy, BLEU, perplexity, by the last run of each task."""
    last = {row["task"]: row for row in table}
    lines = []
    units = {"images": "accuracy, %", "translation": "BLEU"}
    for task, unit in ((task, unit) for task, unit in units.items() if task in last):
        row, scale = last[task], 100 if task == "images" else 1
        share = 1 - row["parameters"]["merged"] / row["parameters"]["dense"]
        sizes = {name: len(found["window"]) for name, found in row["stacks"].items()}
        values = row["figures"].values()
        what = ", ".join(f"{k} of the {name}'s" for name, k in sizes.items())
        lines += [
            f"**{task.capitalize()}**: {what}, {share:.1%} of the parameters.",
            "",
            "| " + " | ".join(["", *row["figures"]]) + " |",
            "|---" * (1 + len(row["figures"])) + "|",
            "| " + " | ".join([unit, *(f"{v * scale:.1f}" for v in values)]) + " |",
            "",
        ]
    row = last["language"]
    window = row["stacks"]["decoder"]["window"]
    lines += [
        f"**Language**: SmolLM2-135M, layers {window[0]} to {window[-1]} of 30; perplexity, and "
        f"{row['recovery']['steps']} steps of recovery.",
        "",
        "| | parameters | " + " | ".join(row["rows"]["dense"]["perplexity"]) + " |",
        "|---" * (2 + len(row["rows"]["dense"]["perplexity"])) + "|",
    ]
    for name, one in row["rows"].items():
        cells = [name, f"{one['parameters'] / 1e6:.1f} M"]
        cells += [f"{value:.1f}" for value in one["perplexity"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{row['device']}, {row['date']}. Models of images and translation are trained by the "
    about += "benchmark:"
    return "\n".join(
        [
            *lines,
            "",
            about,
            "`python -m benchmarks.studies.merging`; rows: `benchmarks/results/merging.jsonl`.",
        ]
    )
