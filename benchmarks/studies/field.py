"""The field on the same tokens: this package and what other people propose, at equal size.

    python -m benchmarks.studies.field --out FILE [--model MODEL] [--seeds 0 1] [--shares 0.9 0.8]

Every method gets the same windows of calibration text, and leaves the same share of the parameters
outside the embeddings, as nearly as its units allow. This package also has the model write as much
again, but for one row. None is trained afterwards. Perplexity, KL and top-1 agreement are measured
on texts that are never calibrated on, accuracy on a multiple choice of their words, and of greedy
continuations how much they repeat and what the dense model thinks of them. A row is appended as
soon as it is there; a run that is started again skips what FILE has.

The peers are in peers/, written from their papers; Gemma 3 270M is where first_token.py says.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.accounting import count_parameters, peak_memory
from dotresize.compression import make_options
from dotresize.evaluate import Predictions, greedy_text, prompts_of, quality
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import parameters_at
from dotresize.narrow.pipeline import narrow_model

from ..demo.texts import model_file, write_texts
from ..lm_eval_task.items import texts_of
from ..rows import append, read, where
from .choice import accuracy, items_of
from .peers import PEERS
from .quality import Study
from .quality_cases import WINDOWS

SHARES = (0.8, 0.9)
SEEDS = (0, 1)
DENSE = "dense"


@dataclass(frozen=True)
class Own:
    """A way to use this package.

    Attributes:
        size: which option spends the budget: "ff_width", "width" or "params".
        plain: whether the result is a plain checkpoint.
    """

    size: str
    plain: bool = True
    options: dict[str, Any] = field(default_factory=dict)


GIVEN_ALONE = {"self_windows": 0}
OWN: dict[str, Own] = {
    "dotresize, the search": Own("params", options={"search": True}),
    "dotresize, equal widths": Own("ff_width"),
    "dotresize, equal widths, given text alone": Own("ff_width", options=GIVEN_ALONE),
    "dotresize, a width for each layer": Own("ff_width", False, {"layer_widths": True}),
    "dotresize, narrower residual stream": Own("width"),
    "magnitude of inner neurons": Own(
        "ff_width", options=GIVEN_ALONE | {"ff_method": "magnitude", "refit": False}
    ),
}


class Field:
    """A model, its texts, and what is measured of what is made of it."""

    def __init__(self, path: Path, windows: int) -> None:
        self.study = Study(windows, model=path)
        self.model, self.dense = self.study.model, self.study.dense
        with tempfile.TemporaryDirectory() as folder:
            calibration, held_out = ([texts_of(p) for p in ps] for ps in write_texts(Path(folder)))
        known = [text for texts in calibration for text in texts]
        self.items = [
            item for texts in held_out for item in items_of(texts, known, self.study.tokenizer)
        ]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.prompts = prompts_of(self.study.texts.values(), positions)
        self._predictions: dict[str, Predictions] = {}

    def measure(self, model: CausalLM, name: str) -> dict[str, Any]:
        """Return the figures of a model beside the dense one."""
        if not self._predictions:
            self._predictions = {
                text: Predictions(self.model, windows) for text, windows in self.study.texts.items()
            }
        assert self.prompts is not None
        found = {
            text: quality(model, predictions, desc=f"{name}, {text}")
            for text, predictions in self._predictions.items()
        }
        written = greedy_text(model, self.model, self.prompts, desc=name)
        return {
            "perplexity": {text: one.perplexity for text, one in found.items()},
            "dense_perplexity": self.dense,
            "excess": {
                text: math.log(one.perplexity / self.dense[text]) for text, one in found.items()
            },
            "kl": {text: one.kl for text, one in found.items()},
            "agreement": {text: one.agreement for text, one in found.items()},
            "accuracy": accuracy(model.module, self.items),
            "items": len(self.items),
            "generated": vars(written) | {"continuations": len(self.prompts)},
        }

    def run(self, case: str, share: float, seed: int) -> dict[str, Any]:
        """Return a row: what a method leaves of the model, its time and its memory."""
        tokens = self.study.given("all", seed)
        whole = count_parameters(self.model)["non_embedding"]
        before = _memory_in_use()
        start = time.perf_counter()
        about: dict[str, Any]
        if case == DENSE:
            made, left, about = self.model, whole, {}
        elif case in PEERS:
            peer = PEERS[case]
            pruned = peer.prune(self.model, tokens, share)
            made, left = pruned.model, whole - pruned.removed
            about = {"paper": peer.paper, "plain": peer.plain, "about": pruned.about}
            if pruned.seconds is not None:
                about["seconds"] = pruned.seconds
        else:
            made, left, about = self._own(OWN[case], tokens, share, seed)
        seconds = time.perf_counter() - start
        added = peak_memory()["host"] - before
        return {
            **{"case": case, "share": share, "seed": seed, "windows": len(tokens)},
            **{"parameters": left, "dense_parameters": whole, "seconds": seconds},
            "added_bytes": added,
            **about,
            **self.measure(made, case),
        }

    def _own(
        self, own: Own, tokens: Tensor, share: float, seed: int
    ) -> tuple[CausalLM, int, dict[str, Any]]:
        count = parameters_at(self.model, "non_embedding")
        width, inner = self.model.width, self.model.inner_width
        wanted = share * count(width, inner)
        size: dict[str, Any] = {"params": share, "params_count": "non_embedding"}
        if own.size == "ff_width":
            size = {own.size: _nearest(lambda n: count(width, n), inner, wanted)}
        elif own.size == "width":
            size = {own.size: _nearest(lambda n: count(n, inner), width, wanted)}
        options = make_options(seed=seed, **size, **own.options)
        made, report = narrow_model(self.model, tokens, options)
        about = {
            **{"plain": own.plain, "options": size | own.options},
            "own_windows": report["calibration"]["self_windows"],
            "about": {
                **{"width": report["width"]["new"], "ff_width": report["feed_forward"]["new"]},
                "layers": report["layers"],
            },
        }
        return made, report["parameters"]["narrow"]["non_embedding"], about


def _nearest(parameters: Callable[[int], int], most: int, wanted: float) -> int:
    """Return the number up to ``most`` that comes nearest to so many parameters."""
    return min(range(1, most + 1), key=lambda n: abs(parameters(n) - wanted))


def _memory_in_use() -> int:
    """Return the bytes in use, and have the process's peak begin anew at them, on Linux."""
    gc.collect()
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
    return peak_memory()["host"]


