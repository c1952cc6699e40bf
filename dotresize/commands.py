"""What each verb of the command line does."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dotresize
from dotresize import checkpoint, report
from dotresize.calibration import Statistics, collect, random_windows, read_text, tokenize
from dotresize.evaluate import evaluation_windows, perplexity
from dotresize.models import architecture_of
from dotresize.ops.backends import choose
from dotresize.pipeline import METHODS, check_options, check_weights, compress, count_parameters
from dotresize.width import choose_width

logger = logging.getLogger("dotresize")

# Options that decide what the output holds; a resumed run must have the same.
_SETTINGS = (
    *("model", "width", "method", "scope", "reg", "factor", "no_refit", "ridge", "untie"),
    *("calibration", "windows", "window", "seed", "eval", "eval_windows"),
)


def run(args: argparse.Namespace) -> int:
    """Dispatch on ``args.verb``; returns the exit code."""
    return {"compress": _compress, "eval": _eval, "info": _info}[args.verb](args)


def _info(_: argparse.Namespace) -> int:
    import numpy
    import transformers

    lines = [f"dotresize {dotresize.__version__}"]
    for name, details in dotresize.backends().items():
        available = details.pop("available")
        what = ", ".join(f"{key} {value}" for key, value in details.items())
        lines.append(f"{name:7} {'' if available else 'not '}available: {what}")
    lines.append(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"transformers {transformers.__version__}"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _eval(args: argparse.Namespace) -> int:
    device = _device(args.device)
    _check_windows(args)
    model, tokenizer = checkpoint.load(args.model, device, to_narrow=False)
    check_weights(model)
    for name, windows in _evaluation_texts(args, model, tokenizer).items():
        sys.stdout.write(f"{name}  {perplexity(model, windows, desc=name):.4f}\n")
    return 0


def _compress(args: argparse.Namespace) -> int:
    device = _device(args.device)
    _check_options(args, device)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings["model_files"] = _files(args.model)
    settings["text_sha256"] = _digests([*args.calibration, *(args.eval or [])])
    if args.resume and _already_done(args.out, settings):
        logger.info("%s is complete with these settings; nothing to do", args.out)
        return 0
    checkpoint.check_output(args.out)
    model, tokenizer = checkpoint.load(args.model, device, to_narrow=True)
    check_weights(model)
    tokens, texts = _inputs(args, model, tokenizer)
    narrow, rows = _narrowed(args, model, tokens, texts)
    *others, main_report = rows
    main_report["settings"] = settings
    if args.compare:
        main_report["compared"] = others

    def fill(folder: Path) -> None:
        checkpoint.save(narrow, tokenizer, folder)
        report.write(main_report, folder, args.model)

    checkpoint.write_whole(args.out, fill)
    sys.stdout.write(f"{report.table(rows)}\n\n{args.out} loads with plain transformers\n")
    return 0


def _inputs(
    args: argparse.Namespace, model: Any, tokenizer: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration windows and evaluation texts; announces the width when all is checked."""
    width = model.config.hidden_size
    divisor = architecture_of(model.config).divisor(model.config)
    new_width = choose_width(args.width, width, divisor)
    streams = [_tokens_of(path, model, tokenizer, args.window) for path in args.calibration]
    tokens = random_windows(streams, args.windows, args.window, args.seed)
    texts = _evaluation_texts(args, model, tokenizer)
    note = f", a multiple of {divisor} as its loader asks" if divisor > 1 else ""
    logger.info("width %d -> %d (asked for %g%s)", width, new_width, args.width, note)
    return tokens, texts


def _narrowed(
    args: argparse.Namespace, model: Any, tokens: Tensor, texts: dict[str, Tensor]
) -> tuple[Any, list[dict[str, Any]]]:
    """The narrowed model, and the reports of dense, what it is compared with, and itself."""
    methods = METHODS if args.compare else (args.method,)
    statistics = collect(
        model, tokens, cost="dot" in methods, moment="pca" in methods, backend=args.backend
    )
    dense = _dense_report(model, texts)
    rows = [dense]
    for method in ("magnitude", "pca", "dot") if args.compare else ():
        if args.no_refit and method == args.method:
            continue  # it is the last row
        narrow, row = _one(args, model, tokens, statistics, method=method, refit=False)
        rows.append(_evaluate_into(row, narrow, texts, dense))
        del narrow
    narrow, row = _one(args, model, tokens, statistics, method=args.method, refit=not args.no_refit)
    rows.append(_evaluate_into(row, narrow, texts, dense))
    return narrow, rows


