"""Methods with a map for every residual location, to compare one map for all of them with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize import distributed
from dotresize.accounting import stage
from dotresize.baselines.adapters import AdaptedResidual, slice_model
from dotresize.calibration.residual_stream import Streams, norms_of
from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow import maps
from dotresize.narrow.norm_scales import scale_norms
from dotresize.narrow.one_map import OneMap
from dotresize.narrow.options import Calibrated, Narrowed, Options, Shape, WidthMethod
from dotresize.narrow.refit import refit
from dotresize.narrow.targets import kept_set


class Located(WidthMethod):
    """A method whose model has a map and adapters at every location."""

    scope = "location"
    plain = False

    def check(self, options: Options) -> None:
        if options.ff_width is not None or options.params is not None:
            raise ValueError(
                f"{self.spelled}: narrows the residual only; leave ff_width and params out"
            )

    @abstractmethod
    def located_maps(self, given: Calibrated, width: int) -> list[maps.WidthMap]:
        """Return the map of each location, in order."""

    def narrow(self, given: Calibrated, shape: Shape, seconds: dict[str, float]) -> Narrowed:
        with stage("factorisation", seconds):
            located = self.located_maps(given, shape.width)
            qs = [width_map.q for width_map in located]
            narrow = slice_model(given.model, qs)
        lost: list[float] = []
        if given.options.refit:
            with stage("refit", seconds, f"on {len(given.tokens)} windows"):
                residual = AdaptedResidual()
                lost = refit(
                    *(given.model, narrow, qs, given.tokens, None, given.options, residual),
                    own=given.statistics.own_windows,
                )
        else:
            scale_norms(narrow, AdaptedResidual().body)
        return Narrowed(narrow, located[0], qs, lost)


class PerLocation(Located):
    """A method of one map, used at every location by itself."""

    needs = frozenset({"apart"})

    def __init__(self, method: OneMap) -> None:
        self._method = method
        self.name = method.name
        self.takes = method.takes
        self.needs = method.needs | {"apart"}
        self.needs_to_heed = method.needs_to_heed

    @property
    def spelled(self) -> str:
        return "scope location"

    def check(self, options: Options) -> None:
        super().check(options)
        if self.name == "magnitude":
            raise ValueError(f"{self.spelled}: must be of pca or dot")

    def located_maps(self, given: Calibrated, width: int) -> list[maps.WidthMap]:
        each = [given.statistics.at(i) for i in range(len(given.statistics.locations))]
        chosen = [kept_set(given.options.targets, own, width) for own in each]
        located = self._shared(each, chosen, given.options)
        if given.model.architecture.layer_norm:
            located = [replace(found, q=maps.level(found.q)) for found in located]
        return located

    def _shared(
        self, each: list[Statistics], chosen: list[Tensor], options: Options
    ) -> list[maps.WidthMap]:
        """Return the maps of all locations, of which every process makes its share."""
        rank, size = distributed.rank(), distributed.size()
        if size == 1:
            return self._method.maps(each, chosen, options)
        device = chosen[0].device
        mine = [
            _at(own, "cpu")
            for own in self._method.maps(each[rank::size], chosen[rank::size], options)
        ]
        located = []
        for i in range(len(each)):
            own = mine[i // size] if i % size == rank else None
            located.append(_at(distributed.from_first(own, i % size), device))
        return located


def _at(width_map: maps.WidthMap, device: torch.device | str) -> maps.WidthMap:
    return replace(width_map, q=width_map.q.to(device), selection=width_map.selection.to(device))


class SliceGPT(Located):
    """Principal directions of every location, found in order on what is already sliced.

    Second moments are of the raw stream (figure 4 of the paper, see baselines/adapters.py).
    """

    name = "slicegpt"
    needs = frozenset({"apart"})

    def located_maps(self, given: Calibrated, width: int) -> list[maps.WidthMap]:
        batch = given.options.batch_windows
        qs = sequential_pca(given.model, given.tokens, width, batch_windows=batch)
        selection = kept_set(given.options.targets, given.statistics, width)
        return [maps.WidthMap(q, selection) for q in qs]


@torch.no_grad()
def sequential_pca(
    model: CausalLM, tokens: Tensor, k: int, *, batch_windows: int = 4
) -> list[Tensor]:
    """Return SliceGPT's maps: the principal directions of each location, given those before it.

    tokens: int64 (windows, length). Returns (D, k) float64 per residual location.
    """
    architecture = model.architecture
    multiplier = architecture.multiplier(model.config)
    turn = maps.level if architecture.layer_norm else None
    with closing(Streams(model, tokens, batch_windows)) as streams:
        qs = [_project(streams.stream, k, turn)]
        for name in tqdm(model.layers, desc="slice", unit="layer", disable=None):
            with model.resident(name) as layer:
                norm = norms_of(architecture, layer)[1]
                for i in range(len(streams)):
                    streams.stream[i] = streams.until(layer, norm, i)
                qs.append(_project(streams.stream, k, turn))
                block = layer.get_submodule(architecture.sublayers[1].block)
                for i, middle in enumerate(streams.stream):
                    streams.stream[i] = middle + multiplier * block(norm(middle))
                qs.append(_project(streams.stream, k, turn))
    return qs


def _project(stream: Any, k: int, turn: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the principal directions of a stream, which is then projected onto them."""
    width = stream[0].shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=stream[0].device)
    for x in stream:
        wide = x.flatten(0, -2).double()  # the raw stream holds channels in the thousands
        moment += wide.mT @ wide
    distributed.total(moment)
    q = torch.linalg.eigh(moment).eigenvectors[:, -k:]
    q = q if turn is None else turn(q)
    projector = (q @ q.mT).to(stream[0].dtype)
    for i, x in enumerate(stream):
        stream[i] = x @ projector
    return q
