"""What a model directory really holds, compared with its config before anything large is made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dotresize.models import architecture_of
from dotresize.models.layer_widths import set_inner_widths

INDEX = "model.safetensors.index.json"
# Layers are numbered in the names of their weights, whatever the family calls them.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def check_stored(folder: Path, config: Any, widths: Sequence[int] | None = None) -> None:
    """Raise ValueError where shards are missing, lie elsewhere, or disagree with the config.

    For a model that is to be narrowed. Only headers are read. Weights that transformers stores by
    another name than it uses are left to transformers.

    widths: of the feed-forward of every layer, where they differ.
    """
    import transformers

    shapes = {name: shape for path in shards(folder) for name, shape in _header(path).items()}
    numbers = [int(found[1]) for name in shapes if (found := _LAYER.search(name))]
    layers = max(numbers, default=-1) + 1
    if numbers and config.num_hidden_layers != layers:
        raise ValueError(f"config asks for {config.num_hidden_layers} layers, {layers} are stored")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        if widths is not None:
            set_inner_widths(architecture_of(config), model, widths)
    for name, weight in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(weight.shape):
            raise ValueError(
                f"{name} is stored as {shapes[name]}, config asks for {tuple(weight.shape)}"
            )


def shards(folder: Path) -> list[Path]:
    """Return a directory's safetensors files; ValueError where one is missing or elsewhere."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():  # transformers looks for it first
        return [single]
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        apart = sorted(name for name in names if Path(name).name != name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX} has no weight_map of file names") from None
    if apart:
        raise ValueError(f"{INDEX} names {apart[0]!r}, which is not in the directory")
    for name in sorted(names):
        if not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name!r}: must be safetensors")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    return [folder / name for name in sorted(names)]


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except Exception as error:  # the reader's own exceptions have no common base
        raise ValueError(f"{path.name}: {error}") from error
