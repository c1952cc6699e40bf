"""Size against quality of every model in every type, as one picture.

    python -m benchmarks.llama_cpp.picture benchmarks/results/llama_cpp.jsonl docs/bits.svg

The rows are those of the last run of ``benchmarks.llama_cpp`` in the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..rows import read
from ..tables.llama_cpp import mean
from ..workload import need


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a line for each model: a point for each type but 32 bits, its name beside it."""
    matplotlib = need("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and the file small
    matplotlib.rcParams["svg.hashsalt"] = "dotresize"  # the same names in every run
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["model"] for row in rows):
        points = sorted(
            (row["bytes"] / 1e6, mean(row), row["type"])
            for row in rows
            if row["model"] == name and row["type"] != "f32"
        )
        sizes, values, _ = zip(*points, strict=True)
        label = name if name == "dense" else f"--{name}"
        axis.plot(sizes, values, "o-", label=label, linewidth=2.5 if name == "dense" else 1)
        for size, value, kind in points:
            axis.annotate(
                kind.upper(), (size, value), (3, 3), textcoords="offset points", fontsize=6
            )
    axis.set(xlabel="MB", ylabel="perplexity, geometric mean of three texts", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=8)
    axis.set_title(f"SmolLM2-135M in llama.cpp, {rows[-1]['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, help="file that benchmarks.llama_cpp appended to")
    parser.add_argument("picture", type=Path, help="an .svg or .png")
    args = parser.parse_args()
    rows = read(args.rows)
    chart([row for row in rows if row["run"] == rows[-1]["run"]], args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
