"""How much memory an offloaded run takes, computed before it starts.

One decoder layer is in memory at a time, so the peak is that of the largest stage. With D and k
the residual widths, F the inner one, V the vocabulary, c the bytes of a computed number, T the
calibration tokens and B those of a batch, and P_D, P_k the parameters of a layer before and after:

calibration   c P_D + 28 D^2 + batch                          (two sums, a product and its parts)
map           136 D^2                                         (of which 32 are statistics)
sensitivity   c P_D + 84 D^2 + 3 batch                        (a layer's graph, twice as many sums)
output        c V D + 16 L V                                  (a window's logits and their gradient)
tables        c V (D + k) + 8 rows (D + k) + 48 D^2
refit         c (P_D + P_k) + 16 F^2 + 40 F k + 32 D^2 + batch (float64 equations, their factor),
              and 12 F D more in half precision    (both streams' products, least_squares.py)
elimination   the same with 48 F^2                            (a narrower feed-forward)
layer widths  c P_D + 40 F^2 + 32 F D + batch                 (each layer's elimination, before)
divergence    c V D + 2 c L V + 2048 V                        (a window's logits, chunks in float32)
experts       c (P_D + P_k) + max(batch, c P_k / 2)           (no equations; what is stored)
evaluation    c V (D + k) + 12 B V                            (both models' logits side by side)
batch         4 B (6 D + 3 F), with t experts for each token 4 B (6 D + t (2 D + 4 F)); where
              attention writes its scores out, 4 B L (3 H + 2) more for H heads and windows of L
activations   c T (3 D + 2 k + F), where they are kept        (ActivationCache), or c (D + k) for
              each token to evaluate on, if that is more

to which the host adds what Python and its libraries take before the first stage. A GPU has one part
more, which is read ahead.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dotresize import distributed
from dotresize.accounting import peak_memory
from dotresize.models.causal_lm import CausalLM

# Rows of an embedding table that are multiplied at a time: float64 copies of all would be far
# larger.
TABLE_ROWS = 8192
# Decimal, as sizes of memory are quoted, and binary.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# On which divergences are measured, at most (narrow/curves.py).
ALLOCATION_TOKENS = 8 * 128
# Code and buffers that libraries load with their first use.
_LATER = 100 * 10**6


def parse(size: str) -> int:
    """Return the bytes of "3GB", "2.5 GiB", "800M"; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", size.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{size!r} is not a size of memory, such as 3GB or 2.5GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def shown(size: float) -> str:
    """Return a size of memory for people."""
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will take.

    Attributes:
        activations: where those between layers are kept (``calibration.ActivationCache``).
        host, device: peak bytes; those of the device without its libraries.
        stages: bytes of each stage alone.
    """

    activations: str
    host: int
    device: int
    stages: dict[str, int]


def plan(
    model: CausalLM,
    tokens: Tensor,
    width: int,
    inner: int,
    batch_windows: int,
    budget: int,
    evaluated: int = 0,
    *,
    sensitivity: bool = False,
    layer_widths: bool = False,
) -> MemoryPlan:
    """Return the plan of an offloaded model, its activations where ``budget`` bytes let them be.

    Args:
        tokens: int64 (windows, length).
        width, inner: residual and feed-forward width of the narrowed model.
        budget: bytes of host memory.
        evaluated: tokens to evaluate on.
        sensitivity: whether a backward pass is made (calibration/gradients.py).
        layer_widths: whether each layer is narrowed alone before (narrow/curves.py).

    Raises ValueError where the budget is too small for any place.
    """
    c = model.store.computed_bytes
    batch = min(batch_windows, len(tokens)) * tokens.shape[1]
    length = tokens.shape[1]
    stages = stage_bytes(model, batch, length, width, inner, c, evaluated=evaluated > 0)
    if sensitivity:
        stages |= sensitivity_bytes(model, batch, length, c)
    if layer_widths:
        stages |= layer_widths_bytes(model, batch, length, c)
    kept = activation_bytes(model, tokens.numel(), width, c)
    if layer_widths:  # a stream for every layer
        kept += len(model.layers) * ALLOCATION_TOKENS * model.width * c
    kept = max(kept, evaluated * (model.width + width) * c // distributed.size())
    device, base = model.device, _now() + _LATER
    most = max(stages.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        part = c * max(_sizes(model))
        most += part  # that is read ahead
        place = "device" if most + kept < 0.9 * free else "host"
        most += kept if place == "device" else 0
        on_host = 4 * part  # on its way from and to the files, mapped and pinned
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
    return MemoryPlan(place, need, most if device.type == "cuda" else 0, stages)


def activation_bytes(model: CausalLM, tokens: int, width: int, c: int) -> int:
    """Return what so many calibration tokens take between two layers of both models."""
    each = 3 * model.width + 2 * width + model.inner_width
    return tokens * each * c // distributed.size()


def activation_place(model: CausalLM, tokens: Tensor) -> str:
    """Return where the activations of a run are kept (``calibration.ActivationCache``).

    Those of a model in memory stay on its device, if that leaves half of it.
    """
    if model.store.activations is not None:
        return model.store.activations
    if model.device.type != "cuda":
        return "disk"
    kept = activation_bytes(model, tokens.numel(), model.width, model.store.computed_bytes)
    return "device" if kept < 0.5 * torch.cuda.mem_get_info(model.device)[0] else "disk"


def layer_inputs_place(model: CausalLM, tokens: Tensor) -> str:
    """Return where what every layer read is kept (``calibration.ActivationCache``).

    That is the device of a model in memory, if it has twice the room, else a temporary file.
    ValueError where there is no room for that either.
    """
    kept = layer_inputs_bytes(model, tokens.numel())
    on_device = model.store.activations is None and model.device.type == "cuda"
    if on_device and kept < 0.5 * torch.cuda.mem_get_info(model.device)[0]:
        return "device"
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if kept > free:
        raise ValueError(
            f"sensitivity: keeps {shown(kept)} in temporary files, and {folder} has {shown(free)}; "
            "set TMPDIR to a folder with more, or turn sensitivity off"
        )
    return "disk"


def layer_inputs_bytes(model: CausalLM, tokens: int) -> int:
    """Return what every layer reads of so many tokens, by this process."""
    each = len(model.layers) * model.width * model.store.computed_bytes
    return tokens * each // distributed.size()


def stage_bytes(
    model: CausalLM,
    batch_tokens: int,
    length: int,
    width: int,
    inner: int,
    c: int,
    *,
    evaluated: bool,
) -> dict[str, int]:
    """Return the bytes of each stage, without the activations of all tokens; see the header.

    model: may be a skeleton; batch_tokens: B; length: L; width, inner: of the narrowed model.
    """
    config = model.config
    old, table = config.hidden_size, config.vocab_size
    wide = model.inner_width
    layer = largest_layer(model)
    batch = _batch_bytes(model, batch_tokens, length)
    layers = round(c * layer * (1 + width / old))
    if model.architecture.has_inner_width:
        equations = (48 if inner < wide else 16) * wide**2 + 40 * wide * width + batch
        equations += 12 * wide * old if c < 4 else 0
    else:
        equations = max(batch, c * layer * width // (2 * old))
    stages = {
        "calibration": c * layer + 28 * old**2 + batch,
        "map": 136 * old**2,
        "tables": c * table * (old + width) + 8 * TABLE_ROWS * (old + width) + 48 * old**2,
        "refit": layers + equations + 32 * old**2,
    }
    if evaluated:
        stages["evaluation"] = c * table * (old + width) + 12 * batch_tokens * table
    return stages


def sensitivity_bytes(model: CausalLM, batch_tokens: int, length: int, c: int) -> dict[str, int]:
    """Return the bytes of the backward pass; see the header."""
    width, table = model.width, model.config.vocab_size
    layer = largest_layer(model)
    batch = _batch_bytes(model, batch_tokens, length)
    return {
        "sensitivity": c * layer + 84 * width**2 + 3 * batch,
        "output": c * table * width + 16 * length * table,
    }


def layer_widths_bytes(model: CausalLM, batch_tokens: int, length: int, c: int) -> dict[str, int]:
    """Return the bytes of the pass that narrows each layer alone; see the header."""
    width, table, wide = model.width, model.config.vocab_size, model.inner_width
    batch = _batch_bytes(model, batch_tokens, length)
    return {
        "elimination": c * largest_layer(model) + 40 * wide**2 + 32 * wide * width + batch,
        "divergence": c * table * width + 2 * c * length * table + 2048 * table,
    }


def largest_layer(model: CausalLM) -> int:
    """Return the parameters of the largest layer."""
    layers = (model.module.get_submodule(name) for name in model.layers)
    return max(sum(p.numel() for p in layer.parameters()) for layer in layers)


def _batch_bytes(model: CausalLM, tokens: int, length: int) -> int:
    """Return what a layer takes beside its weights, in float32."""
    config, old, wide = model.config, model.width, model.inner_width
    inner = 3 * wide
    if not model.architecture.has_inner_width:
        inner = config.num_experts_per_tok * (2 * old + 4 * wide)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    scores = length * (3 * config.num_attention_heads + 2) if eager else 0
    return 4 * tokens * (6 * old + inner + scores)


def _sizes(model: CausalLM) -> list[int]:
    """Return the parameters of every part."""
    parts = (model.module.get_submodule(name) for name in model.parts)
    return [sum(p.numel() for p in part.parameters()) for part in parts]


def _now() -> int:
    """Return the resident bytes of this process; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory()["host"]
    return pages * os.sysconf("SC_PAGE_SIZE")
