"""Methods with one map for all residual locations, hence a plain checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor

from dotresize.accounting import stage
from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import absorb
from dotresize.narrow.maps import WidthMap, align, level
from dotresize.narrow.norm_scales import scale_norms
from dotresize.narrow.options import Calibrated, Narrowed, Options, WidthMethod
from dotresize.narrow.principal import pca
from dotresize.narrow.refit import refit
from dotresize.narrow.targets import kept_set
from dotresize.narrow.tied_head import choose_table
from dotresize.narrow.transport import transports


class OneMap(WidthMethod):
    """A method that finds a map of some statistics: those of one location, or their mean."""

    @abstractmethod
    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
        """Return a map for each of several statistics of one location.

        selections: int64 (k,) each, the kept neurons.
        """

    def narrow(
        self, given: Calibrated, width: int, inner: int | None, seconds: dict[str, float]
    ) -> Narrowed:
        width_map = self._map(given, width)
        seconds.update(width_map.seconds)
        with stage("absorption", seconds):
            q = basis(given.model, width_map, given.options)
            narrow = absorb(given.model, q, untie=given.options.untie)
        lost: list[float] = []
        if given.options.refit or inner is not None:
            with stage("refit", seconds, f"on {len(given.tokens)} windows"):
                lost = refit_weights(given, narrow, q, inner)
        else:
            scale_norms(narrow)
        return Narrowed(narrow, width_map, [q], lost)

    def probe(self, given: Calibrated, width: int, inner: int) -> CausalLM:
        model, options = given.model, given.options
        device = given.statistics.importance.device
        q = torch.eye(model.width, dtype=torch.float64, device=device)
        if width < model.width:
            q = basis(model, self._map(given, width), options)
        narrow = absorb(model, q, untie=options.untie)
        fewer = inner if inner < model.inner_width else None
        if options.refit or fewer is not None:
            refit_weights(given, narrow, q, fewer)
        return narrow

    def _map(self, given: Calibrated, width: int) -> WidthMap:
        """Return the map of the mean over locations, all of which weigh alike."""
        selection = kept_set(given.options.targets, given.statistics, width)
        return self.maps([given.statistics.mean()], [selection], given.options)[0]


class PrincipalDirections(OneMap):
    """Principal directions of the second moment; the largest channels stay on their axes."""

    name = "pca"
    default = True
    needs = frozenset({"moment"})

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
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
    ) -> list[WidthMap]:
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


def basis(model: CausalLM, width_map: WidthMap, options: Options) -> Tensor:
    """Return the basis of a map's span that absorption takes, (D, k).

    Any gives an untied model the same function; a tied one needs the one nearest to the axes (see
    ``absorb``), LayerNorm one that keeps the mean.
    """
    q = width_map.q
    if model.tied and not options.untie:
        q = align(q, width_map.selection)
    return level(q) if model.architecture.layer_norm else q


def refit_weights(given: Calibrated, narrow: CausalLM, q: Tensor, inner: int | None) -> list[float]:
    """Refit what absorption made, and narrow its feed-forwards, in place.

    Returns what each feed-forward lost; see ``refit``.
    """
    model, options = given.model, given.options
    norm_has_weight = not model.architecture.layer_norm  # which a chosen table rests on
    if options.refit and narrow.tied and norm_has_weight:
        choose_table(model, narrow, q, cast(Tensor, given.statistics.final), ridge=options.ridge)
    return refit(model, narrow, q, given.tokens, inner, options)
