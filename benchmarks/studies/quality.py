"""How much of a model survives: every method at equal size, on text it saw and on text it did not.

    python -m benchmarks.studies.quality headline --out FILE     the table of docs/compress.md
    python -m benchmarks.studies.quality study --out FILE        all cases of CASES
    python -m benchmarks.studies.quality maps --out FILE --seeds 0 1
    python -m benchmarks.studies.quality amounts --out FILE --windows 6
    python -m benchmarks.studies.quality layers --out FILE --seeds 0 1
    python -m benchmarks.studies.quality shares --out FILE --model MODEL
    python -m benchmarks.studies.quality recipes --out FILE --windows 96 --window 128

The cases are in quality_cases.py. Windows begin as the model's tokenizer begins a text.

Figure of merit: excess = ln(perplexity / dense perplexity), on Wikipedia articles, news and
programming documentation that are never calibrated on. Each case runs with all three sources in
the calibration, and once more for each source with that one left out. A row is appended as soon as
a case is finished; a run that is started again skips the rows that FILE has.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.calibration.self_generated import sample
from dotresize.calibration.statistics import Statistics, collect
from dotresize.calibration.text import added_around, random_windows, tokenize
from dotresize.checkpoint import load_with_tokenizer
from dotresize.compression import make_options
from dotresize.evaluate import evaluation_windows, perplexity
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import parameters_at
from dotresize.narrow.pipeline import narrow_model

from ..demo.texts import SOURCES, model_file, write_texts
from ..rows import append, read, where
from .quality_cases import (
    AMOUNTS,
    CASES,
    HEADLINE,
    KEPT_SETS,
    LAYERS,
    MAPS,
    MIXTURES,
    RECIPES,
    SHARES,
    WINDOWS,
    Case,
)

WINDOW = 512
EVAL_WINDOWS = 4
GROUPS = {
    **{"study": CASES, "maps": MAPS, "amounts": AMOUNTS, "layers": LAYERS, "shares": SHARES},
    "recipes": RECIPES,
}


class Study:
    """The model, its texts, and one calibration at a time."""

    def __init__(
        self,
        windows: int,
        *,
        window: int = WINDOW,
        gradients: bool = False,
        model: Path | None = None,
    ) -> None:
        """Read model and texts.

        window: tokens of each for calibration; gradients: whether maps will heed what the output
        feels; model: SmolLM2-135M if not given.
        """
        self.windows, self.window, self._gradients = windows, window, gradients
        path = model or model_file()
        self.name = path.name
        cpu = torch.device("cpu")
        self.model, self.tokenizer = load_with_tokenizer(str(path), cpu, to_narrow=True)
        self.first, _ = added_around(self.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            calibration, held_out = write_texts(Path(folder))
            self.streams = [tokenize(path, self.tokenizer) for path in calibration]
            texts = [tokenize(path, self.tokenizer) for path in held_out]
        self.texts = {
            name: evaluation_windows(text, WINDOW, EVAL_WINDOWS, self.first)
            for name, text in zip(SOURCES, texts, strict=True)
        }
        self.dense = self.perplexities(self.model)
        self._calibration: tuple[Any, Tensor, Statistics] | None = None
        self._own: dict[tuple[int, bool], Tensor] = {}

    def perplexities(self, model: CausalLM) -> dict[str, float]:
        return {name: perplexity(model, text, desc=name) for name, text in self.texts.items()}

    def given(self, mixture: str, seed: int) -> Tensor:
        """Return windows of a mixture: the same number of tokens, however many sources share it."""
        streams = [self.streams[SOURCES.index(name)] for name in MIXTURES[mixture]]
        return random_windows(streams, self.windows, self.window, seed, None, self.first)

    def own(self, seed: int, likely: bool) -> Tensor:
        """Return windows that the model writes; see ``Case``."""
        if (seed, likely) not in self._own:
            count = make_options().own_windows(self.windows)
            more = -(-count // 4) if likely else 0
            written = sample(self.model, count + more, self.window, seed, self.first)
            if likely:
                lost = [perplexity(self.model, window[None]) for window in written]
                written = written[torch.tensor(lost).topk(count, largest=False).indices]
            self._own[seed, likely] = written
        return self._own[seed, likely]

    def calibration(
        self, mixture: str, seed: int, case: Case, narrows: bool
    ) -> tuple[Tensor, Statistics]:
        """Return windows and statistics of a mixture, kept until another one is asked for.

        narrows: whether the residual will be narrowed, which is what statistics are of.
        """
        key = (mixture, seed, case.own_text, case.likely, narrows)
        if self._calibration is None or self._calibration[0] != key:
            self._calibration = None
            tokens = self.given(mixture, seed)
            if case.own_text:
                tokens = torch.cat([tokens, self.own(seed, case.likely)])
            statistics = Statistics.none(tokens.numel(), self.model.width)
            if narrows:
                statistics = collect(
                    self.model,
                    tokens,
                    apart=True,
                    fisher=self._gradients,
                    gradient_cost=self._gradients,
                )
            statistics.own_windows = len(tokens) - self.windows
            self._calibration = (key, tokens, statistics)
        return self._calibration[1:]

    def _zeros(self, report: dict[str, Any]) -> int:
        """Return how many parameters are zeros that layers are filled up with."""
        own = report["layer_widths"]
        if own is None or not report["plain_checkpoint"]:
            return 0
        count = parameters_at(self.model, "non_embedding")
        each = (count(self.model.width, 2) - count(self.model.width, 1)) // len(self.model.layers)
        return each * sum(report["feed_forward"]["new"] - width for width in own["widths"])

    def run(self, case: Case, mixture: str, seed: int) -> dict[str, Any]:
        options = dict(case.options)
        if case.kept is not None:
            options["targets"] = partial(KEPT_SETS[case.kept], self.model.module)
        if "params" in options:  # what it needs hangs on what it chooses
            tokens, statistics = self.given(mixture, seed), None
            options |= {"seed": seed} | ({} if case.own_text else {"self_windows": 0})
        else:
            narrows = options.get("width") is not None
            tokens, statistics = self.calibration(mixture, seed, case, narrows)
        start = time.perf_counter()
        narrow, report = narrow_model(self.model, tokens, make_options(**options), statistics)
        seconds = time.perf_counter() - start
        found = self.perplexities(narrow)
        return {
            **{"model": self.name, "case": case.name, "mixture": mixture, "seed": seed},
            **{"windows": self.windows, "window": self.window, "first_token": self.first},
            "own_windows": report["calibration"]["self_windows"],
            **{"own_text": case.own_text, "eval_windows": EVAL_WINDOWS},
            "options": case.options,
            "kept": case.kept,
            "perplexity": found,
            "dense_perplexity": self.dense,
            "excess": {name: math.log(found[name] / self.dense[name]) for name in found},
            "width": report["width"]["new"],
            "ff_width": report["feed_forward"]["new"],
            "layers": report["layers"],
            "layer_widths": _without_curves(report["layer_widths"]),
            "tied": report["tied"],
            "plain_checkpoint": report["plain_checkpoint"],
            "parameters": report["parameters"]["narrow"],
            "zeros": self._zeros(report),
            "dense_parameters": report["parameters"]["dense"],
            "refit": report["refit"],
            "budget": report["budget"],
            "seconds": round(seconds, 1),
        }


def _without_curves(allocation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an allocation as a row has room for."""
    if allocation is None:
        return None
    return {name: value for name, value in allocation.items() if name != "curves"}


