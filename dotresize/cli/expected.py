"""How long a CPU will take to narrow a model, said before it begins."""

from __future__ import annotations

import logging
import time

import torch

from dotresize.accounting import count_parameters
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.budget import inner_without_search
from dotresize.narrow.choose_width import residual_stays
from dotresize.narrow.options import Options

stages = logging.getLogger("dotresize.stages")

# What is multiplied, in passes of all tokens through the dense model's layers. The refit of
# feed-forwards takes both models' passes and the sums over tokens (3.0 counted; SmolLM2-135M with
# 64 and 64 windows, one thread: 768 s where a pass would take 257). The others are by the times of
# benchmarks/results/field.jsonl beside equal widths.
WRITE, REFIT, RESIDUAL, LAYER_WIDTHS, SEARCH = 1.0, 3.0, 7.0, 2.0, 7.0
MEASURED = 0.2  # seconds for the rate of this machine
LEAST = 60.0  # seconds that are worth a line


def expected_seconds(model: CausalLM, windows: int, length: int, options: Options) -> float:
    """Return about how long the model takes to be narrowed; half or twice as long is usual.

    windows: of calibration text as given, of ``length`` tokens each.
    """
    own = options.own_windows(windows) * length
    tokens = windows * length + own
    parameters = count_parameters(model)
    passes = REFIT if options.refit else REFIT / 2  # without the dense model's half
    if options.params is None and not residual_stays(model, options):
        passes += RESIDUAL
    if options.params is not None and inner_without_search(model, options) is None:
        passes += SEARCH
    passes += LAYER_WIDTHS * options.layer_widths
    products = 2.0 * tokens * passes * parameters["non_embedding"]
    products += 2.0 * own * WRITE * parameters["total"]
    return products / _rate(model)


def announce(model: CausalLM, windows: int, length: int, options: Options) -> None:
    """Say how long a model in memory on a CPU will take, where that is a minute or more."""
    if model.device.type != "cpu" or not model.store.whole:
        return
    seconds = expected_seconds(model, windows, length, options)
    if seconds >= LEAST:
        stages.info(
            "narrowing takes about %.1f minutes on this CPU (threads: %d); --windows says how much "
            "text is read",
            *(seconds / 60, torch.get_num_threads()),
        )


@torch.no_grad()
def _rate(model: CausalLM) -> float:
    """Return the operations a second of products as wide as the model's, measured here."""
    narrow, wide = model.width, max(model.width, model.inner_width)
    dtype = next(model.module.parameters()).dtype
    x = torch.ones(2048, narrow, dtype=dtype, device="cpu")
    w = torch.ones(narrow, wide, dtype=dtype, device="cpu")
    x @ w  # the first product also starts the threads
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < MEASURED:
        x @ w
        done += 1
    return 2.0 * x.numel() * wide * done / took
