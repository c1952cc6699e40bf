"""``python -m benchmarks.readme``: write README's tables from the committed rows.

The text between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dotresize.report import label

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
PEERS = {
    "torch.cdist(p=1)": "torch.cdist(p=1)",
    "torch logsumexp loop": "torch logsumexp loop",
    "POT ot.batch.solve_batch": "POT ot.batch",
}


def rows(name: str) -> list[dict[str, Any]]:
    text = (ROOT / RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def solvers() -> str:
    """Median time of ours per case, and how many times longer each peer took in the same run."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows("cpu.jsonl"):
        cases.setdefault(row["case"], {})[row["name"]] = row
    lines = ["| work | dotresize | peers took |", "|---|---|---|"]
    for case, competitors in cases.items():
        ours = competitors["dotresize cpp"]
        peers = ", ".join(
            f"{PEERS[name]} {row['ratio']:.1f}x"
            for name, row in competitors.items()
            if name in PEERS
        )
        lines.append(f"| {case} | {ours['median_s'] * 1e3:.0f} ms | {peers} |")
    lines += [
        "",
        f"Medians of {ours['rounds']} interleaved rounds, float32, {ours['device']} "
        f"({ours['simd']}), {ours['date']},",
        f"torch {ours['versions']['torch']}, POT {ours['versions']['pot']}. Rows: "
        f"`{RESULTS / 'cpu.jsonl'}`; again with `.venv/bin/python -m benchmarks.solvers`.",
    ]
    return "\n".join(lines)


def demo() -> str:
    """The demo's table: what each method leaves of SmolLM2-135M at 20 % less residual width."""
    table = rows("demo.jsonl")
    texts = list(table[0]["perplexity"])
    lines = [
        f"| {table[0]['model']} | width | parameters | " + " | ".join(texts) + " |",
        "|---" * (3 + len(texts)) + "|",
    ]
    for row in table:
        total = row["parameters"]["narrow"]["total"] / 1e6
        figures = " | ".join(f"{row['perplexity'][text]:.1f}" for text in texts)
        name = label(row)
        name = f"**{name}**" if row.get("refit") else name
        lines.append(f"| {name} | {row['width']['new']} | {total:.1f} M | {figures} |")
    last = table[-1]
    seconds = sum(v for k, v in last["seconds"].items() if k != "evaluation")
    tokens = last["windows"] * last["window"]
    lines += [
        "",
        f"Perplexity on held-out text, lower is better; every checkpoint is plain and tied. "
        f"Calibrated on {tokens} tokens",
        f"of the three sources; transport + refit took {seconds:.0f} s on {last['device']}, "
        f"{last['date']}. Rows: `{RESULTS / 'demo.jsonl'}`.",
    ]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    for name, table in (("solvers", solvers()), ("demo", demo())):
        pattern = rf"(?s)(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: m[1] + t + m[2], text)
        assert count == 1, f"README has {count} places for the table {name}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
