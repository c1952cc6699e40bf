"""``dotresize merge-ff``: merge a language model's feed-forwards, and write what is left of it."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import checkpoint, distributed
from dotresize.accounting import check_weights, peak_memory, unique_parameters, versions
from dotresize.calibration import random_windows
from dotresize.evaluate import perplexity
from dotresize.inputs import (
    Texts,
    check_recovery,
    check_text_files,
    check_windows,
    evaluation_texts,
    find_device,
    tokens_of,
)
from dotresize.merge_ff import ANCHORS, merge_feed_forward
from dotresize.merge_tie import dropped
from dotresize.models.stacks import layers_of, stacks_of
from dotresize.ops.backends import choose
from dotresize.recovery import BATCH_WINDOWS, recover
from dotresize.stages import partial_folder

logger = logging.getLogger("dotresize")


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    device = find_device(args.device)
    _check(args, device)
    checkpoint.check_output(args.out)
    unfinished = partial_folder(args.out)
    if (unfinished / "settings.json").exists():
        raise ValueError(f"{unfinished}: holds an unfinished run of compress; remove it")
    if unfinished.exists() and not args.resume:
        raise ValueError(f"{unfinished}: holds an unfinished run; give --resume, or remove it")
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=True)
    check_weights(model)
    layers = len(layers_of(model, stacks_of(model)[0]))
    if not 2 <= args.merge <= layers:
        raise ValueError(f"--merge {args.merge}: must be 2 to {layers}, the model's layers")
    streams = [tokens_of(path, model, tokenizer, args.window) for path in args.calibration]
    tokens = random_windows(streams, args.windows, args.window, args.seed)
    texts = evaluation_texts(args.eval or [], [], args, model, tokenizer)
    rows = {"dense": _row(model, texts, "dense")}
    merged, report = _merged(args, model, tokens, start=args.start)
    window = report["stacks"]["decoder"]["window"]
    logger.info("layers %d to %d of %d become one feed-forward", window[0], window[-1], layers)
    new = None
    if args.recover is not None:
        new = random_windows(streams, args.recover * BATCH_WINDOWS, args.window, args.seed + 1)
    judge = _Judge(args, model, texts, new)
    rows |= judge.rows("merged", merged)
    if args.compare:
        rows |= _compared(args, model, tokens, judge, report["stacks"]["decoder"])
    if args.recover is not None:
        report["recovery"] = rows["merged + recovery"].pop("recovery")
    report |= {"rows": rows, "versions": versions(), "peak_memory_bytes": peak_memory()}
    report["settings"] = {k: v for k, v in vars(args).items() if k not in ("typed", "verb")}

    def fill(folder: Path) -> None:
        checkpoint.save(merged, tokenizer, folder)
        text = json.dumps(report, indent=2) + "\n"
        (folder / "dotresize.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(args, report), encoding="utf-8")

    checkpoint.write_whole(args.out, fill)
    shutil.rmtree(unfinished, ignore_errors=True)
    sys.stdout.write(f"{_table(rows)}\n\n{args.out} loads with dotresize.load\n")
    if args.plot is not None:
        _plot(args.plot, report)
    return 0


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """What can be refused before the model is read."""
    if distributed.size() > 1:
        raise ValueError("merge-ff: runs in one process; run it without torchrun")
    check_text_files(args)
    check_windows(args)
    choose(args.backend, device)
    if args.anchor not in ANCHORS:
        raise ValueError(f"--anchor {args.anchor}: must be one of {', '.join(ANCHORS)}")
    if args.soft is not None and (args.no_permute or not 0 < args.soft < float("inf")):
        raise ValueError(f"--soft {args.soft:g}: must be positive, and without --no-permute")
    if not 1 <= args.select_windows <= args.windows:
        raise ValueError(f"--select-windows {args.select_windows}: must be 1 to {args.windows}")
    check_recovery(args, device)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'dotresize[plot]'")
    if args.plot is not None and Path(args.plot).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot {args.plot}: must be a .svg, .png or .pdf file")
    if args.plot is not None and not Path(args.plot).absolute().parent.is_dir():
        raise ValueError(f"--plot {args.plot}: its directory does not exist")
    if args.plot is not None and args.start is not None:
        raise ValueError("--plot: there is nothing to draw with --start, which tries one window")


def _merged(
    args: argparse.Namespace, model: Any, tokens: Tensor, **choices: Any
) -> tuple[Any, dict[str, Any]]:
    """By the options given; windows are judged by perplexity on the first of the tokens."""
    judged = tokens[: args.select_windows]
    given = {"permute": not args.no_permute, "soft": args.soft, "anchor": args.anchor} | choices
    return merge_feed_forward(
        model,
        [{"input_ids": ids} for ids in tokens.split(2)],
        k=args.merge,
        metric=partial(_minus_perplexity, windows=judged),
        backend=args.backend,
        **given,
    )


def _minus_perplexity(model: Any, windows: Tensor) -> float:
    """Minus infinity for a model whose loss is not finite: the worst, and no reason to stop."""
    try:
        return -perplexity(model, windows)
    except ValueError:
        return -float("inf")


class _Judge:
    """Figures of a model made from the dense one, and of what a short training makes of it."""

    def __init__(
        self, args: argparse.Namespace, dense: Any, texts: Texts, tokens: Tensor | None
    ) -> None:
        self._args, self._dense, self._texts, self._tokens = args, dense, texts, tokens

    def rows(self, name: str, model: Any) -> dict[str, dict[str, Any]]:
        found = {name: _row(model, self._texts, name)}
        if self._tokens is not None:
            training = self._recover(name, model, self._tokens)
            after = f"{name} + recovery"
            found[after] = _row(model, self._texts, after) | {"recovery": training}
        return found

    def others(self, name: str, model: Any) -> dict[str, dict[str, Any]]:
        """Of what is only compared: if that fails, it costs its row and no more."""
        try:
            return self.rows(name, model)
        except ValueError as error:
            logger.warning("%s: %s; left out of the comparison", name, error)
            return {}

    def _recover(self, name: str, model: Any, tokens: Tensor) -> dict[str, Any]:
        unfinished = partial_folder(self._args.out)
        choices = {"seed": self._args.seed, "learning_rate": self._args.learning_rate}
        folder = unfinished / name.replace(" ", "-")
        try:
            return recover(self._dense, model, tokens, folder=folder, **choices)
        except ValueError:
            if not self._args.resume:  # other choices could not go on from it
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # it holds another's
                    unfinished.rmdir()
            raise


def _compared(
    args: argparse.Namespace, model: Any, tokens: Tensor, judge: _Judge, chosen: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The same window merged in other ways, and its layers dropped but the anchor."""
    others: dict[str, dict[str, Any]] = {
        "without permutation": {"permute": False, "soft": None},
        "soft alignment": {"permute": True, "soft": args.soft or 0.03},
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, choices in others.items():
        other, _ = _merged(args, model, tokens, start=chosen["window"][0], **choices)
        rows |= judge.others(name, other)
    other, stack = copy.deepcopy(model), stacks_of(model)[0]
    gone = [i for i in chosen["window"] if i != chosen["anchor"]]
    lost = sum(p.numel() for i in gone for p in layers_of(model, stack)[i].parameters())
    with dropped(other, stack, gone):
        found = judge.others("layers dropped", other)
    for row in found.values():
        row["parameters"] -= lost
    return rows | found


def _row(model: Any, texts: Texts, name: str) -> dict[str, Any]:
    found = {
        text: perplexity(model, windows, desc=f"{name}, {text}")
        for text, windows in texts.windows.items()
    }
    return {"parameters": unique_parameters(model), "perplexity": found}


def _plot(path: str, report: dict[str, Any]) -> None:
    """Perplexity of every window, by its first layer."""
    from matplotlib.figure import Figure

    profile = report["stacks"]["decoder"]["profile"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    sound = [one for one in profile if one["metric"] is not None]
    axes.plot([one["start"] for one in sound], [-one["metric"] for one in sound], "o-")
    axes.axhline(-report["metric"]["dense"], color="grey", linestyle="--", label="dense")
    axes.set(xlabel="first layer of the window", ylabel="perplexity, merged", yscale="log")
    axes.legend()
    figure.savefig(path)


def _table(rows: dict[str, dict[str, Any]]) -> str:
    texts = list(rows["dense"]["perplexity"])
    lines = [["", "parameters", *(f"perplexity, {text}" for text in texts)]]
    for name, row in rows.items():
        figures = [f"{row['perplexity'][text]:.2f}" for text in texts]
        lines.append([name, f"{row['parameters'] / 1e6:.1f} M", *figures])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = []
    for name, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        padded.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join([padded[0].rstrip(), "-" * len(padded[0]), *padded[1:]])


def _card(args: argparse.Namespace, report: dict[str, Any]) -> str:
    window = report["stacks"]["decoder"]["window"]
    parameters = report["parameters"]
    name = Path(args.model).name
    return f"""---
library_name: dotresize
base_model: {json.dumps(name)}
tags: [dotresize, compressed]
---

# {name}, feed-forwards merged

Layers {window[0]} to {window[-1]} share one feed-forward: {parameters["dense"] / 1e6:.1f} M
parameters became {parameters["merged"] / 1e6:.1f} M. `dotresize.load` loads it (dotresize
{report["versions"]["dotresize"]}).

```
{_table(report["rows"])}
```
"""
