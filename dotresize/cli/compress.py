"""``dotresize compress`` and ``dotresize sweep``: narrow a model into a directory, or a page."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dotresize import checkpoint, distributed
from dotresize.accounting import check_weights, count_parameters, peak_memory, stage
from dotresize.cli import card, comparison, expected, html_page, memory, report
from dotresize.cli.checks import (
    check_positions,
    check_recovery,
    check_texts,
    check_unseen,
    check_windows,
    find_device,
)
from dotresize.cli.choices import (
    RecoveryChoices,
    Source,
    TextChoices,
    chosen,
    compress_options,
    fill_in,
    settings,
)
from dotresize.cli.resume import FIRST_TOKEN, Stages, digests, files_of, run_in_stages
from dotresize.cli.storage import Storage, check_dtype
from dotresize.cli.texts import (
    Texts,
    calibration_streams,
    calibration_windows,
    evaluation_texts,
    recovery_windows,
)
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import check_budget
from dotresize.narrow.choose_width import (
    DEFAULT_SIZE,
    Widths,
    announce,
    choose_widths,
    default_size,
    residual_stays,
)
from dotresize.narrow.options import Options
from dotresize.narrow.pipeline import prepare
from dotresize.offload.memory_plan import shown
from dotresize.ops.backends import choose
from dotresize.recovery import BATCH_WINDOWS

logger = logging.getLogger("dotresize")

REMEDY = "keep more of it, calibrate on text like it, or train it with --recover"


def compress(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    device = find_device(args.device)
    fill_in(args, device)
    options, choices = compress_options(args), chosen(TextChoices, args)
    recovery = chosen(RecoveryChoices, args)
    check_texts(choices)
    check_recovery(recovery, device)
    if recovery.recover is not None and not options.method.plain:
        raise ValueError("--recover: trains plain checkpoints only, with one map for all")
    check_unseen(choices)
    check_windows(choices)
    check_dtype(args.dtype)
    choose(args.backend, device)
    recorded = settings(args, Source, Options, TextChoices, RecoveryChoices)
    recorded |= {name: options.meant(name) for name in ("reg", "factor", "sensitivity")}
    steps = options.meant("steps")
    recorded["steps"] = None if steps is None else f"{steps:g}"  # inf is no JSON
    recorded["dtype"] = args.dtype
    recorded["by_parts"] = args.memory is not None  # how much of it changes no weight
    recorded["model_files"] = files_of(args.model)
    recorded |= FIRST_TOKEN
    if not options.sized:  # what that means may change from version to version
        recorded["default_size"] = DEFAULT_SIZE
    targets = [args.targets] if args.targets is not None else []
    recorded["text_sha256"] = digests([*choices.files, *targets])

    planned: list[tuple[Options, Widths]] = []

    def check() -> None:
        if args.report is not None:
            html_page.check()
            page = checkpoint.check_output(args.report).resolve()
            if Path(args.out).resolve().is_relative_to(page):
                raise ValueError(
                    f"--report {args.report}: must not be or hold the output directory"
                )
        if args.memory is not None:
            others = {
                "--recover": recovery.recover is not None,
                "--compare": args.compare,
                "--report": args.report is not None,
            }
            memory.check(args.memory, args.model, options, others)
            if args.dtype == "float16":  # whose range is found to be too small when it is too late
                raise ValueError("--dtype float16: give bfloat16 or float32 with --memory")
        planned.append(_planned(args, options, choices))

    def run(stages: Stages) -> int:
        work = None if args.memory is None else stages.offload()
        with stage("reading the model", {}):
            model, tokenizer = checkpoint.load_with_tokenizer(
                args.model, device, to_narrow=True, work=work
            )
        check_weights(model.module)
        wanted, widths = planned[0]
        fitted, streams, tokens, texts = _inputs(choices, model, tokenizer)
        if args.compare:
            _check_compared(texts)
        expected.announce(model, len(tokens), tokens.shape[1], wanted)
        quantised = checkpoint.is_quantised(args.model, count_parameters(model)["total"])
        storage = Storage(args.dtype, quantised=quantised, texts=texts, model=model)
        plan = None
        if work is not None:
            model.store.stored_as = storage.dtype  # type: ignore[attr-defined]
            plan = memory.make_plan(args.memory, wanted, widths, model, tokens, texts)
        with closing(comparison.Reference(model, texts)) as reference:
            narrow, rows = comparison.narrowed(
                *(model, tokenizer, tokens, wanted, reference, stages),
                # What is still to be trained is rounded after that.
                storage if recovery.recover is None else None,
                compare=args.compare,
            )
            figures = rows[-1].pop("figures", None)
            if recovery.recover is not None:
                count = recovery.recover * BATCH_WINDOWS
                new = recovery_windows(fitted, streams, count, tokenizer)
                row = comparison.recovered(
                    model, narrow, new, rows[-1], recovery, args.seed, stages, "training"
                )
                storage.round(narrow, row)
                rows.append(comparison.evaluate_into(row, narrow, reference))
        *others, last = rows
        last["settings"] = recorded
        if plan is not None:
            last["predicted_memory_bytes"] = {"host": plan.host, "device": plan.device}
            last["peak_memory_bytes"] = peak_memory()
        if args.compare:
            last["compared"] = others
        storage.cast(narrow)
        with stage("writing", {}, args.out):
            card.write_output(args.out, narrow, tokenizer, last, card.narrowed_card, args.model)
        distributed.wait()  # nobody needs its stages any more
        stages.remove()
        if args.report is not None:
            title = f"{Path(args.model).name}, narrowed"
            _write_page(args, args.report, title, rows, figures, last.get("feed_forward_lost", ()))
        if plan is not None:
            peak = last["peak_memory_bytes"]["host"]
            logger.info("memory: a peak of %s, %s expected", shown(peak), shown(plan.host))
        loader = "plain transformers" if last["plain_checkpoint"] else "dotresize.load"
        report.say(f"{report.table(rows)}\n\n{args.out} loads with {loader}")
        worse = report.warning_of(last["dense_perplexity"], last["perplexity"], REMEDY)
        if worse is not None:
            logger.warning(worse)
        return 0

    also = {"compare": args.compare, "figures": args.report is not None}
    return run_in_stages(args.out, recorded, also, resume=args.resume, check=check, run=run)


def sweep(args: argparse.Namespace) -> int:
    """Make a page of the compared methods and the one asked for, at every width; and no models."""
    device = find_device(args.device)
    html_page.check()
    choices = chosen(TextChoices, args)
    for width in args.widths:
        options = compress_options(args, width=width)
    check_texts(choices)
    check_unseen(choices)
    check_windows(choices)
    choose(args.backend, device)
    checkpoint.check_output(args.out)
    outline = checkpoint.outline(args.model)
    check_positions(choices, outline.config)
    for width in args.widths:
        choose_widths(outline, replace(options, width=width))
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=True)
    check_weights(model.module)
    _, _, tokens, texts = _inputs(choices, model, tokenizer)
    _check_compared(texts)
    wanted: list[Options] = []
    for width in args.widths:
        at_width = replace(options, width=width)
        wanted += [*comparison.compared(at_width, model), at_width]
    prepared = prepare(model, tokens, *wanted)
    # Models at many widths write no text: that would take longer than to evaluate them.
    with closing(comparison.Reference(model, texts, generate=False)) as reference:
        rows = [dense := comparison.dense_report(reference)]
        for one in wanted:
            rows.append(comparison.evaluated(prepared, one, reference, dense))
    _write_page(args, args.out, f"{Path(args.model).name} at {len(args.widths)} widths", rows)
    report.say(f"{report.table(rows)}\n\n{args.out}/index.html")
    return 0


def _planned(
    args: argparse.Namespace, options: Options, choices: TextChoices
) -> tuple[Options, Widths]:
    """Return the options with a size, and the widths that the model's config lets be said."""
    outline = checkpoint.outline(args.model)
    check_positions(choices, outline.config)
    wanted = default_size(outline, options, whole=args.memory is None)
    widths = choose_widths(outline, wanted)
    # A page shows the map, if there is one.
    shows_map = args.report is not None and not residual_stays(outline, wanted)
    wanted = replace(wanted, figures=shows_map)
    if wanted.params is not None:
        check_budget(outline, wanted, whole=args.memory is None)
    announce(outline, widths, wanted)
    return wanted, widths


def _check_compared(texts: Texts) -> None:
    """Raise ValueError where there is nothing to compare on."""
    if not texts.windows:
        raise ValueError(
            "the calibration leaves no text to compare on: give some with --eval, or fewer "
            "--windows"
        )


def _write_page(
    args: argparse.Namespace,
    out: str,
    title: str,
    rows: list[dict[str, Any]],
    figures: Any = None,
    lost: Sequence[float] = (),
) -> None:
    command = shlex.join(["dotresize", *args.typed])

    def fill(folder: Path) -> None:
        path = folder / "index.html"
        html_page.write(path, title=title, command=command, rows=rows, figures=figures, lost=lost)

    checkpoint.write_whole(out, fill)


def _inputs(
    choices: TextChoices, model: CausalLM, tokenizer: Any
) -> tuple[TextChoices, list[Tensor], Tensor, Texts]:
    """Return the choices as model and texts allow, streams, windows of them, evaluation texts."""
    choices = choices.fitted(model.config)
    streams = calibration_streams(choices, model, tokenizer)
    choices = choices.within(streams)
    tokens = calibration_windows(choices, streams, tokenizer)
    return choices, streams, tokens, evaluation_texts(choices, model, tokenizer, streams)
