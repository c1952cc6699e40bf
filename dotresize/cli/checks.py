"""What the command line refuses before a model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dotresize import distributed
from dotresize.calibration.text import read_text
from dotresize.cli.choices import RecoveryChoices, TextChoices
from dotresize.recovery import check as check_trainer


def check_windows(choices: TextChoices) -> None:
    """Raise ValueError for windows without a token to predict."""
    if choices.window < 2:
        raise ValueError(f"--window {choices.window}: must be at least 2 tokens")
    if choices.eval_windows is not None and choices.eval_windows < 1:
        raise ValueError(f"--eval-windows {choices.eval_windows}: must be at least 1")


def check_positions(choices: TextChoices, config: Any) -> None:
    """Raise ValueError for windows that are longer than a model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and not choices.default_window and choices.window > positions:
        raise ValueError(f"--window {choices.window}: the model has {positions} positions")


def check_texts(choices: TextChoices) -> None:
    """Raise ValueError for texts that cannot be read, or that give no windows."""
    if not choices.calibration:
        raise ValueError("--calibration: give at least one text or .jsonl file")
    check_files(choices)
    if choices.windows < len(choices.calibration):
        raise ValueError(
            f"--windows {choices.windows}: must be at least one for each of the "
            f"{len(choices.calibration)} calibration files"
        )
    if not -(2**63) <= choices.seed < 2**63:
        raise ValueError(f"--seed {choices.seed}: must fit in 64 bits")


def check_files(choices: TextChoices) -> None:
    """Raise ValueError for texts that cannot be read, or would count twice in the calibration."""
    for path in choices.files:
        read_text(path)
    check_distinct("--calibration", choices.calibration or [])


def check_distinct(option: str, paths: list[str]) -> None:
    """Raise ValueError for a path that an option is given twice."""
    seen: set[Path] = set()
    for path in paths:
        if Path(path).resolve() in seen:
            raise ValueError(f"{option} {path}: is given twice")
        seen.add(Path(path).resolve())


def check_unseen(choices: TextChoices) -> None:
    """Raise ValueError for a text that is said to be unseen, and is not."""
    for path in choices.unseen or []:
        if path in [*(choices.calibration or []), *(choices.eval or [])]:
            raise ValueError(f"--unseen {path}: is given to --calibration or --eval as well")


def check_recovery(choices: RecoveryChoices, device: torch.device) -> None:
    """Raise ValueError for a training that cannot run."""
    if choices.recover is None:
        return
    if distributed.size() > 1:
        raise ValueError("--recover: trains in one process; run it without torchrun")
    if choices.recover < 1:
        raise ValueError(f"--recover {choices.recover}: must be at least 1 step")
    if not 0 < choices.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate {choices.learning_rate:g}: must be positive")
    check_trainer(device)


def find_device(name: str) -> torch.device:
    """Return the device that the command line names."""
    if name == "auto":
        return distributed.local_device()
    try:
        device = torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and distributed.size() > 1:
        if name != "cuda":
            raise ValueError(f"--device {name}: give cuda; every process takes one of its own")
        return distributed.local_device()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu or cuda")
    return device
