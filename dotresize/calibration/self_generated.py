"""Calibration text that the model writes itself: one more source, which covers what it knows.

A map calibrated on some kinds of text is worst on the kinds it has not seen. Text sampled from
the model, each text from a first token drawn at random, is close to what it was trained on, needs
no data, and stands in for the kinds that nobody thought of (self-calibration: Williams et al.,
arXiv 2410.17170, for quantisation and pruning).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize.calibration.text import begun
from dotresize.models.bfloat16 import in_bfloat16
from dotresize.models.causal_lm import CausalLM

# Texts written at a time: each keeps a cache, and all share one pass over the weights.
BATCH = 128
# Texts in a window, one after the other: short ones say as much of what the model knows, about more
# things, and take fewer passes. SmolLM2-135M, 1126 inner neurons, 24 given windows, two seeds: mean
# excess 0.424 and 0.447 with 12 windows of one text each, 0.424 and 0.436 with 12 of four, 0.417
# and 0.418 with 24 of four.
TEXTS = 4


@torch.inference_mode()
def sample(
    model: CausalLM, count: int, length: int, seed: int = 0, begin: int | None = None
) -> Tensor:
    """Return ``count`` windows sampled at temperature 1: int64 (count, length).

    Each is of ``TEXTS`` texts. The first token of a text is uniform over the vocabulary; all are
    written behind the token that texts ``begin`` with, if there is one, with which a window begins.
    An end of text is never drawn. The same seed gives the same windows on the same kind of device:
    CPUs with instructions for it write in bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    room = length - (begin is not None)
    texts = max(1, min(TEXTS, room))
    each = -(-room // texts)
    shape = count * texts, min(1, each)
    drawn = torch.randint(
        model.config.vocab_size, shape, generator=generator, dtype=torch.int64, device="cpu"
    )

    def draw(logits: Tensor) -> Tensor:
        heights = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64, device="cpu")
        return drawn_at(logits.softmax(-1), heights)

    first = begun(drawn, begin)
    written = _continued(in_bfloat16(model), first, each - drawn.shape[1], draw, "write text")
    windows = written[:, -each:].reshape(count, texts * each)[:, :room] if each else drawn
    return begun(windows, begin)


def drawn_at(shares: Tensor, heights: Tensor) -> Tensor:
    """Return an index for each row, drawn in proportion to its shares: int64 (rows, 1).

    heights: float64 (rows, 1), uniform in [0, 1). On a CPU torch.multinomial takes forty times as
    long for a vocabulary.
    """
    sums = shares.double().cumsum(-1)
    found = torch.searchsorted(sums, heights.to(sums.device) * sums[:, -1:], right=True)
    return found.clamp_max(shares.shape[-1] - 1)


@torch.inference_mode()
def continue_greedily(model: CausalLM, prompts: Tensor, count: int, *, desc: str) -> Tensor:
    """Return ``count`` most likely tokens after each prompt: int64 (prompts, count).

    prompts: int64 (prompts, tokens). An end of text is never taken, so that all are of one length.
    """
    texts = _continued(model, prompts, count, lambda logits: logits.argmax(-1, keepdim=True), desc)
    return texts[:, prompts.shape[1] :]


def _continued(
    model: CausalLM, begun: Tensor, count: int, draw: Callable[[Tensor], Tensor], desc: str
) -> Tensor:
    """Return texts with ``count`` tokens more, which ``draw`` takes by logits (texts, vocabulary).

    begun: int64 (texts, tokens).
    """
    ends = getattr(model.module.generation_config, "eos_token_id", None)
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    ends = [end for end in ends if 0 <= end < model.config.vocab_size]
    progress = tqdm(total=len(begun) * count, desc=desc, unit="token", disable=None)
    parts = []
    for ids in begun.split(BATCH):
        parts.append(_continue(model, ids, count, ends, draw, progress))
    progress.close()
    return torch.cat(parts) if parts else begun.new_empty(0, begun.shape[1] + count)


def _continue(
    model: CausalLM,
    ids: Tensor,
    count: int,
    ends: list[int],
    draw: Callable[[Tensor], Tensor],
    progress: Any,
) -> Tensor:
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    unread = ids
    for _ in range(count):
        out = model.module(input_ids=unread.to(model.device), past_key_values=cache, use_cache=True)
        # What is not finite here is found, and named, by the calibration that follows.
        logits = out.logits[:, -1].float().cpu().nan_to_num(0.0, 0.0, 0.0)
        logits[:, ends] = -torch.inf
        unread = draw(logits)
        ids = torch.cat([ids, unread], 1)
        progress.update(len(ids))
    return ids