def cases_of(which: str) -> list[Case]:
    """Return the cases of a group; the headline is a part of the study."""
    if which == "headline":
        return [case for case in CASES if case.name in HEADLINE]
    return list(GROUPS[which])


def wanted(which: str, seeds: list[int]) -> Iterator[tuple[Case, str, int]]:
    """Return cases to run, those of one calibration together."""
    cases = sorted(cases_of(which), key=lambda case: case.own_text)
    for seed in seeds:
        for mixture in MIXTURES:
            for case in cases:
                if mixture == "all" or case.out_of_domain:
                    yield case, mixture, seed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("which", choices=("headline", *GROUPS))
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"calibration windows ({WINDOWS})"
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, help=f"tokens of a calibration window ({WINDOW})"
    )
    parser.add_argument(
        "--model", type=Path, help="directory or .gguf file (SmolLM2-135M of the demo)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the windows (0)")
    parser.add_argument(
        "--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES), help="(all of them)"
    )
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases alone")
    parser.add_argument(
        "--no-own-text", action="store_true", help="calibrate on the windows alone, in every case"
    )
    args = parser.parse_args()
    names = [case.name for case in cases_of(args.which)]
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only {name!r}: no case of {args.which}; it has {'; '.join(names)}")
    logging.basicConfig(level=logging.WARNING)
    done = {
        (row["case"], row["mixture"], row["seed"], row["windows"], row.get("window", WINDOW))
        for row in (read(args.out) if args.out.exists() else [])
        if row.get("model", model_file().name) == (args.model or model_file()).name
    }
    left = [
        (case, mixture, seed)
        for case, mixture, seed in wanted(args.which, args.seeds)
        if (case.name, mixture, seed, args.windows, args.window) not in done
        and (args.only is None or case.name in args.only)
        and mixture in args.mixtures
    ]
    if not left:
        return 0
    about = where(torch.get_num_threads())
    gradients = args.which in ("maps", "amounts", "recipes")
    study = Study(args.windows, window=args.window, gradients=gradients, model=args.model)
    for i, (case, mixture, seed) in enumerate(left):
        start = time.perf_counter()
        case = replace(case, own_text=case.own_text and not args.no_own_text)
        row = about | study.run(case, mixture, seed)
        row["wall_seconds"] = round(time.perf_counter() - start, 1)
        append(args.out, [row])
        figures = "  ".join(f"{name} {value:.3f}" for name, value in row["excess"].items())
        sys.stdout.write(f"{i + 1}/{len(left)}  {case.name}, {mixture}: {figures}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
