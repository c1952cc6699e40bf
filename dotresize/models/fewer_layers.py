"""A model without some of its layers: which of them stay, and what its config says."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dotresize.models.causal_lm import CausalLM


def kept_layers(layers: int, dropped: Collection[int]) -> list[int]:
    """Return the numbers of the layers that stay."""
    return [i for i in range(layers) if i not in dropped]


def widths_left(model: CausalLM, dropped: Collection[int]) -> list[int]:
    """Return the feed-forward widths of the layers that stay; an empty list for experts."""
    widths = model.inner_widths
    return [widths[i] for i in kept_layers(len(widths), dropped)]


def config_left(model: CausalLM, dropped: Collection[int]) -> Any:
    """Return the config of the layers that stay, with the widest of their feed-forwards."""
    config = without_layers(model.config, dropped)
    widths = widths_left(model, dropped)
    if dropped and widths:
        setattr(config, model.architecture.inner, max(widths))
    return config


def alike(config: Any) -> bool:
    """Return whether any layer may be left out, as far as all tools go that read the result.

    Not where layers differ by their number: llama.cpp has such patterns (of sliding windows, of
    layers without rotation) in its code, and GPT-2 can divide attention by it.
    """
    lists = _by_layer(config).values()
    mixed = any(len(set(map(str, value))) > 1 for value in lists)
    return not mixed and not getattr(config, "scale_attn_by_inverse_layer_idx", False)


def without_layers(config: Any, dropped: Collection[int]) -> Any:
    """Return a copy of a config without some layers; entries with a value for each lose theirs."""
    config = copy.deepcopy(config)
    if not dropped:
        return config
    kept = kept_layers(config.num_hidden_layers, dropped)
    by_layer = _by_layer(config)
    config.num_hidden_layers = len(kept)
    for name, value in by_layer.items():
        setattr(config, name, [value[i] for i in kept])
    return config


def _by_layer(config: Any) -> dict[str, list[Any]]:
    """Return the entries of a config that have a value for each layer (``layer_types``)."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and "layer" in name and len(value) == config.num_hidden_layers
    }


class SameParts:
    """The parts of a model as they are, but for layers that are left out; see ``PartMaker``."""

    def __init__(self, model: CausalLM, dropped: Collection[int] = ()) -> None:
        self._model, self.tied = model, model.tied
        self._kept = kept_layers(len(model.layers), dropped)
        self.config = config_left(model, dropped)
        self.inner_widths = widths_left(model, dropped)

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a part, by their names in it."""
        model = self._model
        if self.tied and name == model.architecture.head:
            return {}
        with model.resident(source_of(name, model, self._kept)) as part:
            return {key: weight.detach().clone() for key, weight in part.named_parameters()}


def source_of(name: str, model: CausalLM, kept: list[int]) -> str:
    """Return the part of a model that becomes a part of the one with these layers alone."""
    layers, _, number = name.rpartition(".")
    if layers != model.architecture.layers:
        return name
    return f"{layers}.{kept[int(number)]}"
