"""``python -m benchmarks.tables``: write the tables of README and docs from the committed rows.

The text between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from typing import Any

from dotresize.cli.report import label

from .. import l1
from ..code import digest
from ..rows import read
from . import checks
from .api import api
from .field import field, field_short
from .gpu import ceilings, details, kept_plan, peers_table
from .llama_cpp import llama_cpp
from .models import families, first_token, large, merging, projected
from .quality import (
    amounts,
    headline,
    map_time,
    maps,
    multiple_choice,
    recipes,
    recovered,
    speed,
    study,
)
from .shapes import budget, layers

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path("benchmarks/results")
# A README has room for some; the rows have all.
SHOWN = (
    *("L1 cost, 4096 tokens, 576 x 468", "L1 cost, 4096 tokens, 1024 x 1024"),
    "Assignment, noisy copies, 30 of 1536 x 1536",
    "Assignment, unrelated neurons, 30 of 1536 x 1536",
    *("Sinkhorn, 100 iterations, 576 x 468", "Sinkhorn, 100 iterations, 1024 x 768"),
    "Sinkhorn, 20 iterations, 30 of 576 x 464",
)
PEERS = {
    "torch.cdist(p=1)": "torch.cdist",
    "scipy cdist cityblock": "scipy",
    "scikit-learn manhattan": "scikit-learn",
    "faiss METRIC_L1": "faiss",
    "broadcast, torch.compile": "torch.compile",
    "scipy": "scipy",
    "scipy, threads": "scipy in threads",
    "lapx lapjv": "lapx",
    "torch logsumexp loop": "torch loop",
    "torch logsumexp loop, torch.compile": "torch.compile",
    "POT sinkhorn_log, numpy": "POT numpy",
    "POT sinkhorn_log, torch": "POT torch",
    "POT ot.batch": "POT ot.batch",
    "GeomLoss": "GeomLoss",
    "OTT-JAX, jit": "OTT-JAX",
}


def rows(name: str) -> list[dict[str, Any]]:
    return read(ROOT / RESULTS / name)


def _solver_rows() -> list[dict[str, Any]]:
    """Return rows of each case's last run that has ours: ratios are within one run."""
    table = rows("cpu.jsonl")
    last = {r["case"]: r["run"] for r in table if r["name"] == l1.OURS and "median_s" in r}
    return [r for r in table if r["run"] == last.get(r["case"])]


def solvers() -> str:
    """Return our median time per case, and how many times longer each peer took in the same run."""
    found = {(r["case"], r["name"], r.get("allocator")): r for r in _solver_rows()}
    lines = ["| work | dotresize | peers took, times as long |", "|---|---|---|"]
    for case in SHOWN:
        ours = found[case, l1.OURS, "default"]
        peers = []
        for name, short in PEERS.items():
            ratios = [
                f"{found[case, name, a]['median_s'] / found[case, l1.OURS, a]['median_s']:.1f}"
                for a in ("default", "heap")
                if "median_s" in found.get((case, name, a), {})
            ]
            if ratios:
                peers.append(f"{short} {' / '.join(ratios)}")
        lines.append(f"| {case} | {ours['median_s'] * 1e3:.1f} ms | {', '.join(peers)} |")
    lines.append(_to_tolerance())
    square = {name: r for (case, name, _), r in found.items() if case == SHOWN[1]}
    limit, bytes_ = (square[n]["median_s"] for n in (l1.LIMIT, "dotresize cpp, u8"))
    fp32, versions = square[l1.OURS]["median_s"], ours["versions"]
    lines += [
        "",
        f"Medians of {ours['rounds']} interleaved rounds, float32, {ours['device']} "
        f"({ours['simd']}), {ours['date']}; the second figure is with large arrays",
        f"kept on the heap, where a peer pays less for its temporaries. At 1024 x 1024 the L1 "
        f"kernel reaches {limit / fp32:.0%} of",
        f'its register tile\'s rate, and `precision="u8"` takes {bytes_ / fp32:.2f} of its time. '
        f"torch {versions['torch']}, POT {versions['POT']}, OTT-JAX {versions['ott-jax']},",
        f"faiss {versions['faiss-cpu']}. All rows: `{RESULTS / 'cpu.jsonl'}`; yours: "
        "`pip install -c constraints.txt '.[bench]'`, then `dotresize bench`.",
    ]
    return "\n".join(lines)


