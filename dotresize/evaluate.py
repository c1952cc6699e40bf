"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


def evaluation_windows(stream: Tensor, length: int, count: int | None = None) -> Tensor:
    """Consecutive windows of a text's tokens, or ``count`` of them spread evenly over it.

    No token is in two windows. A text shorter than one window is one shorter window.
    """
    if len(stream) < 2:
        raise ValueError(f"the text has {len(stream)} tokens: perplexity needs at least 2")
    length = min(length, len(stream))
    whole = stream[: len(stream) // length * length].view(-1, length)
    if count is None or count >= len(whole):
        return whole
    return whole[(torch.arange(count) * len(whole)) // count]


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor, *, batch_windows: int = 2, desc: str = "") -> float:
    """``exp`` of the mean next-token loss in each window, its first token given.

    windows: int64 (count, length). The loss is summed in float64.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    progress = tqdm(total=len(windows), desc=f"evaluate {desc}", unit="window", disable=None)
    for ids in windows.split(batch_windows):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss)
        count += ids[:, 1:].numel()
        progress.update(len(ids))
    progress.close()
    if not math.isfinite(total):
        raise ValueError(f"the model's loss {f'on {desc} ' if desc else ''}is not finite")
    return math.exp(min(total / count, 700.0))
