"""Reports side by side: the dense model, what a method is compared with, and the method itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from dotresize.accounting import count_parameters, peak_memory, stage
from dotresize.accounting import stages as stages_of
from dotresize.cli import report
from dotresize.cli.choices import RecoveryChoices
from dotresize.cli.resume import Stages
from dotresize.cli.storage import Storage
from dotresize.cli.texts import Texts
from dotresize.compression import FF_METHODS, METHODS
from dotresize.evaluate import Predictions, greedy_text, prompts_of, quality
from dotresize.models.causal_lm import CausalLM
from dotresize.models.layer_widths import differ
from dotresize.narrow.budget import Budget
from dotresize.narrow.choose_width import choose_inner_width, choose_widths, residual_stays
from dotresize.narrow.options import Options
from dotresize.narrow.pipeline import Prepared, narrow_model, prepare
from dotresize.recovery import recover

logger = logging.getLogger("dotresize")

COMPARED = ("magnitude", "pca", "dot")


class Reference:
    """The dense model on the texts to evaluate on: what is made of it is measured beside it.

    Its predictions are made once, when they are first asked for. Who made it closes it.

    Attributes:
        model: the dense one.
        texts: to evaluate on.
        prompts: int64 (count, tokens), which models continue; None where they do not.
    """

    def __init__(self, model: CausalLM, texts: Texts, *, generate: bool = True) -> None:
        """Begin with nothing. generate: whether models continue prompts of the texts."""
        self.model, self.texts = model, texts
        self.prompts = None
        # Every token that an offloaded model writes would read all weights from their files.
        if generate and model.store.whole:
            positions = getattr(model.config, "max_position_embeddings", None)
            self.prompts = prompts_of(texts.windows.values(), positions)
        self._predictions: dict[str, Predictions] = {}

    def predictions(self, name: str) -> Predictions:
        """Return those of a text."""
        if name not in self._predictions:
            windows = self.texts.windows[name]
            self._predictions[name] = Predictions(self.model, windows, desc=f"dense, {name}")
        return self._predictions[name]

    def close(self) -> None:
        """Let the predictions go."""
        for predictions in self._predictions.values():
            predictions.close()


def compared(options: Options, model: CausalLM) -> list[Options]:
    """Return what is set beside a method: the plain ones, without refit, at the same size.

    They are methods of what is cut, none where that is nothing.
    """
    if options.params is not None:
        return compared_at_budget(options, model)
    bare = replace(options, refit=False, figures=False)
    if residual_stays(model, options):
        cut = choose_inner_width(model, options) is not None
        return compared_feed_forwards(options, model) if cut else []
    return [
        bare.with_method(method)
        for method in (METHODS[name] for name in COMPARED)
        if options.refit or method != options.method
    ]


def compared_at_budget(options: Options, model: CausalLM) -> list[Options]:
    """Return plain ways to spend the same budget, without refit: on one width of all layers.

    They are the inner neurons of largest magnitude, the channels of largest magnitude, and the
    single transport of the paper onto those channels.
    """
    budget = Budget(model, options)
    bare = replace(options, params=None, params_count="total", layer_widths=False, pad=False)
    bare = replace(bare, search=None, refit=False, figures=False)  # there is none without params
    fixed = bool(model.architecture.fixed_residual)
    selection = bare if fixed else bare.with_method(METHODS["magnitude"])
    found = []
    inner = budget.inner_at(model.width) if model.architecture.has_inner_width else 0
    if 0 < inner < model.inner_width:
        largest = FF_METHODS["magnitude"]
        found.append(replace(selection, ff_width=inner, ff_method=largest))
    width = 0 if fixed else budget.width_alone()
    if 1 < width < model.width:  # a width of 1 would be a share
        paper = replace(bare.with_method(METHODS["dot"]), steps=1.0, factor="qr", sensitivity=None)
        whole = FF_METHODS["eliminate"]  # of neurons that all stay
        found += [replace(own, width=width, ff_method=whole) for own in (selection, paper)]
    return found


def compared_feed_forwards(options: Options, model: CausalLM) -> list[Options]:
    """Return what is set beside a method that left the residual as it is, without refit."""
    bare = replace(options, refit=False, figures=False, targets=None)
    if not model.architecture.fixed_residual:
        # This one keeps all channels as they are.
        bare = bare.with_method(METHODS["magnitude"])
    return [
        replace(bare, ff_method=method)
        for method in FF_METHODS.values()
        if options.refit or method != options.ff_method
    ]


def narrowed(
    model: CausalLM,
    tokenizer: Any,
    tokens: Tensor,
    options: Options,
    reference: Reference,
    stages: Stages,
    storage: Storage | None,
    *,
    compare: bool,
) -> tuple[CausalLM, list[dict[str, Any]]]:
    """Return the narrowed model, and the reports: dense, what is compared, and its own."""
    others = compared(options, model) if compare else []
    for other in others:  # before anything takes long
        other.check()
        choose_widths(model, other)
    prepared = stages.calibration(lambda: prepare(model, tokens, options, *others), model.device)
    narrow, main = stages.model(
        "narrow", lambda: narrow_model(model, tokens, options, prepared), tokenizer, model.device
    )
    if storage is not None:
        storage.round(narrow, main)
    dense = dense_report(reference)
    evaluate_into(beside(main, dense), narrow, reference)
    if options.energy is not None and main["width"]["new"] == main["width"]["old"]:
        cut = main["feed_forward"]["method"]
        others = compared_feed_forwards(options, model) if others and cut else []
    if compare and not others:
        logger.info("nothing was cut: there is no method to compare with")
    same_size: dict[str, Any] = {}
    if options.energy is not None:
        same_size = {"width": main["width"]["new"], "energy": None}
    nothing = {"budget": 0.0, "layer widths": 0.0}  # others took no time to find the shape
    shared = replace(prepared.statistics, seconds=prepared.statistics.seconds | nothing)
    prepared = prepared._replace(statistics=shared)
    rows = []
    for other in (replace(other, **same_size) for other in others):
        try:
            rows.append(evaluated(prepared, other, reference, dense))
        except ValueError as error:  # it costs its row, and not the result
            logger.warning("to compare with, %s is left out: %s", other.method.name, error)
    return narrow, [dense, *rows, main]


def evaluated(
    prepared: Prepared, options: Options, reference: Reference, dense: dict[str, Any]
) -> dict[str, Any]:
    """Return the report of a narrowed model, its figures beside the dense model's."""
    stages_of.info("to compare with: %s, %s", options.method.name, options.ff_method.name)
    narrow, row = narrow_model(reference.model, prepared.tokens, options, prepared)
    return evaluate_into(beside(row, dense), narrow, reference)