def _to_tolerance(ratio: float = 0.03, tol: float = 1e-5) -> str:
    """Return a line of ``solvers`` from the rows of ``benchmarks.studies.acceleration``."""
    took = {
        r["solver"]: r["seconds"]
        for r in rows("acceleration.jsonl")
        if (r["ratio"], r["tol"], r["reached"]) == (ratio, tol, True)
    }
    names = {"POT sinkhorn_log": "POT numpy", "POT ot.batch": "POT ot.batch", "OTT": "OTT-JAX"}
    names["OTT, adaptive momentum"] = "OTT-JAX with momentum"
    ours = took["momentum"]
    peers = ", ".join(f"{short} {took[name] / ours:.0f}" for name, short in names.items())
    work = f"Sinkhorn to {tol:.0e}, a real cost at reg {ratio:g} of its mean, float64"
    return f"| [{work}](docs/sinkhorn.md) | {ours * 1e3:.0f} ms | {peers} |"


def _demo_rows() -> list[dict[str, Any]]:
    table = rows("demo.jsonl")
    return [row for row in table if row.get("run") == table[-1].get("run")]


def demo() -> str:
    """Return the demo's table: what each method leaves of SmolLM2-135M at the same size."""
    table = _demo_rows()
    texts = list(table[0]["perplexity"])
    lines = [
        f"| {table[0]['model']} | widths | layers | parameters | " + " | ".join(texts) + " |",
        "|---" * (4 + len(texts)) + "|",
    ]
    for row in table:
        total = row["parameters"]["narrow"]["total"] / 1e6
        figures = " | ".join(f"{row['perplexity'][text]:.1f}" for text in texts)
        name = label(row)
        name = f"**{name}**" if row.get("refit") else name
        widths = f"{row['width']['new']} / {row['feed_forward']['new']}"
        depth = row["layers"]["new"]
        lines.append(f"| {name} | {widths} | {depth} | {total:.1f} M | {figures} |")
    last = table[-1]
    seconds = sum(v for k, v in last["seconds"].items() if k != "evaluation")
    lines += [
        "",
        "Residual and feed-forward width; perplexity on held-out text, lower is better. Every "
        "checkpoint is plain and tied.",
        "All spend the same budget; `transport` is the paper's single one. Only the last row is "
        "refitted.",
        f"Calibrated on {last['windows'] * last['window']} tokens of the three sources and text of "
        f"its own; the last row took {seconds:.0f} s on {last['device']}, {last['date']}.",
        f"Rows: `{RESULTS / 'demo.jsonl'}`.",
    ]
    return "\n".join(lines)


def _gpu_rows() -> list[dict[str, Any]]:
    """Return the last run of every section of ``benchmarks.gpu``."""
    table = rows("gpu.jsonl")
    last = {row["section"]: row["run"] for row in table}
    return [row for row in table if row["run"] == last[row["section"]]]


def _lm_eval_rows() -> list[dict[str, Any]]:
    """Return the last run of ``benchmarks.lm_eval_task``: dense, then narrowed."""
    table = rows("lm_eval.jsonl")
    return [row for row in table if row["run"] == table[-1]["run"]]


def _llama_cpp_rows() -> list[dict[str, Any]]:
    """Return the last run of ``benchmarks.llama_cpp``."""
    table = rows("llama_cpp.jsonl")
    return [row for row in table if row["run"] == table[-1]["run"]]


def gpu() -> str:
    """Return times, shares of the measured bounds, and ratios to the peers."""
    last = _gpu_rows()
    about = f"{last[-1]['device']}, {last[-1]['date']}; torch {last[-1]['versions']['torch']}, "
    about += f"triton {last[-1]['versions']['triton']}. [More of it](docs/gpu.md)."
    if any(row["section"] == "sinkhorn" and "commit" not in row for row in last):
        about += (
            " The Sinkhorn rows are of commit 4748ba7, whose every iteration was two launches that "
            "read the cost; what has taken their place has not run on a GPU."
        )
    return "\n".join([*peers_table(last, ceilings(last), PEERS), "", about])


