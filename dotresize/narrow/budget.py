"""What a share of a model's parameters leaves room for, and where that is refused."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Collection
from typing import Any

import torch

from dotresize.accounting import count_parameters
from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import widths_left, without_layers
from dotresize.models.resized import has_biases, resized
from dotresize.narrow.curves import LEAST
from dotresize.narrow.options import Options
from dotresize.narrow.round_width import round_width

# No feed-forward gets fewer neurons: the width 1 is read as a share, all of it.
LEAST_INNER = 2
# Where feed-forwards keep this share of their neurons, a search for another shape won at most 5 %
# of the excess of SmolLM2-135M, in twice the time: so much more text wins more (docs/compress.md).
ENOUGH = 0.5
# Parameters by a model's class and config: a run asks for the same four again and again, and a
# model of 8 B takes some 0.2 s on meta.
_COUNTS: dict[tuple[type, str], dict[str, int]] = {}


class Budget:
    """What a share of a model's parameters leaves room for."""

    def __init__(self, model: CausalLM, options: Options, dropped: Collection[int] = ()) -> None:
        """Count what ``params`` and ``params_count`` of the options allow.

        dropped: numbers of layers that are left out, which leaves room for others.
        """
        assert options.params is not None
        count = options.params_count
        self._model, self._options = model, options
        self._parameters = parameters_at(model, count, dropped)
        self._layers = len(model.layers) - len(dropped)
        whole = self._parameters if not dropped else parameters_at(model, count)
        self.allowed = options.params * whole(model.width, model.inner_width)
        outputs = len(model.module.get_submodule(model.architecture.head).weight)
        # A tied model's head that gets weights of its own counts.
        self._head = outputs if options.untie and model.tied and count == "total" else 0

    @property
    def least(self) -> float:
        """The share of the parameters that the narrowest widths to be had would keep."""
        model = self._model
        inner = model.inner_width
        if model.architecture.has_inner_width:
            rounded = (self._rounded(room) for room in range(LEAST_INNER, inner))
            inner = next(filter(None, rounded), inner)
        width = model.width if model.architecture.fixed_residual else self.widths()[0]
        least = self._parameters(width, inner) + self._head * width
        return least / self._parameters(model.width, model.inner_width)

    def inner_at(self, width: int) -> int:
        """Return the largest feed-forward width that fits beside a residual width; 0 for none."""
        inner, room = self._model.inner_width, self.allowed - self._head * width
        fitting = bisect_right(range(inner + 1), room, key=lambda m: self._parameters(width, m))
        if fitting > inner:
            return inner
        return self._rounded(fitting - 1)

    def _rounded(self, room: int) -> int:
        """Return the largest feed-forward width that hardware takes up to some number; 0 for none.

        See narrow/round_width.py.
        """
        options = self._options
        rule: dict[str, Any] = {
            "multiple_of": options.multiple_of,
            "times": options.tensor_parallel,
        }
        full = self._model.inner_width
        found = round_width(room, full, towards="down", **rule) if room > 0 else 0
        return found if LEAST_INNER <= found <= room else 0

    def neurons_at(self, width: int) -> int:
        """Return how many inner neurons of all layers together fit beside a residual width."""
        none, one = (self._parameters(width, m) for m in (0, 1))
        return int((self.allowed - none - self._head * width) * self._layers // (one - none))

    def widths(self) -> list[int]:
        """Return the residual widths to choose from: those that rounding down leads to."""
        full, options = self._model.width, self._options
        rule: dict[str, Any] = {"multiple_of": options.multiple_of}
        step = residual_step(self._model, options)
        found = {
            round_width(wanted, full, towards="down", divisor=step, **rule)
            for wanted in range(step, full + 1)
        }
        return sorted(found)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of widths that fit, the widest feed-forward for each residual width.

        Raises ValueError where even the narrowest model has more parameters.
        """
        found = [(k, m) for k in self.widths() if (m := self.inner_at(k))]
        if not found:
            raise ValueError(self.refusal("no pair of widths has so few"))
        return found

    def refusal(self, why: str) -> str:
        """Return why a budget cannot be met, and which could."""
        return f"params {self._options.params:g}: {why} parameters; the least is {self.least:.3f}"

    def width_alone(self) -> int:
        """Return the largest residual width that fits beside the whole feed-forward; 0 for none."""
        whole = self._model.inner_width
        return max((k for k in self.widths() if self.inner_at(k) == whole), default=0)


def inner_without_search(model: CausalLM, options: Options) -> int | None:
    """Return the feed-forward width that spends a budget alone; None where shapes are searched.

    model: its config is enough.

    Raises:
        ValueError: no search is wanted, and a choice is of the residual, which keeps its width.
    """
    if options.search or not model.architecture.has_inner_width:
        return None
    inner, share = Budget(model, options).inner_at(model.width), LEAST
    if options.search is None:
        if options.of_residual:
            return None
        share = ENOUGH
    widths = model.inner_widths
    if sum(min(inner, own) for own in widths) < share * sum(widths):
        return None
    for name in options.of_residual:
        raise ValueError(f"{name}: without search the residual keeps its width; leave {name} out")
    return inner


def check_budget(model: CausalLM, options: Options, *, whole: bool = True) -> None:
    """Raise ValueError for a budget that cannot be met. model: its config is enough.

    whole: whether the model will be in memory, which a search of shapes asks for.
    """
    budget, architecture = Budget(model, options), model.architecture
    if inner_without_search(model, options) is not None:
        return
    if architecture.fixed_residual:
        if not budget.inner_at(model.width):
            raise ValueError(budget.refusal("no feed-forward width has so few"))
    elif architecture.has_inner_width:
        budget.pairs()
    elif not budget.width_alone():
        raise ValueError(budget.refusal("no width has so few"))
    if not whole and architecture.has_inner_width:
        others = "ff_width" if architecture.fixed_residual else "ff_width or width"
        raise ValueError(
            f"params {options.params:g}: takes a search of shapes, for which the whole model must "
            f"be in memory; give {others}"
        )


def residual_step(model: CausalLM, options: Options) -> int:
    """Return what every residual width that is chosen for the user is a multiple of."""
    kept = options.keep_type or has_biases(model.config)
    return model.architecture.divisor(model.config) if kept else model.architecture.width_multiple


def parameters_at(
    model: CausalLM, count: str, dropped: Collection[int] = ()
) -> Callable[[int, int], int]:
    """Return a model's parameters as a function of residual width and feed-forward width.

    Models without memory of their own tell, as the count is linear in each width: four of them, or
    two where the residual width cannot change.
    count: "total" (tied tensors once) or "non_embedding" (without embedding and head).
    dropped: numbers of layers that are left out.
    """
    config = without_layers(model.config, dropped)
    # Layers that are narrower already keep their own width.
    own = widths_left(model, dropped) or [model.inner_width]

    def neurons(inner: int) -> int:
        return sum(min(inner, width) for width in own)

    if model.architecture.fixed_residual:  # the config may refuse any other width
        one, two = (_counted(model, config, model.width, m)[count] for m in (1, 2))
        each = (two - one) // len(own)
        return lambda width, inner: one + each * (neurons(inner) - len(own))
    divisor = model.architecture.divisor(model.config)
    widths, inners = (divisor, 2 * divisor), (1, 2)
    (a, b), (c, d) = ([_counted(model, config, k, m)[count] for m in inners] for k in widths)
    per_both = ((d - c) - (b - a)) // divisor
    per_width = (c - a) // divisor - per_both
    per_inner = (b - a) - divisor * per_both
    constant = a - divisor * per_width - per_inner - divisor * per_both

    def parameters(width: int, inner: int) -> int:
        each = (per_inner + per_both * width) // len(own)
        return constant + per_width * width + each * neurons(inner)

    return parameters


def _counted(model: CausalLM, config: Any, width: int, inner: int) -> dict[str, int]:
    config = copy.deepcopy(config) if width == model.width else resized(config, width)
    setattr(config, model.architecture.inner, inner)
    kind = type(model.module)
    key = kind, config.to_json_string(use_diff=False)
    if key not in _COUNTS:
        with torch.device("meta"):
            _COUNTS[key] = count_parameters(CausalLM.in_memory(kind(config)))
    return _COUNTS[key]
