"""Calibration text: token windows from files."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

ACCEPTED = "plain text, JSON lines with a field 'text' (also .gz), or .parquet with a column 'text'"
# Names of JSON lines. Files of other names are read as such where their first line is one.
_LINES = {".jsonl", ".ndjson", ".jsonlines"}
# Text, but not prose: braces, commas and tags would be calibrated on.
_REFUSED = {".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".ipynb"}
# Windows of each text that are held out where nobody names texts to evaluate on.
HELD_OUT = 4
# Tokens under which a remainder says nothing of a model.
LEAST_HELD_OUT = 16


def read_text(path: str | Path) -> list[str]:
    """Return the documents of a text file: of plain text one, of JSON lines the ``text`` of each.

    JSON lines are recognised by their name or by their first object, and may be gzipped, as may
    plain text. Of a .parquet file the documents are its column ``text``, where pyarrow is
    installed. Raises ValueError, naming the file and line, for what is missing, empty, or neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"text file {path} {'is not a file' if path.exists() else 'does not exist'}"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = suffixes[-2 if zipped else -1] if len(suffixes) > zipped else ""
    if suffix == ".parquet" and not zipped:
        documents = _parquet(path)
    else:
        text = _decoded(path, zipped)
        if suffix in _LINES or _is_json_object(text.lstrip().partition("\n")[0]):
            lines = text.split("\n")
            documents = [_json_text(path, i, line) for i, line in enumerate(lines, 1)]
        elif suffix in _REFUSED:
            raise ValueError(f"text file {path} is {suffix}: must be {ACCEPTED}")
        else:
            documents = [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"text file {path} is empty")
    return documents


def _decoded(path: Path, zipped: bool) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"text file {path} cannot be read: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise ValueError(f"text file {path} is not UTF-8 ({place}): must be {ACCEPTED}") from None
    if "\0" in text:
        raise ValueError(f"text file {path} holds zero bytes: must be {ACCEPTED}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_json_object(line: str) -> bool:
    """Return whether a line is a JSON object, with whatever in it."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(path: Path) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"text file {path}: needs pyarrow (pip install pyarrow)") from None
    try:
        values = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except Exception as error:  # the reader's own exceptions have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"text file {path}: must have a column 'text': {reason}") from None
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"text file {path}: its column 'text' must hold strings only")
    return values


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


def added_around(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the tokens that ``tokenizer(text)`` puts in front of a text and behind it.

    Of Gemma, Llama and Mistral the first is the beginning of text (BOS); None where there is none.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            after = whole[i + len(plain) :]
            return (whole[0] if i else None), (after[-1] if after else None)
    return None, None


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


def random_windows(
    streams: list[Tensor],
    count: int,
    length: int,
    seed: int,
    apart: list[list[range]] | None = None,
    first: int | None = None,
) -> Tensor:
    """Return ``count`` windows of ``length`` tokens placed at random over all of the streams.

    Each stream gives an equal share, whatever its length: calibration on a mixture of sources is
    worth more than any choice of map. The windows of one stream are spread evenly (one in each of
    equal stretches, at a random place), so that they cover all of it; the first windows alone gave
    maps far worse on other text. With a ``first`` token every window begins with it, as the model's
    tokenizer begins every text. Returns int64 (count, length), shuffled.

    apart: ranges of each stream that no window may touch (``held_out``).
    """
    own = length - (first is not None)  # tokens of the text itself
    generator = torch.Generator().manual_seed(seed)
    placed = _starts(streams, count, own, generator, apart)
    windows = [
        stream[start : start + own]
        for stream, starts in zip(streams, placed, strict=True)
        for start in starts.tolist()
    ]
    order = torch.randperm(len(windows), generator=generator, dtype=torch.int64, device="cpu")
    return begun(torch.stack(windows)[order], first)


def held_out(
    streams: list[Tensor], count: int, length: int, seed: int, most: int = HELD_OUT
) -> list[list[range]]:
    """Return ranges of each stream that no window of ``random_windows`` touches.

    The other arguments are those of ``random_windows``. A stream has up to ``most`` ranges of
    ``length`` tokens, spread evenly over what is left of it; where no gap is as long, one shorter
    range, the longest there is, or none under ``LEAST_HELD_OUT`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for stream, starts in zip(
        streams, _starts(streams, count, length, generator, None), strict=True
    ):
        gaps, end = [], 0
        for start in [*starts.tolist(), len(stream)]:  # ascending
            gaps.append(range(end, max(start, end)))
            end = max(end, start + length)
        whole = [gap[i : i + length] for gap in gaps for i in range(0, len(gap), length)]
        whole = [part for part in whole if len(part) == length]
        if not whole:
            longest = max(gaps, key=len)
            whole = [longest] if len(longest) >= LEAST_HELD_OUT else []
        few = min(most, len(whole))
        found.append([whole[i * len(whole) // few] for i in range(few)])
    return found


def _starts(
    streams: list[Tensor],
    count: int,
    length: int,
    generator: torch.Generator,
    apart: list[list[range]] | None,
) -> list[Tensor]:
    """Return where the windows of each stream begin, ascending: int64 (share of the stream,)."""
    shares = [count // len(streams) + (i < count % len(streams)) for i in range(len(streams))]
    placed = []
    for i, (stream, share) in enumerate(zip(streams, shares, strict=True)):
        every = len(stream) - length + 1
        barred = _barred(apart[i], length, every) if apart is not None else []
        room = every - sum(map(len, barred))
        if share and room < 1:
            raise ValueError(f"the text has {len(stream)} tokens: a window takes {length}")
        stretch = torch.rand(share, generator=generator, dtype=torch.float64, device="cpu")
        starts = (
            (torch.arange(share, dtype=torch.int64, device="cpu") + stretch)
            * (room / max(1, share))
        ).long()
        starts = starts.clamp(max=room - 1)
        for places in barred:  # ascending, so that what lies behind one is moved past it
            starts = torch.where(starts >= places.start, starts + len(places), starts)
        placed.append(starts)
    return placed


def _barred(apart: list[range], length: int, every: int) -> list[range]:
    """Return disjoint ranges of the starts below ``every`` whose windows would touch a range."""
    found, end = [], 0
    for part in sorted(apart, key=lambda part: part.start):
        start = max(end, part.start - length + 1)
        end = max(end, min(part.stop, every))
        if start < end:
            found.append(range(start, end))
    return found


def begun(windows: Tensor, first: int | None) -> Tensor:
    """Return windows with a token put in front of each, (count, length + 1); None for none."""
    if first is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), first), windows], 1)
