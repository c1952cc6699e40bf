"""What ``merge-ff`` does for every task: its choices, what its output saves, its picture."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotresize.cli.choices import RecoveryChoices
from dotresize.merging.merge import ANCHORS, UNLIKE, alike_windows
from dotresize.models.stacks import layers_of, stacks_of


@dataclass(frozen=True, kw_only=True)
class MergeChoices:
    """What a user may choose about a merging; see ``dotresize.merge_feed_forward``.

    Attributes:
        plain: whether the output repeats the shared tensors, for plain transformers.
    """

    merge: int
    anchor: str = "first"
    no_permute: bool = False
    soft: float | None = None
    start: int | None = None
    plain: bool = False
    backend: str = field(default="auto", metadata={"resume": False})

    def check(self) -> None:
        """Raise ValueError for a choice that would be refused whatever the model."""
        if self.anchor not in ANCHORS:
            raise ValueError(f"--anchor {self.anchor}: must be one of {', '.join(ANCHORS)}")
        if self.soft is not None and (self.no_permute or not 0 < self.soft < float("inf")):
            raise ValueError(f"--soft {self.soft:g}: must be positive, and without --no-permute")

    def check_layers(self, model: Any) -> None:
        """Raise ValueError for a window that a model, or its skeleton, does not have."""
        for stack in stacks_of(model):
            layers = len(layers_of(model, stack))
            if not 2 <= self.merge <= layers:
                raise ValueError(
                    f"--merge {self.merge}: must be 2 to {layers}, the layers of the {stack.name}"
                )
            last = layers - self.merge
            if self.start is not None and not 0 <= self.start <= last:
                raise ValueError(f"--start {self.start}: must be 0 to {last} for {layers} layers")
            alike = alike_windows(model, stack, self.merge)
            if not alike:
                raise ValueError(f"--merge {self.merge}: everywhere in the {stack.name} {UNLIKE}")
            if self.start is not None and self.start not in alike:
                raise ValueError(f"--start {self.start}: {UNLIKE}")

    @property
    def given(self) -> dict[str, Any]:
        """The keywords of ``merge_feed_forward`` that they are."""
        return {
            "k": self.merge,
            "permute": not self.no_permute,
            "soft": self.soft,
            "anchor": self.anchor,
            "start": self.start,
            "backend": self.backend,
        }

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """The ways to merge the same window that ``--compare`` sets beside this one."""
        return {
            "without permutation": {"permute": False, "soft": None},
            "soft alignment": {"permute": True, "soft": self.soft or 0.03},
        }


def all_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was typed, and what was not, for the record."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("typed", "verb", "default_window")
    }


def remedy(merging: MergeChoices, recovery: RecoveryChoices) -> str:
    """Return what may help against a bad result."""
    longer = "train it with --recover" if recovery.recover is None else "train longer (--recover)"
    return longer if merging.merge == 2 else f"merge fewer layers (--merge), or {longer}"


def saved(parameters: dict[str, int], *, plain: bool) -> str:
    """Return what the output saves and what it does not, for the record and the card."""
    fewer = f"{(parameters['dense'] - parameters['merged']) / 1e6:.1f} M parameters"
    if not plain:
        return (
            f"Saved: {fewer}, in the file and in memory, since every shared tensor is stored "
            "once. Not saved: computing time. Other tools refuse this directory; "
            "`dotresize merge-ff --plain` writes one that they load."
        )
    return (
        "Saved in this directory: nothing. The shared tensors are repeated, so that every tool "
        "loads it, and the weights take as many bytes as the dense model's, in the file and in "
        f"memory; computing takes as long. The {fewer} are saved in tools that share tensors "
        "(`dotresize merge-ff` without `--plain`), or by compression whose window is longer "
        "than a layer (`zstd --long=27` has 128 MB; gzip finds nothing). Training it further in "
        "other tools unties the copies."
    )


def card_lines(found: dict[str, Any], loader: str) -> list[str]:
    """Return what a model card says of a merged model, beside its figures.

    loader: what loads it in plain transformers.
    """
    before, after = (found["parameters"][which] / 1e6 for which in ("dense", "merged"))
    if found["settings"]["plain"]:
        share, counts = "have equal feed-forwards", f"{after:.1f} M of {before:.1f} M are distinct"
    else:
        share, counts = "share one feed-forward", f"{before:.1f} M became {after:.1f} M"
        loader = "`dotresize.load`"
    several = len(found["stacks"]) > 1
    lines = [
        f"Layers {stack['window'][0]} to {stack['window'][-1]}{f' of the {name}' * several} {share}"
        for name, stack in found["stacks"].items()
    ]
    return [
        f"{'. '.join(lines)}; of the parameters, {counts}.",
        f"{loader} loads it (made by dotresize {found['versions']['dotresize']}).",
        "",
        found["saved"],
    ]


def check_plot(path: str, merging: MergeChoices) -> None:
    """Raise ValueError where ``--plot`` could not draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'dotresize[plot]'")
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot {path}: must be a .svg, .png or .pdf file")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: its directory does not exist")
    if merging.start is not None:
        raise ValueError("--plot: there is nothing to draw with --start, which tries one window")


def plot(path: str, found: dict[str, Any], what: str) -> None:
    """Draw what is lost by every window of each stack, by its first layer.

    found: the report of ``merge_feed_forward``, whose metric is minus ``what``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, stack in found["stacks"].items():
        sound = [entry for entry in stack["profile"] if entry["metric"] is not None]
        starts = [entry["start"] for entry in sound]
        axes.plot(starts, [-entry["metric"] for entry in sound], "o-", label=name)
    axes.axhline(-found["metric"]["dense"], color="grey", linestyle="--", label="dense")
    axes.set(xlabel="first layer of the window", ylabel=f"{what}, merged", yscale="log")
    axes.legend()
    figure.savefig(path)
