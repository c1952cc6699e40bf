"""Reports side by side: the dense model, what a method is compared with, and the method itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from dotresize import report
from dotresize.accounting import count_parameters
from dotresize.evaluate import perplexity
from dotresize.inputs import Texts
from dotresize.models import architecture_of
from dotresize.options import Options
from dotresize.pipeline import calibrate, compress
from dotresize.resident import device_of
from dotresize.stages import Stages
from dotresize.statistics import Statistics

COMPARED = ("magnitude", "pca", "dot")


def compared(options: Options, config: Any) -> list[Options]:
    """What is set beside a method: the plain ones, without refit, at the same widths."""
    bare = replace(options, refit=False, scope="global", figures=False)
    if architecture_of(config).fixed_residual:
        return [bare] if options.refit else []
    chosen = options.targets
    return [
        replace(bare, method=method, targets=None if method == "pca" else chosen)
        for method in COMPARED
        if options.refit or options.per_location or method != options.method
    ]


def narrowed(
    model: Any,
    tokenizer: Any,
    tokens: Tensor,
    options: Options,
    texts: Texts,
    stages: Stages,
    *,
    compare: bool,
) -> tuple[Any, list[dict[str, Any]]]:
    """The narrowed model, and the reports of dense, what it is compared with, and itself."""
    others = compared(options, model.config) if compare else []
    device = device_of(model)
    tokens, statistics = stages.calibration(
        lambda: calibrate(model, tokens, options, *others), device
    )
    narrow, main = stages.narrowed(
        lambda: compress(model, tokens, statistics=statistics, **vars(options)), tokenizer, device
    )
    dense = dense_report(model, texts)
    main["dense_perplexity"] = dense["perplexity"]
    evaluate_into(main, narrow, texts)
    inner = main["feed_forward"]
    same_size: dict[str, Any] = {
        **{"width": main["width"]["new"], "energy": None},
        **{"params": None, "params_count": "total"},
        **({"ff_width": inner["new"]} if inner["method"] else {"ff_method": "eliminate"}),
    }
    rows = [
        one(model, tokens, statistics, replace(other, **same_size), texts, dense)[1]
        for other in others
    ]
    return narrow, [dense, *rows, main]


def one(
    model: Any,
    tokens: Tensor,
    statistics: Statistics,
    options: Options,
    texts: Texts,
    dense: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """A narrowed model and its report, with its perplexities beside the dense model's."""
    narrow, row = compress(model, tokens, statistics=statistics, **vars(options))
    row["dense_perplexity"] = dense["perplexity"]
    return narrow, evaluate_into(row, narrow, texts)


def evaluate_into(row: dict[str, Any], model: Any, texts: Texts) -> dict[str, Any]:
    """Adds perplexities, and which texts are of a kind that the calibration has not."""
    start = time.perf_counter()
    row["perplexity"] = {
        name: perplexity(model, windows, desc=f"{report.label(row)}, {name}")
        for name, windows in texts.windows.items()
    }
    row["unseen"] = texts.unseen
    row["seconds"]["evaluation"] = time.perf_counter() - start if texts.windows else 0.0
    return row


def dense_report(model: Any, texts: Texts) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": "dense",
        "width": {"new": model.config.hidden_size},
        "feed_forward": {"new": architecture_of(model.config).inner_width(model.config)},
        "parameters": {"narrow": count_parameters(model)},
        "tied": bool(model.config.tie_word_embeddings),
        "plain_checkpoint": True,
        "seconds": {},
    }
    return evaluate_into(row, model, texts)
