"""Calibration tokens as a caller gives them, made into windows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize.ops.arguments import check_dense, shown

ACCEPTED = (
    "must be int64 (windows, length), what a tokenizer returns, lists of token ids, or an iterable "
    "of such"
)


def check_tokens(tokens: Any, vocabulary: int, positions: int | None = None) -> Tensor:
    """Return the calibration windows as one int64 tensor (windows, length), checked.

    Args:
        tokens: such a tensor; a mapping with ``input_ids`` and, where there is padding, its
            ``attention_mask``; lists of ids; NumPy arrays; or an iterable of these. Texts of
            different lengths are joined in order and cut into windows as long as the longest; what
            is left over at the end is left out.
        vocabulary: ids are below it.
        positions: tokens that the model can tell apart; None for any number.

    Raises:
        ValueError: for anything else, in words; for no tokens at all.
    """
    parts = _parts(tokens)
    tensors = all(part.dim() == 2 for part in parts)
    if tensors and len({part.shape[1] for part in parts}) > 1:
        wrong = next(part for part in parts if part.shape[1] != parts[0].shape[1])
        raise ValueError(
            f"tokens are {wrong.dtype} of shape {tuple(wrong.shape)}: must be int64 "
            "(windows, length), all of one length"
        )
    if tensors and parts:
        windows = torch.cat([part.cpu() for part in parts])
    else:
        windows = _cut([text.cpu() for text in _texts(parts) if len(text)])
    if windows.numel() == 0:
        raise ValueError("there are no calibration tokens")
    most, least = int(windows.max()), int(windows.min())
    if most >= vocabulary or least < 0:
        wrong_id = most if most >= vocabulary else least
        raise ValueError(f"token id {wrong_id}: the model's vocabulary is {vocabulary}")
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"tokens are windows of {windows.shape[1]}: the model has {positions} positions; cut "
            "them into shorter ones"
        )
    return windows


def _cut(texts: list[Tensor]) -> Tensor:
    """Return texts as windows of one length."""
    if not texts:
        return torch.empty((0, 0), dtype=torch.int64, device="cpu")
    lengths = {len(text) for text in texts}
    if len(lengths) == 1:
        return torch.stack(texts)
    joined, length = torch.cat(texts), max(lengths)
    return joined[: len(joined) // length * length].view(-1, length)


def _parts(tokens: Any) -> list[Tensor]:
    """Return tensors (windows, length) as they were given, and texts (length,)."""
    if isinstance(tokens, Mapping):
        return _masked(tokens)
    if isinstance(tokens, Tensor):
        check_dense("tokens", tokens)
        whole = tokens.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if tokens.dim() not in (1, 2) or not whole:
            given = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
            raise ValueError(f"tokens are {given}: must be int64 (windows, length)")
        return [tokens.detach().long()]
    if isinstance(tokens, np.ma.MaskedArray):
        raise ValueError("tokens are a masked array: give the tokens that count")
    if isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
            given = f"a NumPy array of {tokens.dtype}, shape {tokens.shape}"
            raise ValueError(f"tokens are {given}: must be integers (windows, length)")
        return [torch.from_numpy(tokens.astype(np.int64))]
    if isinstance(tokens, (str, bytes, bytearray, memoryview)) or not isinstance(tokens, Iterable):
        advice = "; pass text through the model's tokenizer first"
        raise ValueError(
            f"tokens is {shown(tokens)}: {ACCEPTED}{advice if isinstance(tokens, str) else ''}"
        )
    entries = list(tokens)
    if entries and all(isinstance(e, Integral) and not isinstance(e, bool) for e in entries):
        if not all(-(2**63) <= int(entry) < 2**63 for entry in entries):
            raise ValueError("tokens hold a number beyond 64 bits: must be token ids")
        ids = [int(entry) for entry in entries]
        return [torch.tensor(ids, dtype=torch.int64, device="cpu")]
    return [part for entry in entries for part in _parts(entry)]


def _masked(batch: Mapping) -> list[Tensor]:
    """Return the texts of a tokenizer's result, without what its attention mask leaves out."""
    if "input_ids" not in batch:
        raise ValueError(f"tokens are a {type(batch).__name__} without input_ids: {ACCEPTED}")
    texts, mask = _texts(_parts(_whole(batch["input_ids"]))), batch.get("attention_mask")
    if mask is None:
        return texts
    if isinstance(mask, (Tensor, np.ndarray)):
        given = check_dense("attention_mask", mask) if isinstance(mask, Tensor) else mask
        mask = (torch.as_tensor(given).detach().cpu() != 0).long()  # of whatever type
    else:
        try:
            mask = [(np.asarray(row, dtype=np.float64) != 0).astype(np.int64) for row in mask]
        except (TypeError, ValueError):
            raise ValueError(f"tokens: attention_mask is {shown(mask)}: must be numbers") from None
    masks = _texts(_parts(mask))
    if [len(text) for text in texts] != [len(row) for row in masks]:
        raise ValueError("tokens: attention_mask must have the shape of input_ids")
    return [text[row.to(text.device) != 0] for text, row in zip(texts, masks, strict=True)]


def _texts(parts: list[Tensor]) -> list[Tensor]:
    """Return the texts of parts, each of one or several."""
    return [text for part in parts for text in (part if part.dim() == 2 else [part])]


def _whole(value: Any) -> Any:
    """Return ids of any integer type as ``_parts`` takes them."""
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        return check_dense("tokens", value).long()
    return value
