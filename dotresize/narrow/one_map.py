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
from dotresize.narrow.options import Calibrated, Narrowed, Options, Shape, WidthMethod
from dotresize.narrow.principal import pca
from dotresize.narrow.refit import refit, ridge_of
from dotresize.narrow.sensitivity import least_felt, unit
from dotresize.narrow.targets import kept_set
from dotresize.narrow.tied_head import choose_table
from dotresize.narrow.transport import rehearse, transports


class OneMap(WidthMethod):
    """A method that finds a map of some statistics: those of one location, or their mean."""

    @abstractmethod
    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
        """Return a map for each of several statistics of one location.

        selections: int64 (k,) each, the kept neurons.
        """

    def narrow(self, given: Calibrated, shape: Shape, seconds: dict[str, float]) -> Narrowed:
        width_map = self._map(given, shape.width)
        seconds.update(width_map.seconds)
        with stage("absorption", seconds):
            q = basis(given.model, width_map, given.options)
            narrow = _absorbed(given, q, shape)
        lost: list[float] = []
        if given.options.refit or shape.inner is not None:
            with stage("refit", seconds, f"on {len(given.tokens)} windows"):
                lost = refit_weights(given, narrow, q, shape)
        else:
            scale_norms(narrow)
        return Narrowed(narrow, width_map, [q], lost)

    def probe(self, given: Calibrated, shape: Shape) -> CausalLM:
        q = basis(given.model, self._map(given, shape.width), given.options)
        narrow = _absorbed(given, q, shape)
        if given.options.refit or shape.inner is not None:
            refit_weights(given, narrow, q, shape)
        return narrow

    def _map(self, given: Calibrated, width: int) -> WidthMap:
        """Return the map of the mean over locations, all of which weigh alike.

        At the full width it is the identity, whatever the method.
        """
        if width == given.model.width:
            return WidthMap.identity(width, given.model.device)
        selection = kept_set(given.options.targets, given.statistics, width)
        return self.maps([given.statistics.mean()], [selection], given.options)[0]


def _absorbed(given: Calibrated, q: Tensor, shape: Shape) -> CausalLM:
    untie, readers = given.options.untie, not given.options.refit
    return absorb(given.model, q, untie=untie, readers=readers, dropped=shape.dropped)


class PrincipalDirections(OneMap):
    """Principal directions of the second moment; the largest channels stay on their axes.

    With sensitivity they are those of ``w C + H / w``, C the moment and H the Fisher matrix, for
    the weight w whose map is felt least (narrow/sensitivity.py).
    """

    name = "pca"
    takes = frozenset({"sensitivity"})
    needs = frozenset({"moment"})
    needs_to_heed = frozenset({"fisher"})
    weights = (1.0, 7.0, 10.0, 30.0, 70.0)  # those of the source

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
        found = []
        for own, selection in zip(statistics, selections, strict=True):
            moment, importance = cast(Tensor, own.moment)[0], own.importance[0]
            if options.meant("sensitivity"):
                fisher = cast(Tensor, own.fisher)[0]
                c, h = unit(moment), unit(fisher)
                tried = ((w, pca(w * c + h / w, selection, importance)) for w in self.weights)
                found.append(least_felt(tried, moment, fisher))
            else:
                found.append(pca(moment, selection, importance))
        return found


class Transport(OneMap):
    """Entropic optimal transport between neurons (narrow/transport.py).

    With sensitivity the cost is ``C / mean C + w G / mean G``, G that of the gradients, as if they
    were further tokens, for the weight w whose map is felt least (narrow/sensitivity.py).
    """

    name = "dot"
    default = True
    takes = frozenset({"targets", "reg", "steps", "factor", "sensitivity"})
    needs = frozenset({"cost"})
    needs_to_heed = frozenset({"gradient_cost", "moment", "fisher"})
    weights = (0.1, 0.3, 1.0)

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
        if not statistics:
            return []
        if not options.meant("sensitivity"):
            costs = torch.cat([cast(Tensor, own.cost) for own in statistics])
            return _transports(costs, selections, options)
        found = []
        for own, selection in zip(statistics, selections, strict=True):
            cost, gradient_cost = (
                x / x.mean().clamp_min(torch.finfo(x.dtype).tiny)
                for x in (cast(Tensor, own.cost).double(), cast(Tensor, own.gradient_cost).double())
            )
            tried = (
                (w, _transports(cost + w * gradient_cost, [selection], options)[0])
                for w in self.weights
            )
            best = least_felt(tried, cast(Tensor, own.moment)[0], cast(Tensor, own.fisher)[0])
            best.details["mean_cost"] = float(cast(Tensor, own.cost).mean())
            found.append(best)
        return found

    def rehearse(self, width: int, kept: int, device: torch.device, options: Options) -> None:
        columns = width if options.meant("steps") > 1 else kept
        rehearse(width, columns, device, options.backend)


def _transports(costs: Tensor, selections: list[Tensor], options: Options) -> list[WidthMap]:
    return transports(
        costs,
        selections,
        reg=options.meant("reg"),
        steps=options.meant("steps"),
        factor=options.meant("factor"),
        backend=options.backend,
    )


def basis(model: CausalLM, width_map: WidthMap, options: Options) -> Tensor:
    """Return the basis of a map's span that absorption takes, (D, k).

    Any gives an untied model the same function; a tied one needs the one nearest to the axes (see
    ``absorb``), LayerNorm one that keeps the mean.
    """
    q = width_map.q
    if q.shape[0] == q.shape[1]:
        return q
    if model.tied and not options.untie:
        q = align(q, width_map.selection)
    return level(q) if model.architecture.layer_norm else q


def refit_weights(given: Calibrated, narrow: CausalLM, q: Tensor, shape: Shape) -> list[float]:
    """Refit what absorption made, and narrow its feed-forwards, in place.

    Returns what each feed-forward lost; see ``refit``.
    """
    model, options = given.model, given.options
    if narrow.width < model.width and options.chooses_table(model):
        ridge = ridge_of(options, given.tokens.numel() / narrow.width, cut=True)
        choose_table(model, narrow, q, cast(Tensor, given.statistics.final), ridge=ridge)
    own = given.statistics.own_windows
    tokens, inner, dropped = given.tokens, shape.inner, shape.dropped
    return refit(model, narrow, q, tokens, inner, options, own=own, dropped=dropped)
