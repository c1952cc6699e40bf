"""Texts that the command line names: read, tokenised, cut into windows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize.calibration.text import (
    HELD_OUT,
    added_around,
    begun,
    held_out,
    random_windows,
    tokenize,
)
from dotresize.cli.checks import check_positions
from dotresize.cli.choices import TextChoices
from dotresize.evaluate import evaluation_windows
from dotresize.models.causal_lm import CausalLM

logger = logging.getLogger("dotresize")


@dataclass(frozen=True)
class Texts:
    """Texts to evaluate on.

    Attributes:
        windows: of each text, by its file's stem, or by its path where two stems are alike.
        unseen: those of a kind that the calibration has not.
    """

    windows: dict[str, Tensor]
    unseen: list[str]


def calibration_streams(choices: TextChoices, model: CausalLM, tokenizer: Any) -> list[Tensor]:
    """Return the tokens of each calibration file."""
    paths = choices.calibration or []
    return [_tokens(path, model, tokenizer, choices.window) for path in paths]


def calibration_windows(choices: TextChoices, streams: list[Tensor], tokenizer: Any) -> Tensor:
    """Return the calibration windows, int64 (windows, length), begun as the tokenizer begins."""
    first, _ = added_around(tokenizer)
    return random_windows(streams, choices.windows, choices.window, choices.seed, None, first)


def recovery_windows(
    choices: TextChoices, streams: list[Tensor], count: int, tokenizer: Any
) -> Tensor:
    """Return windows for the training afterwards, placed otherwise than those of calibration.

    They touch none that is evaluated on because there are no other texts.
    """
    first, _ = added_around(tokenizer)
    apart = None if choices.eval else _held_out(choices, streams, first)
    return random_windows(streams, count, choices.window, choices.seed + 1, apart, first)


def evaluation_texts(
    choices: TextChoices, model: CausalLM, tokenizer: Any, streams: list[Tensor] | None = None
) -> Texts:
    """Return the texts to evaluate on; ValueError where the model has too few positions.

    streams: of the calibration files, of which windows are held out where no texts are named.
    """
    check_positions(choices, model.config)
    windows = {}
    first, _ = added_around(tokenizer)
    if streams is not None and not choices.eval:
        windows = _held_out_windows(choices, streams, first)
    paths = choices.evaluated
    names = _names(paths)
    for path, name in zip(paths, names, strict=True):
        stream = _tokens(path, model, tokenizer, 2)
        windows[name] = evaluation_windows(stream, choices.window, choices.eval_windows, first)
    return Texts(windows, names[len(choices.eval or []) :])


def _names(paths: list[str]) -> list[str]:
    """Return the stem of each file, or its path where two stems are alike."""
    stems = [Path(path).stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else path for path, stem in zip(paths, stems, strict=True)
    ]


def _held_out(choices: TextChoices, streams: list[Tensor], first: int | None) -> list[list[range]]:
    """Return the ranges of each calibration file that are evaluated on."""
    most = choices.eval_windows or HELD_OUT
    own = choices.window - (first is not None)  # tokens of the text itself
    return held_out(streams, choices.windows, own, choices.seed, most)


def _held_out_windows(
    choices: TextChoices, streams: list[Tensor], first: int | None
) -> dict[str, Tensor]:
    """Return windows of the calibration files that were not calibrated on; says which are short."""
    windows = {}
    names = _names(choices.calibration or [])
    ranges = _held_out(choices, streams, first)
    for name, stream, parts in zip(names, streams, ranges, strict=True):
        tokens = len(parts[0]) + (first is not None) if parts else 0
        if tokens < choices.window:
            instead = f"on the {tokens} that are left" if parts else "not at all"
            logger.info(
                "%s: calibration leaves no window of %d tokens; evaluated %s, unless with --eval",
                *(name, choices.window, instead),
            )
        if parts:
            texts = torch.stack([stream[p.start : p.stop] for p in parts])
            windows[f"{name} (held out)"] = begun(texts, first)
    return windows


def _tokens(path: str, model: CausalLM, tokenizer: Any, at_least: int) -> Tensor:
    stream = tokenize(path, tokenizer)
    if len(stream) < at_least:
        raise ValueError(f"text file {path} has {len(stream)} tokens: one window takes {at_least}")
    if int(stream.max()) >= model.config.vocab_size:
        raise ValueError(
            f"text file {path}: the tokenizer gives id {int(stream.max())}, the model's "
            f"vocabulary is {model.config.vocab_size}"
        )
    return stream
