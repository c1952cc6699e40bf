"""``dotresize merge-ff``: merge a language model's feed-forwards, and write what is left of it.

Other tasks are in merge_labelled.py.
"""

from __future__ import annotations

import argparse
import copy
import logging
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dotresize import checkpoint, distributed
from dotresize.accounting import (
    check_weights,
    count_parameters,
    peak_memory,
    stage,
    unique_parameters,
    versions,
)
from dotresize.checkpoint.origin import Origin
from dotresize.cli import card, comparison, report
from dotresize.cli.checks import (
    check_positions,
    check_recovery,
    check_texts,
    check_windows,
    find_device,
)
from dotresize.cli.choices import RecoveryChoices, Source, TextChoices, chosen, settings
from dotresize.cli.examples import TASKS
from dotresize.cli.merge_labelled import merge_labelled
from dotresize.cli.merging import (
    MergeChoices,
    all_of,
    card_lines,
    check_plot,
    plot,
    remedy,
    saved,
)
from dotresize.cli.presets import MERGE_WINDOWS, SELECT_WINDOWS
from dotresize.cli.resume import FIRST_TOKEN, Stages, digests, files_of, run_in_stages
from dotresize.cli.storage import Storage, check_dtype
from dotresize.cli.texts import (
    calibration_streams,
    calibration_windows,
    evaluation_texts,
    recovery_windows,
)
from dotresize.evaluate import perplexity
from dotresize.merging.checkpoint import MergedStore, PlainStore
from dotresize.merging.merge import merge_feed_forward
from dotresize.merging.tie import dropped, gone_of
from dotresize.models.causal_lm import CausalLM
from dotresize.models.stacks import layers_of, stacks_of
from dotresize.ops.arguments import check_word
from dotresize.ops.backends import choose
from dotresize.recovery import BATCH_WINDOWS

# The task without labelled examples.
LANGUAGE = "lm"
# The options that are of some tasks alone.
_OF_TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("windows", "select_windows", "eval_windows"), (LANGUAGE,)),
    **dict.fromkeys(("examples", "eval_examples"), tuple(TASKS)),
}

