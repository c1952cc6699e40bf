"""Feed-forward widths that differ from layer to layer.

What counts is the shapes of the modules; the config of such a model in memory has the widest of
them. Written to a directory, the config names the width of each layer in ``per_layer_config``: the
entry that transformers has for it, though its models do not read it yet (5.23 refuses to load it).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dotresize.models.architecture import Architecture
from dotresize.models.linear import keep_outputs, linear_of, pad_outputs, rows_of, set_rows

ENTRY = "per_layer_config"


def inner_widths(architecture: Architecture, model: nn.Module) -> list[int]:
    """Return the feed-forward width of every layer; an empty list where layers have experts."""
    if not architecture.has_inner_width:
        return []
    part = architecture.sublayers[-1]
    layers = model.get_submodule(architecture.layers).children()
    return [len(rows_of(linear_of(layer, part.writer))) for layer in layers]


def set_inner_widths(architecture: Architecture, model: nn.Module, widths: Sequence[int]) -> None:
    """Cut every layer's feed-forward to its first neurons, before its weights are read."""
    part = architecture.sublayers[-1]
    layers = model.get_submodule(architecture.layers).children()
    for layer, width in zip(layers, widths, strict=True):
        writer = linear_of(layer, part.writer)
        if len(rows_of(writer)) == width:
            continue
        for name in part.readers:
            reader = linear_of(layer, name)
            first = torch.arange(width, dtype=torch.int64, device=reader.weight.device)
            keep_outputs(reader, first, part.stacked)
        set_rows(writer, rows_of(writer)[:width])


def pad_layer(architecture: Architecture, layer: nn.Module, width: int) -> None:
    """Fill a layer's feed-forward up with neurons that write zero, and read zero."""
    part = architecture.sublayers[-1]
    writer = linear_of(layer, part.writer)
    rows = rows_of(writer)
    missing = width - len(rows)
    if not missing:
        return
    for name in part.readers:
        pad_outputs(linear_of(layer, name), missing, part.stacked)
    set_rows(writer, torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]))


def differ(widths: Sequence[int]) -> bool:
    """Return whether not all layers are of one width."""
    return len(set(widths)) > 1


def written_config(architecture: Architecture, config: Any, widths: Sequence[int]) -> Any:
    """Return the config of a directory: one that names the widths, if they differ."""
    if not differ(widths):
        return config
    config = copy.deepcopy(config)
    entries = {i: {architecture.inner: width} for i, width in enumerate(widths)}
    setattr(config, ENTRY, entries)
    return config


def take_inner_widths(architecture: Architecture, config: Any) -> list[int] | None:
    """Return the widths that a config read from a directory names, and take them off it.

    It has the widest of them afterwards; None where they do not differ.

    Raises:
        ValueError: layers that differ in anything else, or widths that are no whole numbers.
    """
    entries = config.to_dict().get(ENTRY)
    if not entries:
        return None
    if not architecture.has_inner_width:
        raise ValueError(f"{ENTRY}: feed-forwards of experts have one width in all layers")
    name = architecture.inner
    setattr(config, ENTRY, None)
    widest = architecture.inner_width(config)
    widths = [widest] * config.num_hidden_layers
    for number, entry in entries.items():
        others = sorted(set(entry) - {name})
        if others:
            raise ValueError(
                f"{ENTRY}: layer {int(number)} differs in {others[0]}; only {name} may"
            )
        width = entry.get(name, widest)
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"{ENTRY}: {name} is {width!r} in layer {int(number)}")
        if not 0 <= int(number) < len(widths):
            raise ValueError(f"{ENTRY}: there is no layer {int(number)}")
        widths[int(number)] = width
    setattr(config, name, max(widths))
    return widths
