"""``dotresize merge-ff``: merge a language model's feed-forwards, and write what is left of it."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from dotresize.merging.merge import ANCHORS, UNLIKE, alike_windows, merge_feed_forward
from dotresize.merging.tie import dropped
from dotresize.models.causal_lm import CausalLM
from dotresize.models.stacks import layers_of, stacks_of
from dotresize.ops.backends import choose
from dotresize.recovery import BATCH_WINDOWS

logger = logging.getLogger("dotresize")


@dataclass(frozen=True, kw_only=True)
class MergeChoices:
    """What a user may choose about a merging; see ``dotresize.merge_feed_forward``.

    Attributes:
        plain: whether the output repeats the shared tensors, for plain transformers.
    """

    merge: int
    anchor: str = "first"
    no_permute: bool = False
    soft: float | None = None
    start: int | None = None
    select_windows: int = 4
    plain: bool = False
    backend: str = field(default="auto", metadata={"resume": False})

    def check(self, windows: int) -> None:
        """Raise ValueError for a choice that would be refused whatever the model."""
        if self.anchor not in ANCHORS:
            raise ValueError(f"--anchor {self.anchor}: must be one of {', '.join(ANCHORS)}")
        if self.soft is not None and (self.no_permute or not 0 < self.soft < float("inf")):
            raise ValueError(f"--soft {self.soft:g}: must be positive, and without --no-permute")
        if not 1 <= self.select_windows <= windows:
            raise ValueError(f"--select-windows {self.select_windows}: must be 1 to {windows}")

    def check_layers(self, layers: int) -> None:
        """Raise ValueError for a window that a model with so many layers does not have."""
        if not 2 <= self.merge <= layers:
            raise ValueError(f"--merge {self.merge}: must be 2 to {layers}, the model's layers")
        last = layers - self.merge
        if self.start is not None and not 0 <= self.start <= last:
            raise ValueError(f"--start {self.start}: must be 0 to {last} for {layers} layers")


def merge_ff(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    device = find_device(args.device)
    if distributed.size() > 1:
        raise ValueError("merge-ff: runs in one process; run it without torchrun")
    merging, choices = chosen(MergeChoices, args), chosen(TextChoices, args)
    recovery = chosen(RecoveryChoices, args)
    check_texts(choices)
    check_windows(choices)
    check_dtype(args.dtype)
    choose(merging.backend, device)
    merging.check(choices.windows)
    check_recovery(recovery, device)
    recorded = settings(args, Source, MergeChoices, TextChoices, RecoveryChoices)
    recorded["model_files"] = files_of(args.model)
    recorded |= FIRST_TOKEN | {"dtype": args.dtype}
    recorded["text_sha256"] = digests(choices.files)

    def check() -> None:
        if args.plot is not None:
            _check_plot(args.plot, merging)
        outline = checkpoint.outline(args.model)
        check_positions(choices, outline.config)
        stack = stacks_of(outline.module)[0]
        merging.check_layers(len(layers_of(outline.module, stack)))
        alike = alike_windows(outline.module, stack, merging.merge)
        if not alike:
            raise ValueError(f"--merge {merging.merge}: everywhere in the model {UNLIKE}")
        if merging.start is not None and merging.start not in alike:
            raise ValueError(f"--start {merging.start}: {UNLIKE}")

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
        storage = Storage(args.dtype, quantised=quantised, texts=texts)
        new = None
        if recovery.recover is not None:
            count = recovery.recover * BATCH_WINDOWS
            new = recovery_windows(texts_of, streams, count, tokenizer)
        with closing(comparison.Reference(model, texts)) as reference:
            rows = [_report("dense", model, reference)]
            with stage("merging", {}, f"tries windows of {merging.merge} layers"):
                merged, main = stages.model(
                    "merged", lambda: _merged(merging, model, tokens), tokenizer, device
                )
            chosen_window = main["stacks"]["decoder"]
            first, *_, last = chosen_window["window"]
            logger.info("layers %d to %d of %d become one feed-forward", first, last, layers)
            judge = _Judge(reference, new, recovery, args.seed, stages)
            rows += judge.reports("merged", merged)
            result = rows[-1]["perplexity"]
            storage.round(merged, main)
            if args.compare:
                rows += _compared(merging, model, tokens, judge, chosen_window)
        main |= {
            "rows": {report.label(row): _figures(row) for row in rows},
            "versions": versions(),
            "peak_memory_bytes": peak_memory(),
            "settings": _all_of(args) | recorded,
        }
        if recovery.recover is not None:
            main["recovery"] = main["rows"]["merged + recovery"].pop("recovery")
        main["saved"] = _saved(main["parameters"], plain=merging.plain)
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
            _plot(args.plot, main)
        dense = rows[0]["perplexity"]
        if not texts.windows:
            dense, result = _on_calibration(merging, main, merged, tokens)
        warning = report.warning_of(dense, result, _remedy(merging, recovery))
        if warning is not None:
            logger.warning(warning)
        return 0

    also = {"compare": args.compare}
    return run_in_stages(args.out, recorded, also, resume=args.resume, check=check, run=run)


def _all_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was typed, and what was not, for the record."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("typed", "verb", "default_window")
    }


def _check_plot(path: str, merging: MergeChoices) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'dotresize[plot]'")
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot {path}: must be a .svg, .png or .pdf file")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: its directory does not exist")
    if merging.start is not None:
        raise ValueError("--plot: there is nothing to draw with --start, which tries one window")


def _merged(
    merging: MergeChoices, model: CausalLM, tokens: Tensor, **others: Any
) -> tuple[CausalLM, dict[str, Any]]:
    """Merge by the choices; windows are judged by perplexity on the first of the tokens."""
    given = {
        "permute": not merging.no_permute,
        "soft": merging.soft,
        "anchor": merging.anchor,
        "start": merging.start,
    }
    merged, found = merge_feed_forward(
        model.module,
        [{"input_ids": ids} for ids in tokens.split(2)],
        k=merging.merge,
        metric=partial(_minus_perplexity, windows=tokens[: merging.select_windows]),
        backend=merging.backend,
        **given | others,
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
    merging: MergeChoices, main: dict[str, Any], merged: CausalLM, tokens: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return perplexities on the windows that chose the layers: the dense model's, the result's.

    The result's is taken again, since the one of the report is from before a recovery.
    """
    name, windows = "calibration windows", tokens[: merging.select_windows]
    after = -_minus_perplexity(merged.module, windows)
    return {name: -main["metric"]["dense"]}, {name: after}