logger = logging.getLogger("dotresize")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What chooses the layers: the perplexity on so many calibration windows."""

    select_windows: int


def merge_ff(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if distributed.size() > 1:
        raise ValueError("merge-ff: runs in one process; run it without torchrun")
    check_word("task", args.task, (LANGUAGE, *TASKS))
    for name, tasks in _OF_TASKS.items():
        if getattr(args, name) is not None and args.task not in tasks:
            raise ValueError(f"{name}: does nothing with --task {args.task}")
    if args.task != LANGUAGE and not args.default_window:
        raise ValueError(f"window: does nothing with --task {args.task}")
    if args.task != LANGUAGE:
        return merge_labelled(args)
    return _merge_language_model(args)


def _merge_language_model(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    args.windows = MERGE_WINDOWS if args.windows is None else args.windows
    if args.select_windows is None:
        args.select_windows = SELECT_WINDOWS
    merging, choices = chosen(MergeChoices, args), chosen(TextChoices, args)
    select = chosen(Selection, args).select_windows
    recovery = chosen(RecoveryChoices, args)
    check_texts(choices)
    check_windows(choices)
    check_dtype(args.dtype)
    choose(merging.backend, device)
    merging.check()
    if not 1 <= select <= choices.windows:
        raise ValueError(f"--select-windows {select}: must be 1 to {choices.windows}")
    check_recovery(recovery, device)
    recorded = settings(args, Source, MergeChoices, Selection, TextChoices, RecoveryChoices)
    recorded["model_files"] = files_of(args.model)
    recorded |= FIRST_TOKEN | {"dtype": args.dtype}
    recorded["text_sha256"] = digests(choices.files)

    def check() -> None:
        if args.plot is not None:
            check_plot(args.plot, merging)
        outline = checkpoint.outline(args.model)
        check_positions(choices, outline.config)
        merging.check_layers(outline.module)

    def run(stages: Stages) -> int:
        with stage("reading the model", {}):
            model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=True)
        check_weights(model.module)
        texts_of = choices.fitted(model.config)
        layers = len(layers_of(model.module, stacks_of(model.module)[0]))
        streams = calibration_streams(texts_of, model, tokenizer)
        tokens = calibration_windows(texts_of, streams, tokenizer)
        texts = evaluation_texts(texts_of, model, tokenizer, streams)
        quantised = checkpoint.is_quantised(args.model, count_parameters(model)["total"])
        storage = Storage(args.dtype, quantised=quantised, texts=texts, model=model)
        new = None
        if recovery.recover is not None:
            count = recovery.recover * BATCH_WINDOWS
            new = recovery_windows(texts_of, streams, count, tokenizer)
        with closing(comparison.Reference(model, texts)) as reference:
            rows = [_report("dense", model, reference)]
            with stage("merging", {}, f"tries windows of {merging.merge} layers"):
                merged, main = stages.model(
                    "merged", lambda: _merged(merging, select, model, tokens), tokenizer, device
                )
            chosen_window = main["stacks"]["decoder"]
            first, *_, last = chosen_window["window"]
            logger.info("layers %d to %d of %d become one feed-forward", first, last, layers)
            judge = _Judge(reference, new, recovery, args.seed, stages)
            rows += judge.reports("merged", merged)
            result = rows[-1]["perplexity"]
            storage.round(merged, main)
            if args.compare:
                rows += _compared(merging, select, model, tokens, judge, main["stacks"])
        main |= {
            "rows": {report.label(row): _figures(row) for row in rows},
            "versions": versions(),
            "peak_memory_bytes": peak_memory(),
            "settings": all_of(args) | recorded,
        }
        if recovery.recover is not None:
            main["recovery"] = main["rows"]["merged + recovery"].pop("recovery")
        main["saved"] = saved(main["parameters"], plain=merging.plain)
        # Before the cast: what is stored in half precision is not computed in it on a CPU.
        seen = None if texts.windows else _on_calibration(main, merged, tokens[:select])
        storage.cast(merged)
        # Stages stay in the format that shares: what goes on from them must train what is shared.
        written = CausalLM(merged.module, PlainStore(merged.module)) if merging.plain else merged
        with stage("writing", {}, args.out):
            card.write_output(args.out, written, tokenizer, main, _card, args.model)
        stages.remove()
        loader = "plain transformers" if merging.plain else "dotresize.load"
        if merging.plain:
            logger.info("--plain repeats the shared tensors: as many bytes as the dense model's")
        report.say(f"{report.table(rows)}\n\n{args.out} loads with {loader}")
        if args.plot is not None:
            plot(args.plot, main, "perplexity")
        dense = rows[0]["perplexity"]
        if seen is not None:
            dense, result = seen
        warning = report.warning_of(dense, result, remedy(merging, recovery))
        if warning is not None:
            logger.warning(warning)
        return 0

    also = {"compare": args.compare}
    return run_in_stages(args.out, recorded, also, resume=args.resume, check=check, run=run)


def _merged(
    merging: MergeChoices, select: int, model: CausalLM, tokens: Tensor, **others: Any
) -> tuple[CausalLM, dict[str, Any]]:
    """Merge by the choices; windows are judged by perplexity on the first of the tokens."""
    merged, found = merge_feed_forward(
        model.module,
        [{"input_ids": ids} for ids in tokens.split(2)],
        metric=partial(_minus_perplexity, windows=tokens[:select]),
        **merging.given | others,
    )
    return CausalLM(merged, MergedStore(merged)), found


def _minus_perplexity(module: Any, windows: Tensor) -> float:
    """Return minus the perplexity; minus infinity for a model whose loss is not finite.

    Such a model is the worst, and no reason to stop.
    """
    try:
        return -perplexity(CausalLM.in_memory(module), windows)
    except ValueError:
        return -float("inf")


def _on_calibration(
    main: dict[str, Any], merged: CausalLM, windows: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return perplexities on the windows that chose the layers: the dense model's, the result's.

    The result's is taken again, since the one of the report is from before a recovery.
    """
    name = "calibration windows"
    return {name: -main["metric"]["dense"]}, {name: -_minus_perplexity(merged.module, windows)}


