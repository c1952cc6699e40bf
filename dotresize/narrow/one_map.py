"""Methods with one map for all residual locations, hence a plain checkpoint."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow import maps
from dotresize.narrow.absorb import absorb
from dotresize.narrow.choose_width import choose_inner_width
from dotresize.narrow.options import Narrowed, Options, WidthMethod
from dotresize.narrow.principal import pca
from dotresize.narrow.refit import correct
from dotresize.narrow.targets import kept_set
from dotresize.narrow.tied_head import choose_table
from dotresize.narrow.transport import transports


class OneMap(WidthMethod):
    """A method that finds a map of some statistics: those of one location, or their mean."""

    @abstractmethod
    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[maps.WidthMap]:
        """Return a map for each of several statistics of one location.

        selections: int64 (k,) each, the kept neurons.
        """

    def narrow(
        self,
        model: CausalLM,
        tokens: Tensor,
        statistics: Statistics,
        width: int,
        inner: int | None,
        options: Options,
        seconds: dict[str, float],
    ) -> Narrowed:
        selection = kept_set(options.targets, statistics, width)
        width_map = self.maps([statistics.mean()], [selection], options)[0]
        seconds.update(width_map.seconds)
        start = time.perf_counter()
        q = basis(model, width_map, options)
        narrow = absorb(model, q, untie=options.untie)
        seconds["absorption"] = time.perf_counter() - start
        if options.refit or inner is not None:
            start = time.perf_counter()
            correct_weights(model, narrow, q, tokens, statistics, inner, options)
            seconds["refit"] = time.perf_counter() - start
        return Narrowed(narrow, width_map, [q])

    def probe(
        self,
        model: CausalLM,
        tokens: Tensor,
        statistics: Statistics,
        width: int,
        inner: int,
        options: Options,
    ) -> CausalLM:
        mean = statistics.mean()
        q = torch.eye(model.width, dtype=torch.float64, device=mean.importance.device)
        if width < model.width:
            selection = kept_set(options.targets, statistics, width)
            q = basis(model, self.maps([mean], [selection], options)[0], options)
        narrow = absorb(model, q, untie=options.untie)
        fewer = choose_inner_width(inner, model)
        if options.refit or fewer is not None:
            correct_weights(model, narrow, q, tokens, statistics, fewer, options)
        return narrow


class PrincipalDirections(OneMap):
    """Principal directions of the second moment; the largest channels stay on their axes."""

    name = "pca"
    default = True
    needs = frozenset({"moment"})

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[maps.WidthMap]:
        return [
            pca(cast(Tensor, own.moment)[0], selection, own.importance[0])
            for own, selection in zip(statistics, selections, strict=True)
        ]


class Transport(OneMap):
    """Entropic optimal transport of all neurons onto the kept ones (narrow/transport.py)."""

    name = "dot"
    takes_targets = True
    needs = frozenset({"cost"})

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[maps.WidthMap]:
        if not statistics:
            return []
        return transports(
            torch.cat([cast(Tensor, own.cost) for own in statistics]),
            selections,
            reg=options.reg,
            steps=options.steps,
            factor=options.factor,
            backend=options.backend,
        )


def basis(model: CausalLM, width_map: maps.WidthMap, options: Options) -> Tensor:
    """Return the basis of a map's span that absorption takes, (D, k).

    Any gives an untied model the same function; a tied one needs the one nearest to the axes (see
    ``absorb``), LayerNorm one that keeps the mean.
    """
    q = width_map.q
    if model.tied and not options.untie:
        q = maps.align(q, width_map.selection)
    return maps.level(q) if model.architecture.layer_norm else q


def correct_weights(
    model: CausalLM,
    narrow: CausalLM,
    q: Tensor,
    tokens: Tensor,
    statistics: Statistics,
    inner: int | None,
    options: Options,
) -> None:
    """Refit what absorption made, and narrow its feed-forwards, in place."""
    norm_has_weight = not model.architecture.layer_norm  # which a chosen table rests on
    if options.refit and narrow.tied and norm_has_weight:
        choose_table(model, narrow, q, cast(Tensor, statistics.final), ridge=options.ridge)
    correct(model, narrow, q, tokens, inner, options)