def _one(
    args: argparse.Namespace,
    model: Any,
    tokens: Tensor,
    statistics: Statistics,
    *,
    method: str,
    refit: bool,
) -> tuple[Any, dict[str, Any]]:
    return compress(
        model,
        tokens,
        width=args.width,
        method=method,
        scope=args.scope,
        refit=refit,
        reg=args.reg,
        factor=args.factor,
        ridge=args.ridge,
        untie=args.untie,
        backend=args.backend,
        statistics=statistics,
    )


def _evaluate_into(
    row: dict[str, Any], model: Any, texts: dict[str, Tensor], dense: dict[str, Any] | None
) -> dict[str, Any]:
    start = time.perf_counter()
    row["perplexity"] = {
        name: perplexity(model, windows, desc=f"{report.label(row)}, {name}")
        for name, windows in texts.items()
    }
    row["seconds"]["evaluation"] = time.perf_counter() - start if texts else 0.0
    if dense is not None:
        row["dense_perplexity"] = dense["perplexity"]
    return row


def _dense_report(model: Any, texts: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": "dense",
        "width": {"new": model.config.hidden_size},
        "parameters": {"narrow": count_parameters(model)},
        "tied": bool(model.config.tie_word_embeddings),
        "plain_checkpoint": True,
        "seconds": {},
    }
    return _evaluate_into(row, model, texts, None)


def _check_options(args: argparse.Namespace, device: torch.device) -> None:
    """What can be refused before the model is read."""
    if not args.calibration:
        raise ValueError("--calibration: give at least one text or .jsonl file")
    check_options(
        method=args.method,
        scope=args.scope,
        reg=args.reg,
        factor=args.factor,
        ridge=args.ridge,
    )
    for path in [*args.calibration, *(args.eval or [])]:
        read_text(path)
    if args.windows < len(args.calibration):
        raise ValueError(
            f"--windows {args.windows}: must be at least one for each of the "
            f"{len(args.calibration)} calibration files"
        )
    if not -(2**63) <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: must fit in 64 bits")
    if args.compare and not args.eval:
        raise ValueError("--compare: give texts to compare on with --eval")
    _check_windows(args)
    choose(args.backend, device)


def _check_windows(args: argparse.Namespace) -> None:
    if args.window < 2:
        raise ValueError(f"--window {args.window}: must be at least 2 tokens")
    if args.eval_windows is not None and args.eval_windows < 1:
        raise ValueError(f"--eval-windows {args.eval_windows}: must be at least 1")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu or cuda")
    return device


def _tokens_of(path: str, model: Any, tokenizer: Any, at_least: int) -> Tensor:
    stream = tokenize(path, tokenizer)
    if len(stream) < at_least:
        raise ValueError(f"text file {path} has {len(stream)} tokens: one window takes {at_least}")
    if int(stream.max()) >= model.config.vocab_size:
        raise ValueError(
            f"text file {path}: the tokenizer gives id {int(stream.max())}, the model's "
            f"vocabulary is {model.config.vocab_size}"
        )
    return stream


def _evaluation_texts(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Windows of each text, by its file's stem, or by its path where two stems are alike."""
    positions = getattr(model.config, "max_position_embeddings", args.window)
    if args.window > positions:
        raise ValueError(f"--window {args.window}: the model has {positions} positions")
    paths = args.eval or []
    stems = [Path(path).stem for path in paths]
    texts = {}
    for path, stem in zip(paths, stems, strict=True):
        stream = _tokens_of(path, model, tokenizer, 2)
        name = stem if stems.count(stem) == 1 else path
        texts[name] = evaluation_windows(stream, args.window, args.eval_windows)
    return texts


def _digests(paths: list[str]) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def _files(model: str) -> list[list]:
    """Names, sizes and dates of the files a model is read from; nothing for a hub id."""
    path = Path(model)
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _already_done(out: str, settings: dict[str, Any]) -> bool:
    path = Path(out) / "dotresize.json"
    if not path.is_file():
        return False
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is not the record of a finished run") from None
    if not list(path.parent.glob("*.safetensors")):
        raise ValueError(f"output {out}: its weights are missing")
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"output {out}: made with another {changed[0]} "
            f"({before.get(changed[0])} then, {settings[changed[0]]} now)"
        )
    return True
