"""Time against size, one line per competitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .workload import need

# What the work is measured in, and the panel's title.
_TITLES = {
    "l1": ("pairs of activations", "L1 cost"),
    "sinkhorn": ("entries x iterations", "Sinkhorn"),
    "assignment": ("entries", "Assignment"),
}


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel per operator: median seconds over the work; bars are quartiles."""
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
        label, title = _TITLES[operator]
        axis.set_xlabel(label)
        axis.set_title(title)
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
