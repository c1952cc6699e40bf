"""Copies of a model that a CPU computes faster."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dotresize.models.causal_lm import CausalLM

# Instructions for products of bfloat16 that add up in float32, as torch names them.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def in_bfloat16(model: CausalLM) -> CausalLM:
    """Return a copy in bfloat16 where the CPU has instructions for it; elsewhere the model itself.

    For what depends on weights to two or three digits: text that is sampled, shapes that are
    compared. Buffers, such as rotary frequencies, stay as they are. With such instructions (AMD
    EPYC of 2 cores) products by windows of tokens take half of the time in float32, and products by
    a few, which wait for weights to be read, 40 %.
    """
    weight = next(model.module.parameters())
    on_cpu = model.device.type == "cpu" and model.store.whole
    if not on_cpu or weight.dtype != torch.float32 or not _has_instructions():
        return model
    return CausalLM.in_memory(_copied(model.module, torch.bfloat16))


def in_float32(module: Any) -> Any:
    """Return a copy in float32 of a model in half precision on a CPU; else the model itself.

    CPUs without instructions for half precision take eight times as long for its products (AMD
    EPYC with AVX2). All compute in float32, as a model in its files does
    (offload/stored_weights.py); only text that is sampled and shapes that are searched may be
    computed in bfloat16.
    """
    return _copied(module, torch.float32) if is_half_on_cpu(module) else module


def is_half_on_cpu(module: Any) -> bool:
    """Return whether a model on a CPU has weights in half precision."""
    return any(x.device.type == "cpu" and x.dtype.itemsize == 2 for x in module.parameters())


def set_types(module: Any, types: dict[str, torch.dtype], other: torch.dtype | None = None) -> None:
    """Give weights their types by their names, in place, and all others one, by default the first.

    Buffers, such as rotary frequencies, stay.
    """
    other = next(iter(types.values())) if other is None else other
    for name, weight in module.named_parameters():
        weight.data = weight.data.to(types.get(name, other))


def _copied(module: Any, dtype: torch.dtype) -> Any:
    # A deep copy takes what it has met already: no parameter is copied in its own type.
    met: dict[int, Any] = {
        id(own): nn.Parameter(own.detach().to(dtype), own.requires_grad)
        for own in module.parameters()
    }
    return copy.deepcopy(module, met)


def _has_instructions() -> bool:
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS)