def beside(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Add the dense model's figures to a report."""
    row["dense_perplexity"] = dense["perplexity"]
    row["dense_generated"] = dense["generated"]
    return row


def recovered(
    dense: CausalLM,
    model: CausalLM,
    tokens: Tensor,
    row: dict[str, Any],
    choices: RecoveryChoices,
    seed: int,
    stages: Stages,
    name: str,
) -> dict[str, Any]:
    """Train a model in place, and return its report: the training-free figures stand apart.

    tokens: int64 (windows, length); row: the report before; name: of the folder in OUT.partial
    from which an interrupted training goes on.
    """
    with stage("recovery", {}, f"of {choices.recover} steps"):
        found = recover(
            dense.module,
            model.module,
            tokens,
            folder=stages.training(name),
            seed=seed,
            learning_rate=choices.learning_rate,
        )
    new = {key: value for key, value in row.items() if key != "figures"}
    new["recovery"] = found
    new["training_free"] = {key: row[key] for key in (*report.FIGURES, "seconds")}
    new["seconds"] = {"recovery": found["seconds"]}
    new["peak_memory_bytes"] = peak_memory()
    return new


def evaluate_into(
    row: dict[str, Any], model: CausalLM, reference: Reference, *, generate: bool = True
) -> dict[str, Any]:
    """Add a model's figures to a report, and which texts are of a kind the calibration has not.

    The dense model has no KL and no agreement. generate: whether the model continues prompts.
    """
    texts, name_of = reference.texts, report.label(row)
    row |= {"perplexity": {}, "kl": {}, "agreement": {}, "generated": None, "unseen": texts.unseen}
    if not texts.windows:
        return row
    with stage("evaluation", row["seconds"], f"of {name_of} on {', '.join(texts.windows)}"):
        for name in texts.windows:
            predictions = reference.predictions(name)
            if model is reference.model:
                row["perplexity"][name] = predictions.perplexity(f"{name_of}, {name}")
            else:
                found = quality(model, predictions, desc=f"{name_of}, {name}")
                row["perplexity"][name] = found.perplexity
                row["kl"][name], row["agreement"][name] = found.kl, found.agreement
        if generate and reference.prompts is not None:
            written = greedy_text(model, reference.model, reference.prompts, desc=name_of)
            row["generated"] = vars(written) | {"continuations": len(reference.prompts)}
    return row


def dense_report(reference: Reference) -> dict[str, Any]:
    """Return the report of the model as it was given."""
    model = reference.model
    row: dict[str, Any] = {
        "method": "dense",
        "width": {"new": model.width},
        "feed_forward": {
            "new": model.inner_width,
            "layers": widths if differ(widths := model.inner_widths) else None,
        },
        "layers": {"new": len(model.layers)},
        "parameters": {"narrow": count_parameters(model)},
        "tied": bool(model.config.tie_word_embeddings),
        "plain_checkpoint": not differ(model.inner_widths),
        "seconds": {},
    }
    return evaluate_into(row, model, reference)
