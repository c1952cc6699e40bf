"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.residual_stream import Streams
from dotresize.calibration.text import begun
from dotresize.models.causal_lm import CausalLM


def evaluation_windows(
    stream: Tensor, length: int, count: int | None = None, first: int | None = None
) -> Tensor:
    """Return consecutive windows of a text's tokens, or ``count`` of them spread evenly over it.

    No token is in two windows. A text shorter than one window is one shorter window. With a
    ``first`` token every window begins with it, as the model's tokenizer begins every text.
    """
    if len(stream) < 2:
        raise ValueError(f"the text has {len(stream)} tokens: perplexity needs at least 2")
    length = min(length - (first is not None), len(stream))
    whole = stream[: len(stream) // length * length].view(-1, length)
    if count is None or count >= len(whole):
        return begun(whole, first)
    spread = torch.arange(count, dtype=torch.int64, device=whole.device) * len(whole) // count
    return begun(whole[spread], first)


@torch.inference_mode()
def perplexity(
    model: CausalLM, windows: Tensor, *, batch_windows: int = 2, desc: str = ""
) -> float:
    """Return ``exp`` of the mean next-token loss in each window, its first token given.

    windows: int64 (count, length). The loss is summed in float64.
    """
    total, count = 0.0, 0
    progress = tqdm(total=len(windows), desc=f"evaluate {desc}", unit="window", disable=None)
    logits_of = _logits if model.store.whole else _offloaded_logits
    for ids, logits in logits_of(model, windows, batch_windows):
        logits = logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss)
        count += ids[:, 1:].numel()
        progress.update(len(ids))
    progress.close()
    total, count = _of_all(total, count, model.device)
    if not math.isfinite(total):
        raise ValueError(f"the model's loss {f'on {desc} ' if desc else ''}is not finite")
    return math.exp(min(total / count, 700.0))


def _of_all(total: float, count: int, device: torch.device) -> tuple[float, int]:
    sums = torch.tensor([total, count], dtype=torch.float64, device=device)
    distributed.total(sums)
    return float(sums[0]), int(sums[1])


def _logits(
    model: CausalLM, windows: Tensor, batch_windows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    mine = distributed.share(windows)
    for ids in mine.split(batch_windows) if len(mine) else ():
        ids = ids.to(model.device)
        yield ids, model.module(input_ids=ids, use_cache=False).logits


def _offloaded_logits(
    model: CausalLM, windows: Tensor, batch_windows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits of windows that all pass a layer before the next one is read."""
    with closing(Streams(model, windows, batch_windows)) as streams:
        for name in model.layers:
            with model.resident(name) as layer:
                for i in range(len(streams)):
                    streams.stream[i] = streams.run(layer, i)
        with model.resident(model.architecture.final_norm, model.architecture.head):
            for i, ids in enumerate(streams.batches):
                yield ids.to(model.device), streams.logits(i)