def cases_of(model: CausalLM) -> list[str]:
    """Return the methods that a model allows."""
    fixed = bool(model.architecture.fixed_residual)
    own = [name for name, one in OWN.items() if not (fixed and one.size == "width")]
    return [*own, *PEERS]


def wanted(seeds: list[int], shares: list[float], cases: list[str]) -> Iterator[tuple]:
    """Yield (case, share, seed); the dense model once."""
    yield DENSE, 1.0, 0
    for seed in seeds:
        for share in sorted(shares):  # a search of layers that go begins with the longest
            for case in cases:
                yield case, share, seed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--model", type=Path, help="directory or .gguf (SmolLM2-135M of the demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="(0 1)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="(0.8 0.9)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of calibration ({WINDOWS})")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these methods alone")
    args = parser.parse_args()
    every = [DENSE, *OWN, *PEERS]
    for name in args.only or ():
        if name not in every:
            parser.error(f"--only {name!r}: no method; there are {'; '.join(every)}")
    if any(not 0 < share < 1 for share in args.shares):
        parser.error("--shares: must be greater than 0 and less than 1")
    logging.basicConfig(level=logging.WARNING)
    path = args.model or model_file()
    keys = ("model", "case", "share", "seed", "windows")
    rows = read(args.out) if args.out.exists() else []
    done = {tuple(row[key] for key in keys) for row in rows}
    found = Field(path, args.windows)
    allowed = [DENSE, *cases_of(found.model)]
    about = where(torch.get_num_threads())
    for case, share, seed in wanted(args.seeds, args.shares, allowed[1:]):
        if (path.name, case, share, seed, args.windows) in done:
            continue
        if args.only is not None and case not in args.only:
            continue
        row = about | {"model": path.name} | found.run(case, share, seed)
        append(args.out, [row])
        mean = sum(row["excess"].values()) / len(row["excess"])
        sys.stdout.write(f"{case}, {share:g}, seed {seed}: {mean:.3f}, {row['seconds']:.0f} s\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
