"""Safetensors files: under which names they hold a model's weights, and in which pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dotresize.models.causal_lm import CausalLM
from dotresize.offload.transfers import to_device


class StoredNames:
    """The names that files have for a model's weights.

    A tied head's weight is the embedding's. What a layer holds in one tensor may be stored in
    pieces (``Architecture.stored``). Files of the model without its head lack the prefix that the
    other names begin with.
    """

    def __init__(self, model: CausalLM) -> None:
        module, architecture = model.module, model.architecture
        self._stored = architecture.stored
        self._layers = architecture.layers + "."
        self._alias = f"{architecture.head}.weight" if model.tied else None
        self._table = f"{architecture.embedding}.weight"
        self._experts = {
            name: len(module.get_parameter(f"{self._layers}0.{name}"))
            for name, pieces in self._stored.items()
            if "{}" in pieces[0]
        }
        self._prefix = f"{module.base_model_prefix}."
        self._known = {
            piece for name, _ in module.named_parameters() for row in self.of(name) for piece in row
        }

    def known(self, stored: str) -> str:
        """Return the name that the model has for a stored tensor."""
        longer = self._prefix + stored
        return longer if longer in self._known and stored not in self._known else stored

    def of(self, name: str) -> list[list[str]]:
        """Return the names of a weight's pieces.

        There is a row for every expert (one for a weight without); its pieces lie one after the
        other along the outputs.
        """
        layer, key = self._split(name)
        if key not in self._stored:
            return [[self._table if name == self._alias else name]]
        count = self._experts.get(key, 1)
        return [[layer + piece.format(e) for piece in self._stored[key]] for e in range(count)]

    def by_expert(self, name: str) -> bool:
        """Return whether a weight's first axis are experts, which are stored one by one."""
        return self._split(name)[1] in self._experts

    def split(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return a weight's pieces by their names."""
        pieces = self.of(name)
        rows = weight if self.by_expert(name) else weight[None]
        return {
            piece: value
            for names, row in zip(pieces, rows, strict=True)
            for piece, value in zip(names, row.chunk(len(names)), strict=True)
        }

    def _split(self, name: str) -> tuple[str, str]:
        """Return the prefix of a layer, and the name in it; both empty for what lies outside."""
        if not name.startswith(self._layers):
            return "", ""
        number, _, key = name.removeprefix(self._layers).partition(".")
        return f"{self._layers}{number}.", key


class StoredWeights:
    """The weights of a model in safetensors files.

    Attributes:
        where: the file of each stored tensor.
        widen: whether weights in half precision are put into the model as float32.
        kept: the type that transformers gives every weight when it loads these files, whatever
            they hold: the config's, or else the first one's; None without any.
    """

    def __init__(
        self,
        paths: list[Path],
        device: torch.device,
        names: StoredNames,
        *,
        widen: bool,
        kept: torch.dtype | None,
    ) -> None:
        self.device = device
        self.paths: list[Path] = []
        self.widen, self.kept = widen, kept
        self.where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, str] = {}
        self.names = names
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Read the headers of one more file."""
        self.paths.append(path)
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a dictionary
                name = self.names.known(stored)
                self.where[name], self._stored[name] = path, stored
                self._shapes[name] = tuple(file.get_slice(stored).get_shape())

    def __contains__(self, name: str) -> bool:
        return all(piece in self.where for row in self.names.of(name) for piece in row)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a weight on the store's device, as it is stored or in another type."""
        pieces, dtype = self.names.of(name), dtype or self.dtype(name)
        if not self.names.by_expert(name):
            return to_device(self._piece(pieces[0][0]), self.device, dtype)
        rows, *others = self._shapes[pieces[0][0]]
        shape = len(pieces), len(pieces[0]) * rows, *others
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        for names, expert in zip(pieces, weight, strict=True):  # one by one: no second copy
            for piece, rows in zip(names, expert.chunk(len(names)), strict=True):
                rows.copy_(self._piece(piece))
        return weight

    def _piece(self, name: str) -> Tensor:
        """Return one stored tensor, by memory map."""
        with safe_open(self.where[name], framework="pt") as file:
            return file.get_tensor(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a weight has when it is loaded, and is written in."""
        stored = self._piece(self.names.of(name)[0][0]).dtype
        return self.kept if self.kept is not None and stored.is_floating_point else stored

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError where a weight is not stored, or its pieces have other shapes."""
        if name not in self:
            raise ValueError(f"{name} is not stored under a name that --memory knows")
        pieces = self.names.of(name)
        if self.names.by_expert(name):
            shape = shape[1:]
        wanted = shape[0] // len(pieces[0]), *shape[1:]
        for piece in (piece for row in pieces for piece in row):
            found = self._shapes[piece]
            if found != wanted:
                raise ValueError(f"{piece} is stored as {found}, config asks for {wanted}")

    def part(self, name: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the weights of a part by their names in it; ValueError for one not finite."""
        weights = {}
        for key in keys:  # one by one: a widened weight's map is let go
            weight = self.read(f"{name}.{key}", self.computed(f"{name}.{key}"))
            if not torch.isfinite(weight).all():
                raise ValueError(f"weight {name}.{key} of the model holds NaN or Inf")
            weights[key] = weight
        return weights

    def computed(self, name: str) -> torch.dtype:
        """Return the type in which the model computes with a weight."""
        stored = self.dtype(name)
        return torch.float32 if self.widen and stored.itemsize < 4 else stored
