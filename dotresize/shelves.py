"""Model directories whose weights stay in their files: opened, narrowed a part at a time, written.

The narrowed model's shelf makes a part when it is first taken, out of the dense model's part, and
writes it when it is given back, corrected: every part becomes a shard as soon as it is finished.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dotresize.absorb import Absorption, is_tied
from dotresize.files import Files, Names
from dotresize.models import architecture_of
from dotresize.resident import fill, parts, put_on, resident, shelf_of, skeleton
from dotresize.stored import INDEX, check_stored, shards


def open_model(folder: Path, config: Any, device: torch.device, work: Path) -> Any:
    """A model of a directory, on a shelf.

    On a CPU, weights in half precision compute in float32: most CPUs have no other fast products.

    Args:
        work: folder for the shards of what becomes of it.

    Raises ValueError where the files disagree with the config, or hold other names than
    transformers gives the weights.
    """
    transformers: Any = importlib.import_module("transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised, which only a model held in memory may be")
    if not shards(folder):
        raise ValueError("has no safetensors files")
    check_stored(folder, config)
    model = skeleton(transformers.AutoModelForCausalLM, config, device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    architecture_of(config).check(model)
    files = Files(shards(folder), device, Names(model), widen=device.type == "cpu")
    reached = tuple(f"{name}." for name in parts(model))
    for name, weight in model.named_parameters():
        files.check(name, weight.shape)
        if not name.startswith(reached):
            raise ValueError(f"{name} is of no part that --memory knows; leave --memory out")
    files.work = work
    put_on(files, model)
    return model


class _Copies:
    """Parts as they are in another model; see ``Absorption``."""

    def __init__(self, model: Any) -> None:
        self.model, self.tied, self.config = model, is_tied(model), copy.deepcopy(model.config)

    def part(self, name: str) -> dict[str, Tensor]:
        if self.tied and name == architecture_of(self.config).head:
            return {}
        with resident(self.model, name) as part:
            return {key: weight.clone() for key, weight in part.named_parameters()}


class _Growing(Files):
    """The shelf of a narrowed model that is still being made."""

    def __init__(self, made: Absorption | _Copies, dense: Files, model: Any) -> None:
        super().__init__([], dense.device, Names(model), widen=dense.widen)
        self.work, self.place = dense.work, dense.place
        self._made, self._dense = made, dense
        self._parts = parts(model)[: -1 if made.tied else None]

    def take(self, name: str, part: nn.Module) -> None:
        if all(f"{name}.{key}" in self for key, _ in part.named_parameters()):
            super().take(name, part)
        else:
            fill(part, self._made.part(name))

    def give_back(self, name: str, part: nn.Module) -> None:
        weights = {f"{name}.{key}": weight for key, weight in part.named_parameters()}
        if not weights or all(key in self for key in weights):
            return
        number = self._parts.index(name) + 1
        path = self.work / f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
        stored: dict[str, Tensor] = {}
        for key, weight in weights.items():
            stored |= self.names.apart(key, self._as_stored(key, weight))
        save_file(stored, path, metadata={"format": "pt"})
        self.add(path)

    def _as_stored(self, name: str, weight: Tensor) -> Tensor:
        return weight.detach().to("cpu", self._dense.dtype(name)).contiguous()


def narrowed(model: Any, q: Tensor, *, untie: bool = False) -> Any:
    """``absorb`` for a model on a shelf: the same model, on a shelf that grows as it is walked."""
    return _made(model, Absorption(model, q, untie=untie))


def copied(model: Any) -> Any:
    """``copy.deepcopy`` for a model on a shelf, likewise: changes to a held part stay."""
    return _made(model, _Copies(model))


def _made(model: Any, made: Absorption | _Copies) -> Any:
    dense = shelf_of(model)
    assert isinstance(dense, Files)
    narrow = skeleton(type(model), made.config, dense.device)
    narrow.generation_config = copy.deepcopy(model.generation_config)
    put_on(_Growing(made, dense, narrow), narrow)
    return narrow


def finish(model: Any) -> None:
    """Write the parts of a narrowed model that nobody took."""
    for name in parts(model):
        with resident(model, name):
            pass


def save(model: Any, folder: Path) -> None:
    """Config and shards of a model on a shelf, by hard links where the file system has them."""
    files = shelf_of(model)
    assert isinstance(files, Files)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    where = {name: path.name for name, path in files.where.items()}
    size = sum(path.stat().st_size for path in files.paths)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in files.paths:
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
