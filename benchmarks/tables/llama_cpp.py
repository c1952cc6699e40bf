"""The table of narrowed models in llama.cpp, from the rows of ``benchmarks.llama_cpp``."""

from __future__ import annotations

import math
from typing import Any

from .lines import span


def llama_cpp(table: list[dict[str, Any]]) -> str:
    """Return size, perplexity and speed of every model in every type."""
    if not table:
        return "No rows yet."
    types = list(dict.fromkeys(row["type"] for row in table))
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table:
        models.setdefault(row["model"], {})[row["type"]] = row
    shown = " / ".join(kind.upper() for kind in types)
    lines = [
        f"| SmolLM2-135M in llama.cpp: {shown} | widths | MB | perplexity | decoding, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, rows in models.items():
        first = rows[types[0]]
        cells = [
            f"`--{name}`" if name != "dense" else name,
            _widths(first),
            " / ".join(f"{rows[kind]['bytes'] / 1e6:.1f}" for kind in types),
            " / ".join(f"{mean(rows[kind]):.1f}" for kind in types),
            " / ".join(f"{rows[kind]['tokens_per_s']:.0f}" for kind in types),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    last = table[-1]
    compared = [rows["f32"]["compared"] for rows in models.values()]
    largest = max(found["kl_of_a_window"] for found in compared)
    other = sum(found["texts_of_other_ids"] for found in compared)
    count = compared[0]["texts"]
    lines += [
        "",
        f"Perplexity is the geometric mean of {', '.join(last['perplexity'])}, {last['windows']} "
        f"windows of {last['window']} tokens each. Decoding one text, medians in turns,",
        f"{last['device']}, {last['date']}, llama.cpp of node-llama-cpp. Of {count} texts "
        f"{other or 'none'} had other token ids than in transformers;",
        f"the f32 files' KL to transformers' predictions is at most {largest:.1e} nats (llama.cpp "
        "keeps keys and values in 16 bits).",
        "Rows: `benchmarks/results/llama_cpp.jsonl`.",
    ]
    return "\n".join(lines)


def _widths(row: dict[str, Any]) -> str:
    """Return residual and feed-forward width, and how many layers of how many neurons."""
    layers = row["layer_widths"]
    return f"{row['widths'][0]} / {span(layers)}, {len(layers)} layers"


def mean(row: dict[str, Any]) -> float:
    """Return the geometric mean of a row's perplexities."""
    values = row["perplexity"].values()
    return math.exp(sum(map(math.log, values)) / len(values))
