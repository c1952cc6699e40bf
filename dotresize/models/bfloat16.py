"""Copies of a model that a CPU computes faster, where some digits of the result do not matter."""

from __future__ import annotations

from typing import Any

import torch

from dotresize.models.causal_lm import CausalLM

# Instructions for products of bfloat16 that add up in float32, as torch names them.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def in_bfloat16(model: CausalLM) -> CausalLM:
    """Return a copy in bfloat16 where the CPU has instructions for it; elsewhere the model itself.

    For what depends on weights to two or three digits: text that is sampled, shapes that are
    compared. With such instructions (AMD EPYC of 2 cores) products by windows of tokens take half
    of the time in float32, and products by a few, which wait for weights to be read, 40 %.
    """
    weight = next(model.module.parameters())
    on_cpu = model.device.type == "cpu" and model.store.whole
    if not on_cpu or weight.dtype != torch.float32 or not _has_instructions():
        return model
    copy = model.copied()
    copy.module.to(torch.bfloat16)
    return copy


def _has_instructions() -> bool:
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS)
