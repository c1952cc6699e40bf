"""Multiple choice by a model's likelihoods, each context read once for all of its choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..lm_eval_task.items import CHOICES, Item, make_items

ITEMS = 30  # of one source


def items_of(held_out: list[str], calibration: list[str], tokenizer: Any) -> list[tuple]:
    """Return (context, choices, answer) of a source's items, as token ids."""
    return [_tokens(item, tokenizer) for item in make_items(held_out, calibration, ITEMS)]


def _tokens(item: Item, tokenizer: Any) -> tuple[Tensor, list[Tensor], int]:
    context = tokenizer(item["context"])["input_ids"]
    choices = []
    for choice in item["choices"]:
        whole = tokenizer(f"{item['context']} {choice}")["input_ids"]
        if whole[: len(context)] != context:
            raise ValueError(f"the tokens of {item['context'][-20:]!r} change with what follows")
        choices.append(torch.tensor(whole[len(context) :]))
    return torch.tensor(context), choices, item["answer"]


@torch.inference_mode()
def accuracy(model: Any, items: list[tuple[Tensor, list[Tensor], int]]) -> float:
    """Return the share of items whose likeliest choice is the right one.

    model: a transformers model. A choice's likelihood is the product of its tokens'.
    """
    right = 0
    for context, choices, answer in items:
        cache = DynamicCache(config=model.config)
        first = model(
            input_ids=context[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = first.past_key_values
        cache.batch_repeat_interleave(CHOICES)
        ids = torch.nn.utils.rnn.pad_sequence(choices, batch_first=True)
        rest = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first.logits.expand(CHOICES, -1, -1), rest[:, :-1]], 1)
        each = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        sums = [float(each[i, : len(choice)].sum()) for i, choice in enumerate(choices)]
        right += max(range(CHOICES), key=lambda i: sums[i]) == answer
    return right / len(items)
