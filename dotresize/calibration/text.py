"""Calibration text: token windows from files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


def read_text(path: str | Path) -> list[str]:
    """Return the documents of a text file: one, or of .jsonl the ``text`` field of each line.

    Raises ValueError, naming the file and line, for what is missing, empty, or not as described.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"text file {path} {'is not a file' if path.exists() else 'does not exist'}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {path} is not UTF-8 (byte {error.start})") from None
    if path.suffix == ".jsonl":
        documents = [_json_text(path, i, line) for i, line in enumerate(text.split("\n"), 1)]
    else:
        documents = [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"text file {path} is empty")
    return documents


def _json_text(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")  # JSON can spell half of a surrogate pair, which is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{path} line {number}: must be a JSON object with a string field 'text'")
    return text


def tokenize(path: str | Path, tokenizer: Any) -> Tensor:
    """Return all tokens of a text file.

    Its documents are joined by the end-of-text token, if there is one.
    """
    ids: list[int] = []
    documents = tqdm(read_text(path), desc=f"tokenize {Path(path).name}", disable=None)
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def random_windows(streams: list[Tensor], count: int, length: int, seed: int) -> Tensor:
    """Return ``count`` windows of ``length`` tokens placed at random over all of the streams.

    Each stream gives an equal share, whatever its length: calibration on a mixture of sources is
    worth more than any choice of map. The windows of one stream are spread evenly (one in each of
    equal stretches, at a random place), so that they cover all of it; the first windows alone gave
    maps far worse on other text. Returns int64 (count, length), shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = [count // len(streams) + (i < count % len(streams)) for i in range(len(streams))]
    windows = []
    for stream, share in zip(streams, shares, strict=True):
        room = len(stream) - length + 1
        if share and room < 1:
            raise ValueError(f"the text has {len(stream)} tokens: a window takes {length}")
        stretch = torch.rand(share, generator=generator, dtype=torch.float64, device="cpu")
        starts = (
            (torch.arange(share, dtype=torch.int64, device="cpu") + stretch)
            * (room / max(1, share))
        ).long()
        windows += [stream[start : start + length] for start in starts.clamp(max=room - 1)]
    order = torch.randperm(len(windows), generator=generator, dtype=torch.int64, device="cpu")
    return torch.stack(windows)[order]


def check_tokens(tokens: Tensor | Iterable[Tensor], vocabulary: int) -> Tensor:
    """Return the calibration windows as one int64 tensor (windows, length), checked.

    Takes such a tensor or an iterable of them, of equal length. ValueError for anything else.
    """
    parts = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    for part in parts:
        if part.dim() != 2 or part.dtype != torch.int64 or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"tokens are {part.dtype} of shape {tuple(part.shape)}: must be int64 "
                "(windows, length), all of one length"
            )
    windows = torch.cat(parts) if parts else torch.empty((0, 0), dtype=torch.int64, device="cpu")
    if windows.numel() == 0:
        raise ValueError("there are no calibration tokens")
    most, least = int(windows.max()), int(windows.min())
    if most >= vocabulary or least < 0:
        wrong = most if most >= vocabulary else least
        raise ValueError(f"token id {wrong}: the model's vocabulary is {vocabulary}")
    return windows
