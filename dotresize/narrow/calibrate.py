"""What the model writes itself, and the statistics that a method asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.accounting import stage
from dotresize.calibration.self_generated import sample
from dotresize.calibration.statistics import MATRICES, Statistics, collect
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.options import Options


def with_own_text(
    model: CausalLM, tokens: Tensor, options: Options
) -> tuple[Tensor, dict[str, float]]:
    """Return the tokens with those that the model writes itself, and the time that this took.

    tokens: int64 (windows, length).
    """
    seconds: dict[str, float] = {"self-generated text": 0.0}
    # Every token that an offloaded model writes would read all weights from their files.
    own = options.own_windows(len(tokens)) if model.store.whole else 0
    if own and distributed.rank() == 0:
        with stage("self-generated text", seconds, f"of {own} windows"):
            begin = first_token(model, tokens)
            written = sample(model, own, tokens.shape[1], options.seed, begin)
        tokens = torch.cat([tokens, written.to(tokens.device)])
    tokens = distributed.from_first(tokens)
    if len(tokens) < distributed.size():
        raise ValueError(f"{len(tokens)} windows are too few for {distributed.size()} processes")
    return tokens, seconds


def first_token(model: CausalLM, tokens: Tensor) -> int | None:
    """Return the token that all windows begin with, which the tokenizer puts there; None for none.

    tokens: int64 (windows, length). Of a single window it is the one that the config names.
    """
    first = int(tokens[0, 0])
    named = getattr(model.config, "bos_token_id", None)
    if len(tokens) == 1 or tokens.shape[1] == 1:
        return first if first == named else None
    return first if bool((tokens[:, 0] == first).all()) else None


def held_out(windows: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of windows to solve on and of ``count`` to measure on, spread evenly.

    A single one does both.
    """
    every = torch.arange(windows, dtype=torch.int64, device="cpu")
    if windows == 1:
        return every, every
    held = torch.zeros(windows, dtype=torch.bool, device="cpu")
    held[spread(windows, min(count, windows - 1))] = True
    return every[~held], every[held]


def spread(count: int, wanted: int) -> Tensor:
    """Return at most ``wanted`` of the numbers below ``count``, evenly spaced."""
    wanted = min(wanted, count)
    return torch.arange(wanted, dtype=torch.int64, device="cpu") * count // wanted


def collect_for(model: CausalLM, tokens: Tensor, *wanted: Options) -> Statistics:
    """Return the statistics of some tokens that any of the options needs.

    tokens: int64 (windows, length). The first options say how they are collected.
    """
    needs = frozenset().union(*(options.needs for options in wanted))
    return collect(
        model,
        tokens,
        **{name: name in needs for name in (*MATRICES, "apart", "moment_apart")},
        final=any(options.chooses_table(model) for options in wanted),
        seed=wanted[0].seed,
        batch_windows=wanted[0].batch_windows,
        backend=wanted[0].backend,
    )
