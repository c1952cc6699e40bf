"""Texts that the command line names: read, tokenised, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dotresize.calibration.text import added_around, random_windows, tokenize
from dotresize.cli.choices import TextChoices
from dotresize.evaluate import evaluation_windows
from dotresize.models.causal_lm import CausalLM


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
    return random_windows(streams, choices.windows, choices.window, choices.seed, first)


def recovery_windows(
    choices: TextChoices, streams: list[Tensor], count: int, tokenizer: Any
) -> Tensor:
    """Return windows for the training afterwards, placed otherwise than those of calibration."""
    first, _ = added_around(tokenizer)
    return random_windows(streams, count, choices.window, choices.seed + 1, first)


def evaluation_texts(choices: TextChoices, model: CausalLM, tokenizer: Any) -> Texts:
    """Return the texts to evaluate on; ValueError where the model has too few positions."""
    positions = getattr(model.config, "max_position_embeddings", choices.window)
    if choices.window > positions:
        raise ValueError(f"--window {choices.window}: the model has {positions} positions")
    paths = choices.evaluated
    stems = [Path(path).stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else path for path, stem in zip(paths, stems, strict=True)
    ]
    windows = {}
    first, _ = added_around(tokenizer)
    for path, name in zip(paths, names, strict=True):
        stream = _tokens(path, model, tokenizer, 2)
        windows[name] = evaluation_windows(stream, choices.window, choices.eval_windows, first)
    return Texts(windows, names[len(choices.eval or []) :])


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
