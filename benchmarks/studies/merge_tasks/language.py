"""SmolLM2-135M: feed-forwards merged, and narrowed to as many parameters, with the same recovery.

The demo's texts calibrate, and their held-out part is scored on. Recovery distils the dense model
on 100 steps of 1,024 tokens (dotresize.recovery.recover).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dotresize.accounting import unique_parameters
from dotresize.calibration.text import random_windows
from dotresize.compression import make_options
from dotresize.evaluate import perplexity
from dotresize.merging.checkpoint import MergedStore
from dotresize.merging.merge import merge_feed_forward
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.pipeline import narrow_model
from dotresize.recovery import BATCH_WINDOWS, recover

from ..quality import WINDOW, Study
from .cases import Case

WINDOWS = 24
CHOOSING = 4  # windows whose perplexity chooses the layers
STEPS = 100
# Text that is trained on is drawn by the seed and this, other than that of the calibration.
OTHERS = 1000
NARROWED = "narrowed"
MERGED = (5, 10, 15)
DATA = Path()


class Language:
    """A language model, and what is compared; it has the methods of ``cases.Task``."""

    name, data = "language", "wikipedia, news, documentation"

    def __init__(self) -> None:
        self._study = Study(WINDOWS)
        self._model = self._study.model

    def cases(self) -> Iterator[Case]:
        """Yield merging and narrowing at each size; at a third, merging without permutation."""
        for count in (MERGED[1], MERGED[0], MERGED[2]):
            yield Case("merged", {"decoder": count})
            yield Case(NARROWED, {"decoder": count})
            if count == MERGED[1]:
                yield Case("without permutation", {"decoder": count}, permute=False)

    def dense(self) -> dict[str, Any]:
        """Return the row of the model as it is."""
        return {
            "before": self._scores(self._model),
            "parameters": unique_parameters(self._model.module),
        }

    def run(self, case: Case, seed: int, folder: Path) -> dict[str, Any]:
        """Return the row of a case. folder: for the state of the training."""
        made, about = (self._narrowed if case.name == NARROWED else self._merged)(case, seed)
        before = self._scores(made)
        streams, count = self._study.streams, STEPS * BATCH_WINDOWS
        first = self._study.first
        tokens = random_windows(streams, count, WINDOW, OTHERS + seed, None, first)
        told = recover(self._model.module, made.module, tokens, folder=folder, seed=seed)
        about["seconds"]["training"] = told["seconds"]
        return {
            **{"before": before, "after": self._scores(made)},
            "parameters": unique_parameters(made.module),
            "training": {name: told[name] for name in ("steps", "tokens", "learning_rate")},
            **about,
        }

    def _scores(self, model: CausalLM) -> dict[str, float]:
        """Return the perplexity of each text, and before them their geometric mean."""
        known = model is self._model
        found = self._study.dense if known else self._study.perplexities(model)
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        return {"perplexity": mean, **found}

    def _merged(self, case: Case, seed: int) -> tuple[CausalLM, dict[str, Any]]:
        tokens = self._study.given("all", seed)
        merged, report = merge_feed_forward(
            self._model.module,
            [{"input_ids": ids} for ids in tokens.split(BATCH_WINDOWS)],
            k=dict(case.stacks),
            metric=lambda model: -perplexity(CausalLM.in_memory(model), tokens[:CHOOSING]),
            permute=case.permute,
        )
        found = report["stacks"]["decoder"]
        about = {name: {"decoder": found[name]} for name in ("profile", "tokens")}
        about |= {"windows": {"decoder": found["window"]}, "seconds": report["seconds"]}
        return CausalLM(merged, MergedStore(merged)), about

    def _narrowed(self, case: Case, seed: int) -> tuple[CausalLM, dict[str, Any]]:
        layers, inner = len(self._model.layers), self._model.inner_width
        width = round(inner * (layers + 1 - case.stacks["decoder"]) / layers)
        options = make_options(ff_width=width, seed=seed)
        made, report = narrow_model(self._model, self._study.given("all", seed), options)
        return made, {"ff_width": width, "seconds": dict(report["seconds"])}


def task(folder: Path, cache: Path, steps: int) -> Language:
    """Return the task; nothing is trained for it, and its texts come with packages."""
    return Language()
