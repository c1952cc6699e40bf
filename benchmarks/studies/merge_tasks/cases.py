"""What merging is tried at, whatever the task: windows, anchors, and what it is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.accounting import unique_parameters
from dotresize.merging.merge import merge_feed_forward
from dotresize.merging.tie import dropped, gone_of
from dotresize.models.stacks import layers_of, stacks_of
from dotresize.recovery import fine_tune

Scores = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One way to have fewer feed-forwards.

    Attributes:
        stacks: how many of each stack's become one, by its name.
        permute: False averages them as they are.
        anchor: as of ``merge_feed_forward``.
        start: the window's first layer; "best" of all by the metric, "first" or "last".
        dropped: leave out the layers of the window but the anchor, instead of merging.
    """

    name: str
    stacks: Mapping[str, int]
    permute: bool = True
    anchor: str = "first"
    start: str = "best"
    dropped: bool = False


def cases_of(stacks: Mapping[str, int], *, ablate: bool) -> Iterator[Case]:
    """Yield a merging and what it is compared with; to ablate, other windows and anchors too."""
    yield Case("merged", stacks)
    yield Case("without permutation", stacks, permute=False)
    yield Case("layers dropped", stacks, dropped=True)
    if ablate:
        for start in ("first", "last"):
            yield Case(f"merged, the {start} window", stacks, start=start)
        for anchor in ("middle", "last"):
            yield Case(f"merged, anchor {anchor}", stacks, anchor=anchor)


@torch.inference_mode()
def minus_loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return minus the mean loss of a token."""
    total = count = 0.0
    for batch in batches:
        number = int((batch["labels"] != -100).sum())
        total, count = total + float(model(**batch).loss) * number, count + number
    return -total / count


@dataclass
class Task:
    """A trained model, its data, and what it is worth.

    Attributes:
        name, data: of the task, and the data set.
        model: the dense one.
        batches: on which neurons are aligned, by a seed.
        metric: chooses the window, on examples that are neither trained nor scored on.
        scores: on the test set, by the score's name; the first is what is drawn.
        train: labelled examples, as ``fine_tune`` takes them; none where nothing is trained.
        training: keywords of ``fine_tune`` for the training after a merging.
        checks: more of the dense row, whatever it is of.
        merged: the numbers of feed-forwards that are tried, the first with other windows, too.
    """

    name: str
    data: str
    model: Any
    batches: Callable[[int], list[dict[str, Tensor]]]
    metric: Callable[[Any], float]
    scores: Scores
    train: list[Any] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    checks: Callable[[], dict[str, Any]] = dict
    merged: list[Mapping[str, int]] = field(default_factory=list)

    def cases(self) -> list[Case]:
        """Return what is tried."""
        every = enumerate(self.merged)
        return [case for i, stacks in every for case in cases_of(stacks, ablate=not i)]

    def dense(self) -> dict[str, Any]:
        """Return the row of the model as it is."""
        parameters = unique_parameters(self.model)
        return {"before": self.scores(self.model), "parameters": parameters} | self.checks()

    def run(self, case: Case, seed: int, folder: Path) -> dict[str, Any]:
        """Return the row of a case: scores before and after training, and the windows' profile.

        folder: for the state of the training.
        """
        starts: dict[str, int] | None = None
        if case.start != "best":
            counts = {s.name: len(layers_of(self.model, s)) for s in stacks_of(self.model)}
            last = case.start == "last"
            starts = {name: (counts[name] - k) * last for name, k in case.stacks.items()}
        merged, report = merge_feed_forward(
            self.model,
            self.batches(seed),
            k=dict(case.stacks),
            metric=self.metric,
            anchor=case.anchor,
            permute=case.permute,
            start=starts,
        )
        lost = 0
        with ExitStack() as opened:
            if case.dropped:
                merged = copy.deepcopy(self.model)
                lost = opened.enter_context(dropped(merged, gone_of(report["stacks"])))
            row = {"before": self.scores(merged)}
            seconds = dict(report["seconds"])
            if self.train:
                told = fine_tune(merged, self.train, folder=folder, seed=seed, **self.training)
                row["after"] = self.scores(merged)
                row["training"] = {name: told[name] for name in ("steps", "learning_rate")}
                seconds["training"] = told["seconds"]
            parameters = unique_parameters(merged) - lost
        return row | {
            "parameters": parameters,
            "windows": {name: found["window"] for name, found in report["stacks"].items()},
            "profile": {name: found["profile"] for name, found in report["stacks"].items()},
            "tokens": {name: found["tokens"] for name, found in report["stacks"].items()},
            "seconds": seconds,
        }
