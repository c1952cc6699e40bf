"""Declarative tables of the supported architectures. A new one is an entry in ``FAMILIES``."""

from __future__ import annotations

from typing import Any

from dotresize.models.architecture import Architecture, Sublayer
from dotresize.models.fixed_residual import GPT2, NORM_AFTER, OPT
from dotresize.models.llama import (
    EXPERTS,
    GEMMA,
    GRANITE,
    LLAMA,
    LLAMA_LIKE,
    OLMO,
    PHI3,
    QWEN_EXPERTS,
)

FAMILIES: tuple[Architecture, ...] = (
    *(LLAMA, LLAMA_LIKE, GRANITE, GEMMA, OLMO, PHI3, EXPERTS, QWEN_EXPERTS),
    *(NORM_AFTER, GPT2, OPT),
)

__all__ = ["FAMILIES", "Architecture", "Sublayer", "architecture_of", "supported"]


def supported(*, residual: bool = False, feed_forward: bool = False) -> list[str]:
    """Return the model types that can be narrowed at all, or in their residual, or feed-forward."""
    return sorted(
        name
        for family in FAMILIES
        for name in family.model_types
        if not (residual and family.fixed_residual)
        and not (feed_forward and not family.has_inner_width)
    )


def architecture_of(config: Any) -> Architecture:
    """Return the table of a model's config.

    Raises ValueError naming the type and what is supported.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise ValueError(
        f"architecture {config.model_type!r} is not supported; supported: {', '.join(supported())}"
    )
