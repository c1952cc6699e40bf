"""Time against size, one line per competitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .workload import need


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per operator: median seconds over the work; bars are quartiles. Raises NotHere."""
    need("matplotlib", "matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    timed = [r | {"work": _work(r)} for r in rows if "median_s" in r]
    operators = sorted({r["operator"] for r in timed})
    figure, axes = plt.subplots(1, len(operators), figsize=(7 * len(operators), 5), squeeze=False)
    for axis, operator in zip(axes[0], operators, strict=True):
        mine = [r for r in timed if r["operator"] == operator]
        for name, allocator in sorted({(r["name"], r["allocator"]) for r in mine}):
            points = sorted(
                (r for r in mine if (r["name"], r["allocator"]) == (name, allocator)),
                key=lambda r: r["work"],
            )
            work, median = [p["work"] for p in points], [p["median_s"] for p in points]
            errors = [
                [m - p["quartiles_s"][0] for m, p in zip(median, points, strict=True)],
                [p["quartiles_s"][1] - m for m, p in zip(median, points, strict=True)],
            ]
            label = name if allocator == "default" else f"{name} ({allocator})"
            ours = name.startswith("dotresize")
            axis.errorbar(
                work,
                median,
                errors,
                label=label,
                marker="o",
                linewidth=2.5 if ours else 1,
                linestyle="-" if allocator == "default" else ":",
            )
        axis.set(xscale="log", yscale="log", ylabel="seconds, median and quartiles")
        axis.set_xlabel("pairs of activations" if operator == "l1" else "entries x iterations")
        axis.set_title({"l1": "L1 cost", "sinkhorn": "Sinkhorn"}[operator])
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=7)
    figure.suptitle(f"{timed[0]['device']} ({timed[0]['simd']}), {timed[0]['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _work(row: dict[str, Any]) -> int:
    sizes = ("problems", "tokens", "n", "m", "iterations")
    work = 1
    for size in sizes:
        work *= row.get(size, 1)
    return work
