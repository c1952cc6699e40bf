"""What each verb of the command line does."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dotresize
from dotresize import checkpoint, comparison, distributed, merge_command, page, planning, report
from dotresize.accounting import check_weights, peak_memory
from dotresize.calibration import random_windows, read_text
from dotresize.evaluate import perplexity
from dotresize.inputs import (
    Texts,
    already_done,
    check_files,
    check_windows,
    digests,
    evaluation_texts,
    files,
    find_device,
    tokens_of,
)
from dotresize.memory import shown
from dotresize.models import architecture_of
from dotresize.options import Options
from dotresize.pipeline import calibrate
from dotresize.recovery import BATCH_WINDOWS
from dotresize.stages import Stages, partial_folder
from dotresize.targets import check_kept, read_targets
from dotresize.width import (
    check_config,
    check_residual,
    choose_inner_width,
    choose_width,
    residual_share,
)

logger = logging.getLogger("dotresize")

# Options that decide what the output holds; a resumed run must have the same.
_SETTINGS = (
    *(
        "model",
        "width",
        "energy",
        "params",
        "params_count",
        "method",
        "targets",
        "scope",
        "ff_width",
        "ff_method",
    ),
    *("reg", "steps", "factor", "no_refit", "ridge", "untie", "self_windows"),
    *("calibration", "windows", "window", "seed", "eval", "unseen", "eval_windows"),
    *("recover", "learning_rate"),
)


def run(args: argparse.Namespace) -> int:
    """Dispatch on ``args.verb``; returns the exit code."""
    verbs = {"compress": _compress, "sweep": _sweep, "eval": _eval, "info": _info}
    verb = (verbs | {"merge-ff": merge_command.run})[args.verb]
    distributed.begin()
    if distributed.rank():
        logger.setLevel(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"
    code = verb(args)
    distributed.end()  # not after an error: the others may wait for what will not come
    return code


def _say(text: str) -> None:
    """What is written once, however many processes there are."""
    if distributed.rank() == 0:
        sys.stdout.write(f"{text}\n")


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
    _say("\n".join(lines))
    return 0


def _eval(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    check_windows(args)
    for path in args.eval:
        read_text(path)
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=False)
    check_weights(model)
    for name, windows in evaluation_texts(args.eval, [], args, model, tokenizer).windows.items():
        _say(f"{name}  {perplexity(model, windows, desc=name):.4f}")
    return 0


def _compress(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    options = _options(args)
    check_files(args, options, device)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings["by_parts"] = args.memory is not None  # how much of it changes no weight
    settings["model_files"] = files(args.model)
    named = [*args.calibration, *(args.eval or []), *(args.unseen or [])]
    settings["text_sha256"] = digests([*named, *filter(None, [args.targets])])
    also = {"compare": args.compare, "figures": args.report is not None}
    if args.resume and already_done(args.out, settings):
        if partial_folder(args.out).exists():
            Stages(args.out, settings | also, resume=True).remove()
        page_too = "; no page is made of it" if args.report is not None else ""
        logger.info("%s is complete with these settings; nothing to do%s", args.out, page_too)
        return 0
    checkpoint.check_output(args.out)
    if args.report is not None:
        page.check()
        if Path(args.out).resolve().is_relative_to(checkpoint.check_output(args.report).resolve()):
            raise ValueError(f"--report {args.report}: must not be or hold the output directory")
        options = replace(options, figures=True)
    if args.memory is not None:
        planning.check(args, options)
    stages = Stages(args.out, settings | also, resume=args.resume)
    distributed.wait()  # nobody writes before all have looked
    try:
        return _run_stages(args, options, settings, stages, device)
    except ValueError:
        if not args.resume:  # the same settings would fail again; what was found stays
            stages.remove()
        raise


def _run_stages(
    args: argparse.Namespace,
    options: Options,
    settings: dict[str, Any],
    stages: Stages,
    device: torch.device,
) -> int:
    work = None if args.memory is None else stages.shelve()
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=True, work=work)
    check_weights(model)
    streams, tokens, texts = _inputs(args, options, model, tokenizer)
    plan = None if work is None else planning.make_plan(args, options, model, tokens, texts)
    narrow, rows = comparison.narrowed(
        model, tokenizer, tokens, options, texts, stages, compare=args.compare
    )
    figures = rows[-1].pop("figures", None)
    if args.recover is not None:
        new = random_windows(streams, args.recover * BATCH_WINDOWS, args.window, args.seed + 1)
        choices = {"seed": args.seed, "learning_rate": args.learning_rate}
        row = stages.recovered(model, narrow, new, rows[-1], **choices)
        rows.append(comparison.evaluate_into(row, narrow, texts))
    *others, last = rows
    last["settings"] = settings
    if plan is not None:
        last["predicted_memory_bytes"] = {"host": plan.host, "device": plan.device}
        last["peak_memory_bytes"] = peak_memory()
    if args.compare:
        last["compared"] = others

    def fill(folder: Path) -> None:
        checkpoint.save(narrow, tokenizer, folder)
        report.write(last, folder, args.model)

    checkpoint.write_whole(args.out, fill)
    distributed.wait()  # nobody needs its stages any more
    stages.remove()
    if args.report is not None:
        _write_page(args, args.report, f"{Path(args.model).name}, narrowed", rows, figures)
    if plan is not None:
        peak = last["peak_memory_bytes"]["host"]
        logger.info("memory: a peak of %s, %s expected", shown(peak), shown(plan.host))
    loader = "dotresize.load" if options.per_location else "plain transformers"
    _say(f"{report.table(rows)}\n\n{args.out} loads with {loader}")
    return 0


def _write_page(
    args: argparse.Namespace, out: str, title: str, rows: list[dict[str, Any]], figures: Any = None
) -> None:
    command = shlex.join(["dotresize", *args.typed])

    def fill(folder: Path) -> None:
        path = folder / "index.html"
        page.write(path, title=title, command=command, rows=rows, figures=figures)

    checkpoint.write_whole(out, fill)


def _sweep(args: argparse.Namespace) -> int:
    """The compared methods and the one asked for, at every width; a page, and no models."""
    device = find_device(args.device)
    page.check()
    for width in args.widths:
        args.width = width
        options = _options(args)
    check_files(args, options, device)
    checkpoint.check_output(args.out)
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=True)
    check_weights(model)
    divisor = architecture_of(model.config).divisor(model.config)
    for width in args.widths:
        check_residual(model.config, replace(options, width=width))
        check_config(model.config, choose_width(width, model.config.hidden_size, divisor))
    _, tokens, texts = _inputs(args, options, model, tokenizer)
    wanted = [*comparison.compared(options, model.config), options]
    tokens, statistics = calibrate(model, tokens, options, *wanted)
    dense = comparison.dense_report(model, texts)
    rows = [dense]
    for width in args.widths:
        for one in wanted:
            one = replace(one, width=width)
            rows.append(comparison.one(model, tokens, statistics, one, texts, dense)[1])
    _write_page(args, args.out, f"{Path(args.model).name} at {len(args.widths)} widths", rows)
    _say(f"{report.table(rows)}\n\n{args.out}/index.html")
    return 0


def _options(args: argparse.Namespace) -> Options:
    """The choices that the command line shares with ``dotresize.compress``, checked."""
    names = {field.name for field in fields(Options)} & vars(args).keys()
    choices = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.targets is not None:
        choices["targets"] = read_targets(args.targets)
    options = Options(refit=not args.no_refit, **choices)
    options.check()
    return options


def _inputs(
    args: argparse.Namespace, options: Options, model: Any, tokenizer: Any
) -> tuple[list[Tensor], Tensor, Texts]:
    """Calibration streams, windows of them, evaluation texts; announces the widths at the end."""
    streams = [tokens_of(path, model, tokenizer, args.window) for path in args.calibration]
    tokens = random_windows(streams, args.windows, args.window, args.seed)
    texts = evaluation_texts(args.eval or [], args.unseen or [], args, model, tokenizer)
    check_residual(model.config, options)
    inner = choose_inner_width(args.ff_width, model.config)
    if args.energy is None and args.params is None:
        asked = residual_share(args.width, args.ff_width)
        width = model.config.hidden_size
        divisor = architecture_of(model.config).divisor(model.config)
        new = choose_width(asked, width, divisor)
        note = f", a multiple of {divisor} as its loader asks" if divisor > 1 else ""
        check_config(model.config, new)
        logger.info("width %d -> %d (asked for %g%s)", width, new, asked, note)
    if inner is not None:
        old = architecture_of(model.config).inner_width(model.config)
        logger.info("feed-forward width %d -> %d (asked for %g)", old, inner, args.ff_width)
    if isinstance(options.targets, Tensor):
        check_kept(options.targets, model.config.hidden_size, new)
    return streams, tokens, texts
