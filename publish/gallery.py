"""Pictures of the examples: each is run, and what it found is drawn into docs/gallery.

    python -m publish.gallery [NAME ...]

The pictures are committed, and are drawn again when an example changes.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parent.parent
EXAMPLES, PICTURES = ROOT / "examples", ROOT / "docs" / "gallery"
# What a script imports from a folder of its own, which ``make test`` installs.
APART = {"llm_compressor_width": Path(sys.prefix) / "llm-compressor"}
GREY, PLAIN, OURS = "#808080", "#9aa5b1", "#3f6fb5"  # on a light page as on a dark one
STYLE = {
    "svg.hashsalt": "dotresize",  # the same bytes for the same picture
    "svg.fonttype": "none",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "savefig.transparent": True,
}


def bars(axis: Any, values: dict[str, float], title: str, ours: set[str]) -> None:
    """Draw shares as horizontal bars, the first on top; those of this package in a colour."""
    names = list(values)
    colours = [OURS if name in ours else PLAIN for name in names]
    drawn = axis.barh(names, [100 * value for value in values.values()], color=colours)
    axis.bar_label(drawn, fmt="%.1f %%", padding=3, color=GREY)
    axis.invert_yaxis()
    axis.set(title=title, xlim=(0, 118 * max(values.values())))


def matrix(axis: Any, values: Tensor, title: str, rows: str, columns: str) -> None:
    axis.imshow(values, cmap="cividis", interpolation="nearest", aspect="auto")
    axis.set(title=title, ylabel=rows, xlabel=columns)
    if max(values.shape) < 10:  # layers, not neurons
        axis.set(yticks=range(values.shape[0]), xticks=range(values.shape[1]))


def cross_architecture_merge(found: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    matrix(left, found["apart"], "distance of layers", "source", "target")
    matrix(middle, found["q"], "which belong together", "source", "target")
    names = ("moved", "by a loop", "moved evenly")
    values = (found[name] for name in ("moved", "looped", "even"))
    bars(right, dict(zip(names, values, strict=True)), "accuracy in the target's shape", {"moved"})


def git_rebasin_weight_matching(found: dict[str, Any], figure: Figure) -> None:
    values = zip(("as they are", "dotresize", "scipy"), found["accuracies"], strict=True)
    bars(figure.subplots(), dict(values), "accuracy of two networks' average", {"dotresize"})


def intra_fusion(found: dict[str, Any], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    plan = found["result"].plan[0]
    order = plan.argmax(1).argsort()
    matrix(left, plan[order].sqrt(), "plan of the first layer", "neuron", "kept neuron")
    bars(right, found["shares"], "accuracy with half the neurons", {"sinkhorn", "assignment"})


def llm_compressor_width(found: dict[str, Any], figure: Figure) -> None:
    values = dict(zip(("dropped", "merged by a plan"), found["errors"], strict=True))
    bars(figure.subplots(), values, "error of the logits", {"merged by a plan"})


def model_averaging(found: dict[str, Any], figure: Figure) -> None:
    names = ("each alone", "averaged", "aligned, then averaged")
    values = (found[name] for name in ("alone", "plain", "matched"))
    bars(figure.subplots(), dict(zip(names, values, strict=True)), "accuracy", {names[-1]})


def ot_fusion(found: dict[str, Any], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    columns = found["columns"][0]
    sorted_cost = found["cost"][0][:, columns]
    matrix(left, sorted_cost[::2, ::2], "cost, neurons matched", "neuron of A", "neuron of B")
    bars(right, found["shares"], "accuracy of the fused network", {"sinkhorn", "assignment"})


def torch_pruning_merge(found: dict[str, Any], figure: Figure) -> None:
    names = ("magnitude", "magnitude, merged", "redundancy", "redundancy, merged")
    values = dict(zip(names, found["rows"], strict=True))
    bars(figure.subplots(), values, "accuracy with half the neurons", set(names[1:]))


DRAWINGS: dict[str, Callable[[dict[str, Any], Figure], None]] = {
    one.__name__: one
    for one in (
        cross_architecture_merge,
        git_rebasin_weight_matching,
        intra_fusion,
        model_averaging,
        ot_fusion,
        torch_pruning_merge,
        llm_compressor_width,  # last: it puts a folder of other versions in front of the path
    )
}


def draw(name: str, folder: Path = PICTURES) -> Path:
    """Run an example and draw what it found; return the picture's path."""
    sys.path[:0] = [str(EXAMPLES), *(str(APART[one]) for one in APART if one == name)]
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE), torch.no_grad():
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        DRAWINGS[name](found, figure)
        figure.savefig(path, metadata={"Date": None})
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="of an example (all)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in DRAWINGS]
    if unknown:
        parser.error(f"{unknown[0]}: there are {', '.join(DRAWINGS)}")
    for name in args.names or DRAWINGS:
        sys.stdout.write(f"{draw(name)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