def gpu_page() -> str:
    """Return all of the GPU page's figures."""
    last = _gpu_rows()
    row = next(row for row in last if row["section"] == "ceiling")
    about = {name: value for name, value in row.items() if name not in ("case", "per_s")}
    return details(about, last).rstrip()


def acceleration() -> str:
    """Return iterations and milliseconds to a tolerance, each solver as it was measured last."""
    last = rows("acceleration.jsonl")
    ratios = sorted({row["ratio"] for row in last})
    found = {(r["solver"], r["ratio"], r["tol"]): r for r in last if r["reached"]}
    tolerances = sorted({row["tol"] for row in last}, reverse=True)
    lines = []
    for key, scale, about in (("iterations", 1, ""), ("seconds", 1e3, "Milliseconds:")):
        head = ["", *(f"{ratio:g}" for ratio in ratios)]
        lines += [about, ""] if about else []
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in dict.fromkeys(row["solver"] for row in last):
            cells = []
            for ratio in ratios:
                hits = [found.get((name, ratio, tol)) for tol in tolerances]
                cells.append(" / ".join(f"{h[key] * scale:.0f}" if h else "-" for h in hits))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(
        [
            *lines,
            f"Costs of SmolLM2-135M (576 x 468), global unless a layer is named, float64, "
            f"{last[0]['device']},",
            f"{last[0]['date']}. Anderson runs in the plain reference, so its times are not a "
            "kernel's. POT looks at",
            "its error every 10 iterations and in the L2 norm, so it was given the tolerance that "
            "guarantees the L1 error.",
            "OTT looks every 10 iterations as well. With the default allocator, which slows large "
            "temporaries. Rows:",
            "`benchmarks/results/acceleration.jsonl`.",
        ]
    )


def pot() -> str:
    """Return what POT's own tests found, by the last run of ``benchmarks.checks.pot_tests``."""
    row = rows("pot_tests.jsonl")[-1]
    reasons = {**row["expected"], **row["left_out"]}
    lines = [f"{row['passed']} passed, {row['failed']} failed ({row['date']}, POT "]
    lines[0] += f"{row['versions']['POT']}). Expected to fail, or left out, and why:"
    return "\n".join([*lines, "", *(f"- `{test}`: {why}" for test, why in reasons.items())])


TABLES = {
    "docs/api.md": {"api": api},
    "README.md": {
        "solvers": solvers,
        "gpu": gpu,
        "demo": demo,
        "field_short": lambda: field_short(rows("field.jsonl"), "SmolLM2-135M-Instruct.Q4_1.gguf"),
        "llama_cpp": lambda: llama_cpp(_llama_cpp_rows()),
        "peers": lambda: checks.peers(rows("peer_tests.jsonl"), rows("pot_tests.jsonl")),
    },
    "docs/l1_cost.md": {"gradient": lambda: checks.gradient(rows("gradient.jsonl"))},
    "docs/checks.md": {
        "types": lambda: checks.types(rows("fuzz_types.jsonl")),
        "interrupts": lambda: checks.interrupts(rows("interrupts.jsonl")),
    },
    "docs/compress.md": {
        "quality": lambda: headline(rows("quality.jsonl")),
        "maps": lambda: maps(rows("maps.jsonl")),
        "amounts": lambda: amounts(rows("amounts.jsonl")),
        "layers": lambda: layers(rows("layers.jsonl")),
        "speed": lambda: speed(rows("speed.jsonl")),
        "recovered": lambda: recovered(rows("recovered.jsonl")),
        "lm_eval": lambda: multiple_choice(_lm_eval_rows()),
        "first_token": lambda: first_token(rows("first_token.jsonl")),
    },
    "docs/studies.md": {
        "study": lambda: study(rows("quality.jsonl")),
        "field": lambda: field(rows("field.jsonl")),
        "recipes": lambda: recipes(rows("recipes.jsonl")),
        "budget": lambda: budget(rows("budget.jsonl")),
    },
    "docs/families.md": {"families": families},
    "docs/llama-cpp.md": {"llama_cpp": lambda: llama_cpp(_llama_cpp_rows())},
    "docs/gpu.md": {"gpu": gpu_page},
    "docs/large.md": {
        "large": lambda: large(rows("large.jsonl")),
        "projected": lambda: projected(rows("projected.jsonl"), rows("large.jsonl")),
    },
    "docs/maps.md": {"map_time": lambda: map_time(rows("map_time.jsonl"))},
    "docs/merge-ff.md": {"merging": lambda: merging(rows("merging.jsonl"))},
    "docs/sinkhorn.md": {
        "acceleration": acceleration,
        "kept_plan": lambda: kept_plan(rows("kept_plan.jsonl")),
    },
    "docs/ot.md": {"pot": pot},
}


