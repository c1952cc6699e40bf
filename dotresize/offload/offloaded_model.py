"""Model directories whose weights stay in their files: opened, narrowed a part at a time, written.

The weights of a derived model are made when a part is first held, out of the dense model's part,
and written when it is let go, corrected: every part becomes a shard as soon as it is finished.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dotresize.models import architecture_of
from dotresize.models.causal_lm import CausalLM, PartMaker, fill, is_tied, save_config
from dotresize.models.fewer_layers import SameParts
from dotresize.models.given import NOT_TIED, same_weight, untied
from dotresize.models.resized import class_for
from dotresize.models.skeleton import skeleton
from dotresize.offload.headers import INDEX, check_stored, shards
from dotresize.offload.memory_plan import TABLE_ROWS
from dotresize.offload.stored_weights import StoredNames, StoredWeights
from dotresize.offload.transfers import ReadAhead, WriteBehind, threaded

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 2**20

logger = logging.getLogger("dotresize")


def open_model(
    folder: Path,
    config: Any,
    device: torch.device,
    work: Path,
    widths: Sequence[int] | None = None,
) -> CausalLM:
    """Return the model of a directory, its weights left in their files.

    On a CPU, weights in half precision compute in float32: most CPUs have no other fast products.

    Args:
        work: folder for the shards of what becomes of it.
        widths: of the feed-forward of every layer, where they differ.

    Raises:
        ValueError: the files disagree with the config, or hold other names than transformers gives
            the weights.
    """
    transformers: Any = importlib.import_module("transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised, which only a model held in memory may be")
    if not shards(folder):
        raise ValueError("has no safetensors files")
    check_stored(folder, config, widths)
    config = as_stored(folder, config)
    module = skeleton(transformers.AutoModelForCausalLM, config, device, widths)
    if (folder / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model = Offloaded.opened(module, shards(folder), device, work)
    model.architecture.check(module)
    weights: StoredWeights = model.store.weights  # type: ignore[attr-defined]
    reached = tuple(f"{name}." for name in model.parts)
    for name, weight in module.named_parameters():
        weights.check(name, weight.shape)
        if not name.startswith(reached):
            raise ValueError(f"{name} is of no part that --memory knows; leave --memory out")
    return model


def as_stored(folder: Path, config: Any) -> Any:
    """Return the config; untied where the files hold a head that is not the embedding."""
    return untied(config) if is_tied(config) and _head_differs(folder, config) else config


def _head_differs(folder: Path, config: Any) -> bool:
    """Return whether files hold a head that is not the embedding; transformers then keeps both."""
    architecture = architecture_of(config)
    head, table = (f"{name}.weight" for name in (architecture.head, architecture.embedding))
    where: dict[str, Path] = {}
    for path in shards(folder):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    if head not in where or table not in where:
        return False
    with (
        safe_open(where[head], framework="pt") as heads,
        safe_open(where[table], framework="pt") as tables,
    ):
        parts = heads.get_slice(head), tables.get_slice(table)
        rows, *_ = shapes = parts[0].get_shape()
        if shapes == parts[1].get_shape() and all(
            same_weight(parts[0][i : i + TABLE_ROWS], parts[1][i : i + TABLE_ROWS])
            for i in range(0, rows, TABLE_ROWS)
        ):
            return False
    logger.info(NOT_TIED, head, table)
    return True


def _first_type(paths: list[Path]) -> torch.dtype | None:
    """Return the dtype that transformers takes for a config without one: the first weight's."""
    for path in paths[:1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                dtype = file.get_slice(name)[:1].dtype
                if dtype.is_floating_point:
                    return dtype
    return None


class Offloaded:
    """A store of safetensors files; parts are in memory while somebody holds them.

    Attributes:
        weights: the files.
        work: a folder for files made out of these.
        stored_as: the type in which a derived model is written; that of the files if None.
    """

    whole = False

    def __init__(
        self,
        module: Any,
        weights: StoredWeights,
        work: Path,
        activations: str,
        *,
        reads_ahead: bool = True,
    ) -> None:
        self._module = module
        self._held: Counter[str] = Counter()
        self.weights = weights
        self.work = work
        self.activations: str | None = activations
        self.stored_as: torch.dtype | None = None
        # What a part is made of does not change, and is asked for while it has no memory.
        parts = CausalLM(module, self).parts
        self._keys = {
            name: [key for key, _ in module.get_submodule(name).named_parameters()]
            for name in parts
        }
        self._ahead: ReadAhead | None = None
        if reads_ahead and threaded(weights.device):
            tied = is_tied(module.config)  # then the head is the table once more
            self._ahead = ReadAhead(self._read, parts[: -1 if tied else None], weights.device)
        _give_large_blocks_back()

    @classmethod
    def opened(cls, module: Any, paths: list[Path], device: torch.device, work: Path) -> CausalLM:
        """Return the model of a skeleton whose weights lie in some files."""
        names = StoredNames(CausalLM.in_memory(module))
        kept = getattr(module.config, "dtype", None) or _first_type(paths)
        kept = getattr(torch, kept) if isinstance(kept, str) else kept
        weights = StoredWeights(paths, device, names, widen=device.type == "cpu", kept=kept)
        return CausalLM(module, cls(module, weights, work, "disk"))

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def computed_bytes(self) -> int:
        return self.weights.computed(next(iter(self.weights.where))).itemsize

    @property
    def written_bytes(self) -> int:
        kept = self.stored_as or self.weights.kept
        return self.computed_bytes if kept is None else kept.itemsize

    @contextmanager
    def resident(self, names: tuple[str, ...]) -> Iterator[list[Any]]:
        parts = [self._module.get_submodule(name) for name in names]
        taken: list[tuple[str, nn.Module]] = []
        try:
            for name, part in zip(names, parts, strict=True):
                if not self._held[name]:
                    self._load(name, part)
                self._held[name] += 1
                taken.append((name, part))
            yield parts
        finally:
            for name, part in taken:
                self._held[name] -= 1
                if not self._held[name]:
                    self._release(name, part)
                    _empty(part)
            if not self._held.total():
                self._module.tie_weights()  # a tied head has its own weight only while it is used

    def _load(self, name: str, part: nn.Module) -> None:
        fill(part, self._read(name) if self._ahead is None else self._ahead.take(name))

    def _read(self, name: str) -> dict[str, Tensor]:
        return self.weights.part(name, self._keys[name])

    def _release(self, name: str, part: nn.Module) -> None:
        """Nothing: what was read stays as it is in the files."""

    def derived(self, maker: PartMaker) -> CausalLM:
        kind = class_for(self._module, maker.config)
        module = skeleton(kind, maker.config, self.device, maker.inner_widths)
        module.generation_config = copy.deepcopy(self._module.generation_config)
        return CausalLM(module, _Growing(module, maker, self))

    def copied(self) -> CausalLM:
        """Return a model of the same weights; changes to a part that is held stay."""
        return self.derived(SameParts(CausalLM(self._module, self)))

    def finish(self) -> None:
        model = CausalLM(self._module, self)
        for name in model.parts:
            with model.resident(name):
                pass

    def save(self, folder: Path) -> None:
        """Write the directory, its shards as hard links where the file system has them."""
        module, files = self._module, self.weights
        module.config.architectures = [type(module).__name__]
        save_config(module, folder)
        module.generation_config.save_pretrained(folder)
        where = {name: path.name for name, path in files.where.items()}
        size = sum(path.stat().st_size for path in files.paths)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in files.paths:
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


class _Growing(Offloaded):
    """The store of a model that is still being made, a shard for every part."""

    def __init__(self, module: Any, maker: PartMaker, dense: Offloaded) -> None:
        model = CausalLM(module, self)
        names = StoredNames(model)
        given = dense.weights
        kept = given.kept if dense.stored_as is None else dense.stored_as
        weights = StoredWeights([], dense.device, names, widen=given.widen, kept=kept)
        assert dense.activations is not None
        # Parts are made when they are asked for.
        super().__init__(module, weights, dense.work, dense.activations, reads_ahead=False)
        self.stored_as = dense.stored_as
        if self.stored_as is not None:
            module.config.dtype = self.stored_as
        self._maker, self._dense = maker, dense.weights
        self._parts = model.parts[: -1 if maker.tied else None]
        self._behind = WriteBehind(dense.device)
        self._written: set[str] = set()  # stored tensors that may still be on their way

    def _load(self, name: str, part: nn.Module) -> None:
        rows = (row for key in self._keys[name] for row in self.weights.names.of(f"{name}.{key}"))
        if any(piece in self._written for row in rows for piece in row):
            self._behind.wait()
        if all(f"{name}.{key}" in self.weights for key in self._keys[name]):
            super()._load(name, part)
        else:
            fill(part, self._maker.part(name))

    def _release(self, name: str, part: nn.Module) -> None:
        weights = {f"{name}.{key}": weight for key, weight in part.named_parameters()}
        if not weights or all(key in self.weights for key in weights):
            return
        number = self._parts.index(name) + 1
        path = self.work / f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
        stored: dict[str, Tensor] = {}
        for key, weight in weights.items():
            dtype = self.stored_as or self._dense.dtype(key)
            value = weight.detach().to(dtype).contiguous()
            stored |= self.weights.names.split(key, value)
        self._behind.write(stored, path, functools.partial(self.weights.add, path))
        self._written = set(stored)

    def finish(self) -> None:
        super().finish()
        self._behind.wait()

    def save(self, folder: Path) -> None:
        self._behind.wait()
        super().save(folder)


def _give_large_blocks_back() -> None:
    """Have the C library return freed blocks to the system, which it keeps below 32 MB.

    Layer upon layer would add up otherwise. This holds for the whole process.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _empty(part: nn.Module) -> None:
    """Leave the shapes of a part's parameters, without their memory."""
    fill(part, {name: weight.to("meta") for name, weight in part.named_parameters()})
