"""Copies of a model that a CPU computes faster, where some digits of the result do not matter."""

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
    # A deep copy takes what it has met already: no parameter is copied in float32.
    met: dict[int, Any] = {
        id(own): nn.Parameter(own.detach().to(torch.bfloat16), own.requires_grad)
        for own in model.module.parameters()
    }
    return CausalLM.in_memory(copy.deepcopy(model.module, met))


def _has_instructions() -> bool:
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS)
