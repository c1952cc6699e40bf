"""What the command line reads: devices, texts, windows, and what a finished output was made of."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.calibration import read_text, tokenize
from dotresize.evaluate import evaluation_windows
from dotresize.ops.backends import choose
from dotresize.options import Options
from dotresize.recovery import check as check_trainer


def check_windows(args: argparse.Namespace) -> None:
    if args.window < 2:
        raise ValueError(f"--window {args.window}: must be at least 2 tokens")
    if args.eval_windows is not None and args.eval_windows < 1:
        raise ValueError(f"--eval-windows {args.eval_windows}: must be at least 1")


def check_text_files(args: argparse.Namespace) -> None:
    """That the texts can be read, and give windows."""
    if not args.calibration:
        raise ValueError("--calibration: give at least one text or .jsonl file")
    for path in [*args.calibration, *(args.eval or []), *(getattr(args, "unseen", None) or [])]:
        read_text(path)
    if args.windows < len(args.calibration):
        raise ValueError(
            f"--windows {args.windows}: must be at least one for each of the "
            f"{len(args.calibration)} calibration files"
        )
    if not -(2**63) <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: must fit in 64 bits")


def check_recovery(args: argparse.Namespace, device: torch.device) -> None:
    """--recover and what belongs to it."""
    if getattr(args, "recover", None) is None:
        return
    if distributed.size() > 1:
        raise ValueError("--recover: trains in one process; run it without torchrun")
    if args.recover < 1:
        raise ValueError(f"--recover {args.recover}: must be at least 1 step")
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate {args.learning_rate:g}: must be positive")
    check_trainer(device)


def check_files(args: argparse.Namespace, options: Options, device: torch.device) -> None:
    """What can be refused before the model is read."""
    check_text_files(args)
    check_recovery(args, device)
    if getattr(args, "recover", None) is not None and options.per_location:
        raise ValueError("--recover: trains plain checkpoints only, with one map for all")
    for path in args.unseen or []:
        if path in [*args.calibration, *(args.eval or [])]:
            raise ValueError(f"--unseen {path}: is given to --calibration or --eval as well")
    if not args.eval and not args.unseen and getattr(args, "compare", True):
        raise ValueError(f"{args.verb}: give texts to compare on with --eval")
    check_windows(args)
    choose(args.backend, device)


def find_device(name: str) -> torch.device:
    if name == "auto":
        return distributed.local_device()
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and distributed.size() > 1:
        if name != "cuda":
            raise ValueError(f"--device {name}: give cuda; every process takes one of its own")
        return distributed.local_device()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu or cuda")
    return device


def tokens_of(path: str, model: Any, tokenizer: Any, at_least: int) -> Tensor:
    stream = tokenize(path, tokenizer)
    if len(stream) < at_least:
        raise ValueError(f"text file {path} has {len(stream)} tokens: one window takes {at_least}")
    if int(stream.max()) >= model.config.vocab_size:
        raise ValueError(
            f"text file {path}: the tokenizer gives id {int(stream.max())}, the model's "
            f"vocabulary is {model.config.vocab_size}"
        )
    return stream


@dataclass(frozen=True)
class Texts:
    """Texts to evaluate on.

    Attributes:
        windows: of each text, by its file's stem, or by its path where two stems are alike.
        unseen: those of a kind that the calibration has not.
    """

    windows: dict[str, Tensor]
    unseen: list[str]


def evaluation_texts(
    seen: list[str], unseen: list[str], args: argparse.Namespace, model: Any, tokenizer: Any
) -> Texts:
    positions = getattr(model.config, "max_position_embeddings", args.window)
    if args.window > positions:
        raise ValueError(f"--window {args.window}: the model has {positions} positions")
    paths = [*seen, *unseen]
    stems = [Path(path).stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else path for path, stem in zip(paths, stems, strict=True)
    ]
    windows = {}
    for path, name in zip(paths, names, strict=True):
        stream = tokens_of(path, model, tokenizer, 2)
        windows[name] = evaluation_windows(stream, args.window, args.eval_windows)
    return Texts(windows, names[len(seen) :])


def digests(paths: list[str]) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def files(model: str) -> list[list]:
    """Names, sizes and dates of the files a model is read from; nothing for a hub id."""
    path = Path(model)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def already_done(out: str, settings: dict[str, Any]) -> bool:
    path = Path(out) / "dotresize.json"
    if not path.is_file():
        return False
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is not the record of a finished run") from None
    if not list(path.parent.glob("*.safetensors")):
        raise ValueError(f"output {out}: its weights are missing")
    refuse_changes(Path(out), settings, before)
    return True


def refuse_changes(made: Path, settings: dict[str, Any], before: dict[str, Any]) -> None:
    """ValueError naming the first setting that was another when ``made`` was written."""
    for name, value in settings.items():
        if value != before.get(name):
            raise ValueError(
                f"output {made}: made with another {name} ({before.get(name)} then, {value} now)"
            )
