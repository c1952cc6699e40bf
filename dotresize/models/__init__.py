"""Declarative tables of the supported architectures. A new one is an entry in ``FAMILIES``."""

from __future__ import annotations

from typing import Any

from dotresize.models.architecture import Architecture, Sublayer
from dotresize.models.llama import FAMILIES

__all__ = ["FAMILIES", "Architecture", "Sublayer", "architecture_of", "supported"]


def supported() -> list[str]:
    """``model_type`` names that can be narrowed."""
    return sorted(name for family in FAMILIES for name in family.model_types)


def architecture_of(config: Any) -> Architecture:
    """The table of a model's config; ValueError naming the type and what is supported."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise ValueError(
        f"architecture {config.model_type!r} is not supported; supported: {', '.join(supported())}"
    )
