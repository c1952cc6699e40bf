"""How much memory a run on a shelf takes (dotresize.resident), said before it starts.

One decoder layer is in memory at a time, so the peak is that of the greediest stage. With D and k
the residual widths, F the inner one, V the vocabulary, c the bytes of a computed number, T the
calibration tokens and B those of a batch, and P_D, P_k the parameters of a layer before and after:

calibration   c P_D + 28 D^2 + batch                          (two sums, a product and its parts)
map           56 D^2
tables        c V (D + k) + 8 rows (D + k) + 16 D^2
refit         c (P_D + P_k) + 16 F^2 + 40 F k + batch         (float64 normal equations, their LU)
elimination   the same with 48 F^2                            (a narrower feed-forward)
experts       c (P_D + P_k) + max(batch, c P_k / 2)           (no equations; what is stored)
evaluation    c V D + 12 B V                                  (where there is a text for it)
batch         4 B (6 D + 3 F), with t experts for each token 4 B (6 D + t (2 D + 4 F)); where
              attention writes its scores out, 4 B L (3 H + 2) more for H heads and windows of L
activations   c T (3 D + 2 k + F), where they are kept        (streams.Spill), or c D for each
              token of the longest text to evaluate on, if that is more

to which the host adds what Python and its libraries take before the first stage.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.absorb import TABLE_ROWS
from dotresize.accounting import peak_memory
from dotresize.files import Files
from dotresize.models import architecture_of
from dotresize.resident import device_of, parts, shelf_of

# Decimal, as sizes of memory are quoted, and binary.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# Code and buffers that libraries load with their first use.
_LATER = 100 * 10**6


def parse(size: str) -> int:
    """Bytes of "3GB", "2.5 GiB", "800M"; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", size.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{size!r} is not a size of memory, such as 3GB or 2.5GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def shown(size: float) -> str:
    """A size of memory for people."""
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        place: of the activations between layers, see ``streams.Spill``.
        host, device: peak bytes; those of the device without its libraries.
        stages: bytes of each stage alone.
    """

    place: str
    host: int
    device: int
    stages: dict[str, int]


def plan(
    model: Any,
    tokens: Tensor,
    width: int,
    inner: int,
    batch_windows: int,
    budget: int,
    evaluated: int = 0,
) -> Plan:
    """The plan for a model on a shelf, with its activations where ``budget`` bytes let them be.

    Args:
        tokens: int64 (windows, length).
        width, inner: residual and feed-forward width of the narrowed model.
        budget: bytes of host memory.
        evaluated: tokens of the longest text to evaluate on.

    Raises ValueError where the budget is too small for any place.
    """
    c = _computed_bytes(model)
    batch = min(batch_windows, len(tokens)) * tokens.shape[1]
    stages = stage_bytes(model, batch, tokens.shape[1], width, inner, c, evaluated=evaluated > 0)
    kept = activation_bytes(model, tokens.numel(), width, c)
    kept = max(kept, evaluated * model.config.hidden_size * c // distributed.size())
    device, base = device_of(model), _now() + _LATER
    most = max(stages.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        place = "device" if most + kept < 0.9 * free else "host"
        most += kept if place == "device" else 0
        on_host = 2 * c * max(_sizes(model))  # a part on its way from and to the files
    else:
        place, on_host = "host", most
    need = base + on_host
    if place == "host" and need + kept > budget:
        place = "disk"
    need += kept if place == "host" else 0
    if need > budget:
        stage = max(stages, key=lambda name: stages[name])
        raise ValueError(
            f"memory {shown(budget)}: {shown(need)} are needed, "
            f"{shown(stages[stage])} of them by the {stage}; give more, or fewer --window tokens"
        )
    return Plan(place, need, most if device.type == "cuda" else 0, stages)


def activation_bytes(model: Any, tokens: int, width: int, c: int) -> int:
    """What so many calibration tokens take between two layers of both models."""
    inner = architecture_of(model.config).inner_width(model.config)
    each = 3 * model.config.hidden_size + 2 * width + inner
    return tokens * each * c // distributed.size()


def place_of(model: Any, tokens: Tensor) -> str:
    """Where the activations of a run go; of a model in memory on its device, if half is left."""
    shelf, device = shelf_of(model), device_of(model)
    if isinstance(shelf, Files):
        return shelf.place
    if device.type != "cuda":
        return "disk"
    width, c = model.config.hidden_size, _computed_bytes(model)
    kept = activation_bytes(model, tokens.numel(), width, c)
    return "device" if kept < 0.5 * torch.cuda.mem_get_info(device)[0] else "disk"


def stage_bytes(
    model: Any, batch_tokens: int, length: int, width: int, inner: int, c: int, *, evaluated: bool
) -> dict[str, int]:
    """The module's header: by stage, without the activations of all tokens.

    model: may be a skeleton; batch_tokens: B; length: L; width, inner: of the narrowed model.
    """
    config = model.config
    architecture = architecture_of(config)
    old, table = config.hidden_size, config.vocab_size
    wide = architecture.inner_width(config)
    layer = sum(p.numel() for p in model.get_submodule(f"{architecture.layers}.0").parameters())
    batch = _batch_bytes(config, batch_tokens, length)
    layers = round(c * layer * (1 + width / old))
    if architecture.has_inner_width:
        equations = (48 if inner < wide else 16) * wide**2 + 40 * wide * width + batch
    else:
        equations = max(batch, c * layer * width // (2 * old))
    stages = {
        "calibration": c * layer + 28 * old**2 + batch,
        "map": 56 * old**2,
        "tables": c * table * (old + width) + 8 * TABLE_ROWS * (old + width) + 16 * old**2,
        "refit": layers + equations,
    }
    if evaluated:
        stages["evaluation"] = c * table * old + 12 * batch_tokens * table
    return stages


def _batch_bytes(config: Any, tokens: int, length: int) -> int:
    """What a layer takes beside its weights, in float32."""
    architecture = architecture_of(config)
    old, wide = config.hidden_size, architecture.inner_width(config)
    inner = 3 * wide
    if not architecture.has_inner_width:
        inner = config.num_experts_per_tok * (2 * old + 4 * wide)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    scores = length * (3 * config.num_attention_heads + 2) if eager else 0
    return 4 * tokens * (6 * old + inner + scores)


def _sizes(model: Any) -> list[int]:
    """Parameters of every part."""
    return [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in parts(model)]


def _computed_bytes(model: Any) -> int:
    shelf = shelf_of(model)
    if isinstance(shelf, Files):
        return shelf.computed(next(iter(shelf.where))).itemsize
    return next(model.parameters()).element_size()


def _now() -> int:
    """Resident bytes of this process; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory()["host"]
    return pages * os.sysconf("SC_PAGE_SIZE")