def _remedy(merging: MergeChoices, recovery: RecoveryChoices) -> str:
    """Return what may help against a bad result."""
    longer = "train it with --recover" if recovery.recover is None else "train longer (--recover)"
    return longer if merging.merge == 2 else f"merge fewer layers (--merge), or {longer}"


def _saved(parameters: dict[str, int], *, plain: bool) -> str:
    """Return what the output saves and what it does not, for the record and the card."""
    fewer = f"{(parameters['dense'] - parameters['merged']) / 1e6:.1f} M parameters"
    if not plain:
        return (
            f"Saved: {fewer}, in the file and in memory, since every shared tensor is stored "
            "once. Not saved: computing time. Other tools refuse this directory; "
            "`dotresize merge-ff --plain` writes one that they load."
        )
    return (
        "Saved in this directory: nothing. The shared tensors are repeated, so that every tool "
        "loads it, and the weights take as many bytes as the dense model's, in the file and in "
        f"memory; computing takes as long. The {fewer} are saved in tools that share tensors "
        "(`dotresize merge-ff` without `--plain`), or by compression whose window is longer "
        "than a layer (`zstd --long=27` has 128 MB; gzip finds nothing). Training it further in "
        "other tools unties the copies."
    )


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
    model: CausalLM,
    tokens: Tensor,
    judge: _Judge,
    chosen_window: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return reports of the same window merged in other ways, and dropped but for the anchor."""
    others: dict[str, dict[str, Any]] = {
        "without permutation": {"permute": False, "soft": None},
        "soft alignment": {"permute": True, "soft": merging.soft or 0.03},
    }
    rows: list[dict[str, Any]] = []
    for name, choices in others.items():
        other, _ = _merged(merging, model, tokens, start=chosen_window["window"][0], **choices)
        rows += judge.others(name, other)
    module, stack = copy.deepcopy(model.module), stacks_of(model.module)[0]
    gone = [i for i in chosen_window["window"] if i != chosen_window["anchor"]]
    layers = layers_of(model.module, stack)
    lost = sum(p.numel() for i in gone for p in layers[i].parameters())
    with dropped(module, stack, gone):
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


def _plot(path: str, found: dict[str, Any]) -> None:
    """Draw the perplexity of every window, by its first layer."""
    from matplotlib.figure import Figure

    profile = found["stacks"]["decoder"]["profile"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    sound = [entry for entry in profile if entry["metric"] is not None]
    axes.plot([entry["start"] for entry in sound], [-entry["metric"] for entry in sound], "o-")
    axes.axhline(-found["metric"]["dense"], color="grey", linestyle="--", label="dense")
    axes.set(xlabel="first layer of the window", ylabel="perplexity, merged", yscale="log")
    axes.legend()
    figure.savefig(path)


def _card(found: dict[str, Any], name: str, origin: Origin) -> str:
    """Return the model card of a merged model."""
    first, *_, last = found["stacks"]["decoder"]["window"]
    before, after = (found["parameters"][which] / 1e6 for which in ("dense", "merged"))
    if found["settings"]["plain"]:
        share, counts = "have equal feed-forwards", f"{after:.1f} M of {before:.1f} M are distinct"
        loader = "`AutoModelForCausalLM.from_pretrained`"
        library = "transformers"
    else:
        share, counts = "share one feed-forward", f"{before:.1f} M became {after:.1f} M"
        loader, library = "`dotresize.load`", "dotresize"
    lines = [
        f"Layers {first} to {last} {share}; of the parameters, {counts}.",
        f"{loader} loads it (made by dotresize {found['versions']['dotresize']}).",
        "",
        found["saved"],
    ]
    columns = {"base": found["rows"]["dense"]}
    if found.get("recovery"):
        columns["without recovery"] = found["rows"]["merged"]
        columns["this model"] = found["rows"]["merged + recovery"]
    else:
        columns["this model"] = found["rows"]["merged"]
    title = f"{name}, feed-forwards merged"
    return card.model_card(title, origin, library, lines, columns)