class _Judge:
    """Reports of a model made from the dense one, and of what a short training makes of it."""

    def __init__(
        self,
        reference: comparison.Reference,
        tokens: Tensor | None,
        recovery: RecoveryChoices,
        seed: int,
        stages: Stages,
    ) -> None:
        self._reference, self._tokens = reference, tokens
        self._recovery, self._seed, self._stages = recovery, seed, stages

    def reports(self, name: str, model: CausalLM, *, generate: bool = True) -> list[dict[str, Any]]:
        """Return them. generate: whether the model continues prompts."""
        found = [_report(name, model, self._reference, generate=generate)]
        if self._tokens is not None:
            row = comparison.recovered(
                self._reference.model,
                model,
                self._tokens,
                found[0],
                self._recovery,
                self._seed,
                self._stages,
                "training-" + name.replace(" ", "-"),
            )
            comparison.evaluate_into(row, model, self._reference, generate=generate)
            found.append(row)
        return found

    def others(self, name: str, model: CausalLM) -> list[dict[str, Any]]:
        """Return the reports of a model to compare with; a failure costs its row and no more.

        It writes no text: a cache of layers that are left out counts no tokens.
        """
        try:
            return self.reports(name, model, generate=False)
        except ValueError as error:
            logger.warning("%s: %s; left out of the comparison", name, error)
            return []


def _compared(
    merging: MergeChoices,
    select: int,
    model: CausalLM,
    tokens: Tensor,
    judge: _Judge,
    stacks: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return reports of the same window merged in other ways, and dropped but for the anchor."""
    start = stacks["decoder"]["window"][0]
    rows: list[dict[str, Any]] = []
    for name, choices in merging.others.items():
        other, _ = _merged(merging, select, model, tokens, start=start, **choices)
        rows += judge.others(name, other)
    module = copy.deepcopy(model.module)
    with dropped(module, gone_of(stacks)) as lost:
        found = judge.others("layers dropped", CausalLM.in_memory(module))
    for row in found:
        row["parameters"] = {"narrow": {"total": row["parameters"]["narrow"]["total"] - lost}}
    return rows + found


def _report(
    name: str, model: CausalLM, reference: comparison.Reference, *, generate: bool = True
) -> dict[str, Any]:
    total = unique_parameters(model.module)
    row = {"method": name, "parameters": {"narrow": {"total": total}}, "seconds": {}}
    return comparison.evaluate_into(row, model, reference, generate=generate)


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return what dotresize.json says of a row."""
    training = {"recovery": row["recovery"]} if "recovery" in row else {}
    total = row["parameters"]["narrow"]["total"]
    quality = {key: row[key] for key in report.FIGURES}
    return {"parameters": total, **quality, **training}


def _card(found: dict[str, Any], name: str, origin: Origin) -> str:
    """Return the model card of a merged model."""
    columns = {"base": found["rows"]["dense"]}
    if found.get("recovery"):
        columns["without recovery"] = found["rows"]["merged"]
        columns["this model"] = found["rows"]["merged + recovery"]
    else:
        columns["this model"] = found["rows"]["merged"]
    return card.model_card(
        f"{name}, feed-forwards merged",
        origin,
        "transformers" if found["settings"]["plain"] else "dotresize",
        card_lines(found, "`AutoModelForCausalLM.from_pretrained`"),
        list(columns),
        report.quality_cells(list(columns.values())),
    )
