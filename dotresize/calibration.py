"""Calibration: token windows from text files, and statistics of the residual stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.models import architecture_of
from dotresize.ops.l1_accumulator import L1CostAccumulator
from dotresize.streams import StopForward


def read_text(path: str | Path) -> list[str]:
    """Documents of a UTF-8 text file (one), or of a .jsonl file with a ``text`` field per line.

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
    """All tokens of a text file, documents joined by the end-of-text token if there is one."""
    ids: list[int] = []
    documents = tqdm(read_text(path), desc=f"tokenize {Path(path).name}", disable=None)
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def random_windows(streams: list[Tensor], count: int, length: int, seed: int) -> Tensor:
    """``count`` windows of ``length`` tokens placed at random over all of the streams.

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
        stretch = torch.rand(share, generator=generator, dtype=torch.float64)
        starts = ((torch.arange(share) + stretch) * (room / max(1, share))).long()
        windows += [stream[start : start + length] for start in starts.clamp(max=room - 1)]
    order = torch.randperm(len(windows), generator=generator)
    return torch.stack(windows)[order]


@dataclass
class Statistics:
    """What one pass over the calibration tokens leaves behind, over L residual locations.

    Tokens are RMS-normalised first, so that all weigh alike however large the stream has grown.

    Attributes:
        locations: names of the norms that read the stream there.
        importance: (L, D) float64, mean |x|.
        moment: (L, D, D) float64, mean of x'x; None if not asked for.
        cost: (L, D, D) float32, mean |x_i - x_j|; None if not asked for.
        seconds: "calibration" (forward passes and moments), "cost", and "own text".
        own_windows: how many of the windows the model wrote itself.
    """

    locations: list[str]
    tokens: int
    importance: Tensor
    moment: Tensor | None
    cost: Tensor | None
    seconds: dict[str, float] = field(default_factory=dict)
    own_windows: int = 0

    @classmethod
    def none(cls, tokens: int, width: int) -> Statistics:
        """Of no location: for a model whose residual stays as it is."""
        seconds = {"calibration": 0.0, "cost": 0.0}
        return cls([], tokens, torch.empty(0, width), None, None, seconds)

    def mean(self) -> Statistics:
        """The mean over locations, as statistics of a single one."""
        return self._reduced(["mean"], lambda x: x.mean(0, keepdim=True))

    def at(self, i: int) -> Statistics:
        """Those of location i alone."""
        return self._reduced([self.locations[i]], lambda x: x[i : i + 1])

    def _reduced(self, locations: list[str], reduce: Callable[[Tensor], Tensor]) -> Statistics:
        moment, cost = (None if x is None else reduce(x) for x in (self.moment, self.cost))
        importance = reduce(self.importance)
        return Statistics(locations, self.tokens, importance, moment, cost, self.seconds)


def residual_stream(model: Any, ids: Tensor) -> Tensor:
    """The residual stream at every location, (L, tokens, D): what each of its norms reads."""
    architecture = architecture_of(model.config)
    seen: list[Tensor] = []
    norms = [norm for _, norm in architecture.norms(model)]

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))
        if module is norms[-1]:
            raise StopForward

    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    try:
        model(input_ids=ids, use_cache=False)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen)


def unit_rms(stream: Tensor) -> Tensor:
    """Every token divided by its root mean square over the channels, the last axis."""
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-12)


def check_tokens(tokens: Tensor | Iterable[Tensor], vocabulary: int) -> Tensor:
    """Calibration windows as one int64 tensor (windows, length) of ids below ``vocabulary``.

    Takes such a tensor or an iterable of them, of equal length. ValueError for anything else.
    """
    parts = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    for part in parts:
        if part.dim() != 2 or part.dtype != torch.int64 or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"tokens are {part.dtype} of shape {tuple(part.shape)}: must be int64 "
                "(windows, length), all of one length"
            )
    windows = torch.cat(parts) if parts else torch.empty(0, 0, dtype=torch.int64)
    if windows.numel() == 0:
        raise ValueError("there are no calibration tokens")
    most, least = int(windows.max()), int(windows.min())
    if most >= vocabulary or least < 0:
        wrong = most if most >= vocabulary else least
        raise ValueError(f"token id {wrong}: the model's vocabulary is {vocabulary}")
    return windows


@torch.inference_mode()
def collect(
    model: Any,
    tokens: Tensor,
    *,
    cost: bool = True,
    moment: bool = True,
    batch_windows: int = 4,
    backend: str = "auto",
) -> Statistics:
    """One streaming pass: importance, second moments and L1 costs at every residual location.

    Raises ValueError naming the location and neuron where activations are not finite.
    """
    device = next(model.parameters()).device
    names = [name for name, _ in architecture_of(model.config).norms(model)]
    width = model.config.hidden_size
    accumulator = None
    if cost:
        accumulator = L1CostAccumulator(width, batch=len(names), device=device, backend=backend)
    importance = torch.zeros(len(names), width, dtype=torch.float64, device=device)
    moments = None
    if moment:
        moments = torch.zeros(len(names), width, width, dtype=torch.float64, device=device)
    count, seconds = 0, {"calibration": 0.0, "cost": 0.0}
    progress = tqdm(total=len(tokens), desc="calibration", unit="window", disable=None)
    for ids in tokens.split(batch_windows):
        ids = ids.to(device)
        start = time.perf_counter()
        stream = residual_stream(model, ids).float()
        _check_finite(stream, names)
        stream = unit_rms(stream)
        count += stream.shape[1]
        importance += stream.abs().sum(1).double()
        if moments is not None:
            moments += (stream.mT @ stream).double()
        _synchronize(device)
        middle = time.perf_counter()
        if accumulator is not None:
            accumulator.update(stream)
            _synchronize(device)
        seconds["calibration"] += middle - start
        seconds["cost"] += time.perf_counter() - middle
        progress.update(len(ids))
    progress.close()
    return Statistics(
        names,
        count,
        importance / count,
        None if moments is None else moments / count,
        None if accumulator is None else accumulator.result(),
        seconds,
    )


def _check_finite(stream: Tensor, names: list[str]) -> None:
    finite = torch.isfinite(stream).all(1)
    if not finite.all():
        location, neuron = (~finite).nonzero()[0].tolist()
        raise ValueError(f"activations entering {names[location]}, neuron {neuron}, are not finite")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
