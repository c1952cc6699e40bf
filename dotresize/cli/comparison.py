"""Reports side by side: the dense model, what a method is compared with, and the method itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from dotresize.accounting import count_parameters, peak_memory
from dotresize.calibration.statistics import Statistics
from dotresize.cli import report
from dotresize.cli.choices import RecoveryChoices
from dotresize.cli.resume import Stages
from dotresize.cli.texts import Texts
from dotresize.compression import FF_METHODS, METHODS
from dotresize.evaluate import perplexity
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.calibrate import calibrate
from dotresize.narrow.options import Options
from dotresize.narrow.pipeline import narrow_model
from dotresize.recovery import recover

COMPARED = ("magnitude", "pca", "dot")


def compared(options: Options, model: CausalLM) -> list[Options]:
    """Return what is set beside a method: the plain ones, without refit, at the same widths."""
    bare = replace(options, refit=False, figures=False)
    if model.architecture.fixed_residual:
        return compared_feed_forwards(options, model)
    return [
        replace(bare, method=method, targets=options.targets if method.takes_targets else None)
        for method in (METHODS[name] for name in COMPARED)
        if options.refit or method != options.method
    ]


def compared_feed_forwards(options: Options, model: CausalLM) -> list[Options]:
    """Return what is set beside a method that left the residual as it is, without refit."""
    bare = replace(options, refit=False, figures=False, targets=None)
    if not model.architecture.fixed_residual:
        bare = replace(bare, method=METHODS["magnitude"])  # which keeps all channels as they are
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
    texts: Texts,
    stages: Stages,
    *,
    compare: bool,
) -> tuple[CausalLM, list[dict[str, Any]]]:
    """Return the narrowed model, and the reports: dense, what is compared, and its own."""
    others = compared(options, model) if compare else []
    tokens, statistics = stages.calibration(
        lambda: calibrate(model, tokens, options, *others), model.device
    )
    narrow, main = stages.model(
        "narrow", lambda: narrow_model(model, tokens, options, statistics), tokenizer, model.device
    )
    dense = dense_report(model, texts)
    main["dense_perplexity"] = dense["perplexity"]
    evaluate_into(main, narrow, texts)
    inner = main["feed_forward"]
    if others and main["width"]["new"] == main["width"]["old"]:
        others = compared_feed_forwards(options, model)
    same_size: dict[str, Any] = {
        "width": main["width"]["new"],
        "energy": None,
        "params": None,
        "params_count": "total",
    }
    if inner["method"]:
        same_size["ff_width"] = inner["new"]
        if model.architecture.fixed_residual:
            del same_size["width"]
    else:
        same_size["ff_method"] = FF_METHODS["eliminate"]
    rows = [
        evaluated(model, tokens, statistics, replace(other, **same_size), texts, dense)
        for other in others
    ]
    return narrow, [dense, *rows, main]


def evaluated(
    model: CausalLM,
    tokens: Tensor,
    statistics: Statistics,
    options: Options,
    texts: Texts,
    dense: dict[str, Any],
) -> dict[str, Any]:
    """Return the report of a narrowed model, its perplexities beside the dense model's."""
    narrow, row = narrow_model(model, tokens, options, statistics)
    row["dense_perplexity"] = dense["perplexity"]
    return evaluate_into(row, narrow, texts)


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
    found = recover(
        dense.module,
        model.module,
        tokens,
        folder=stages.path / name,
        seed=seed,
        learning_rate=choices.learning_rate,
    )
    new = {key: value for key, value in row.items() if key != "figures"}
    new["recovery"] = found
    new["training_free"] = {"perplexity": row["perplexity"], "seconds": row["seconds"]}
    new["seconds"] = {"recovery": found["seconds"]}
    new["peak_memory_bytes"] = peak_memory()
    return new


def evaluate_into(row: dict[str, Any], model: CausalLM, texts: Texts) -> dict[str, Any]:
    """Add perplexities to a report, and which texts are of a kind that the calibration has not."""
    start = time.perf_counter()
    row["perplexity"] = {
        name: perplexity(model, windows, desc=f"{report.label(row)}, {name}")
        for name, windows in texts.windows.items()
    }
    row["unseen"] = texts.unseen
    row["seconds"]["evaluation"] = time.perf_counter() - start if texts.windows else 0.0
    return row


def dense_report(model: CausalLM, texts: Texts) -> dict[str, Any]:
    """Return the report of the model as it was given."""
    row: dict[str, Any] = {
        "method": "dense",
        "width": {"new": model.width},
        "feed_forward": {"new": model.inner_width},
        "parameters": {"narrow": count_parameters(model)},
        "tied": bool(model.config.tie_word_embeddings),
        "plain_checkpoint": True,
        "seconds": {},
    }
    return evaluate_into(row, model, texts)