# The rows that a table is made from, and the code that it describes.
SOURCES = {
    "solvers": ("cpu.jsonl", "cpu"),
    "acceleration": ("acceleration.jsonl", "cpu"),
    "kept_plan": ("kept_plan.jsonl", "gpu"),
    "peers": ("peer_tests.jsonl", "cpu"),
    "gradient": ("gradient.jsonl", "cpu"),
    "types": ("fuzz_types.jsonl", "compressor"),
    "interrupts": ("interrupts.jsonl", "cpu"),
    "pot": ("pot_tests.jsonl", "ot"),
    "gpu": ("gpu.jsonl", "gpu"),
    "demo": ("demo.jsonl", "compressor"),
    "quality": ("quality.jsonl", "compressor"),
    "study": ("quality.jsonl", "compressor"),
    "field": ("field.jsonl", "field"),
    "field_short": ("field.jsonl", "field"),
    "recipes": ("recipes.jsonl", "compressor"),
    "maps": ("maps.jsonl", "compressor"),
    "amounts": ("amounts.jsonl", "compressor"),
    "layers": ("layers.jsonl", "compressor"),
    "map_time": ("map_time.jsonl", "cpu"),
    "recovered": ("recovered.jsonl", "compressor"),
    "lm_eval": ("lm_eval.jsonl", "compressor"),
    "first_token": ("first_token.jsonl", "compressor"),
    "llama_cpp": ("llama_cpp.jsonl", "compressor"),
    "large": ("large.jsonl", "compressor"),
    "projected": ("projected.jsonl", "compressor"),
    "merging": ("merging.jsonl", "compressor"),
    "speed": ("speed.jsonl", "compressor"),
    "budget": ("budget.jsonl", "compressor"),
}
# The rows that these tables show of their file; every other table shows all of them.
SHOWN_ROWS = {
    "solvers": _solver_rows,
    "gpu": _gpu_rows,
    "demo": _demo_rows,
    "pot": lambda: rows("pot_tests.jsonl")[-1:],
    "peers": lambda: rows("peer_tests.jsonl")[-1:],
    "gradient": lambda: checks.last_runs(rows("gradient.jsonl")),
    "types": lambda: rows("fuzz_types.jsonl")[-1:],
    "interrupts": lambda: rows("interrupts.jsonl")[-1:],
    "recovered": lambda: rows("recovered.jsonl")[-1:],
    "lm_eval": _lm_eval_rows,
    "llama_cpp": _llama_cpp_rows,
}


_today = functools.cache(digest)  # several tables rest on the same code


def since(name: str) -> str:
    """Return a sentence where a table's rows are older than the code that it describes."""
    if name not in SOURCES:
        return ""
    file, area = SOURCES[name]
    shown = SHOWN_ROWS[name]() if name in SHOWN_ROWS else rows(file)
    today = _today(area)
    old = [row for row in shown if (row.get("code") or {}).get(area) != today]
    if not old:
        return ""
    if not all(row.get("commit") for row in old):
        return "\n\n*Measured before rows recorded their commit; the code may have changed since.*"
    commits = ", ".join(sorted({row["commit"] for row in old}))
    return f"\n\n*Measured at commit {commits}; this code has changed since.*"


def with_tables(page: str, text: str) -> str:
    for name, made in TABLES[page].items():
        pattern, table = rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)", made() + since(name)
        text, count = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text)
        assert count == 1, f"{page} has {count} places for the table {name}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")
