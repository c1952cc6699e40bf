"""The neurons that a width map is built around: the largest ones, or a pruner's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.narrow.maps import largest
from dotresize.ops.arguments import index_tensor

# Union, as aliases are evaluated: Python 3.10 cannot join a Callable and None with a bar.
Targets = Union[Tensor, Callable[[Statistics, int], Tensor], None]  # noqa: UP007


def given_targets(targets: Any) -> Targets:
    """Return a caller's targets: a tensor of indices, also from a list or an array, or a callable.

    ValueError for anything else.
    """
    return targets if targets is None or callable(targets) else index_tensor("targets", targets)


def kept_set(targets: Targets, statistics: Statistics, k: int) -> Tensor:
    """Return the kept neurons, int64 (k,), ascending: ``targets``, or those of largest magnitude.

    Raises ValueError where it is not k different neurons of the model.
    """
    width = statistics.importance.shape[1]
    if targets is None:
        return largest(statistics.importance.mean(0), k)
    kept = targets(statistics, k) if callable(targets) else targets
    check_kept(kept, width, k)
    return kept.to(statistics.importance.device).sort().values


def check_kept(kept: Tensor, width: int, k: int) -> None:
    """Raise ValueError unless ``kept`` is k different neurons out of ``width``."""
    kept = index_tensor("targets", kept)
    if kept.dim() != 1:
        raise ValueError("targets: must be a one-dimensional int64 tensor of neurons")
    kept = kept.sort().values
    if len(kept) != k:
        raise ValueError(f"targets: {len(kept)} neurons are named, the new width is {k}")
    if int(kept[0]) < 0 or int(kept[-1]) >= width:
        wrong = int(kept[0]) if int(kept[0]) < 0 else int(kept[-1])
        raise ValueError(f"targets: neuron {wrong} is not one of the model's {width}")
    if (kept[1:] == kept[:-1]).any():
        twice = int(kept[1:][kept[1:] == kept[:-1]][0])
        raise ValueError(f"targets: neuron {twice} is named twice")


def read_targets(path: str | Path) -> Tensor:
    """Return the kept neurons from a JSON list of numbers, counted from 0; int64 (k,)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"targets {path}: no such file")
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        numbers = None
    if not isinstance(numbers, list) or not numbers or not all(type(i) is int for i in numbers):
        raise ValueError(f"targets {path}: must be a JSON list of neuron numbers, such as [0, 2]")
    if not all(abs(i) < 2**62 for i in numbers):
        raise ValueError(f"targets {path}: must be a JSON list of neuron numbers, such as [0, 2]")
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
