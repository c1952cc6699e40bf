"""What a user may choose about a compression, checked before anything expensive.

The method of the residual width and that of the feed-forward width are objects: the real ones are
in this package, those that they are compared with in dotresize.baselines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.maps import WidthMap
from dotresize.narrow.targets import Targets
from dotresize.ops.arguments import check_flag, check_number, check_whole, check_word, shown
from dotresize.ops.transport_map import FACTORS

# Options that some methods follow, each with what is meant where it is not given; see
# ``Options.meant``.
OF_METHODS: dict[str, Any] = {
    **{"targets": None, "reg": 3.0, "steps": math.inf, "factor": "polar"},
    "sensitivity": None,
}
# Transports in a row: the map is the limit's long before.
MOST_STEPS = 10_000
# Options that are any finite number, as far as their type goes.
NUMBERS = ("width", "energy", "params", "ff_width", "reg", "steps", "ridge")
# Neurons that the feed-forward of each layer keeps; None where all stay as they are.
Inner = Sequence[int] | None
# What a parameter budget counts.
COUNTS = ("total", "non_embedding")


class Calibrated(NamedTuple):
    """What a method narrows: a calibrated model, and the choices about it."""

    model: CausalLM
    tokens: Tensor  # int64 (windows, length), on which weights are refitted
    statistics: Statistics
    options: Options


class Shape(NamedTuple):
    """What a model is narrowed to.

    Attributes:
        width: of the residual.
        inner: neurons that the feed-forward of each layer keeps, of those that stay; None for all.
        dropped: numbers of the layers that are left out.
    """

    width: int
    inner: Inner = None
    dropped: tuple[int, ...] = ()


class Narrowed(NamedTuple):
    """What a method made of a model."""

    model: CausalLM
    map: WidthMap  # of several, the first
    bases: list[Tensor]  # (D, k) float64: one for all residual locations, one for each, or none
    lost: Sequence[float] = ()  # by each feed-forward (narrow/refit.py)


class WidthMethod(ABC):
    """A way to narrow the residual width.

    Attributes:
        name: the word for it.
        default: whether it is the one that nobody has to ask for.
        scope: "global": one map for all residual locations; "location": one for each.
        plain: whether plain transformers load the result.
        takes: the options that it follows and others do not, of ``OF_METHODS``.
        needs: the statistics that it asks for: those of ``Statistics`` by name, and "apart" for
            those of each location.
        needs_to_heed: those that it asks for besides, with ``sensitivity``.
    """

    name: str
    default: bool = False
    scope: str = "global"
    plain: bool = True
    takes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    needs_to_heed: frozenset[str] = frozenset()

    @property
    def spelled(self) -> str:
        """The choice that made it this method, for messages."""
        return f"method {self.name}"

    def check(self, options: Options) -> None:  # noqa: B027 - most follow all of them
        """Raise ValueError for options that this method cannot follow, whatever the model."""

    @abstractmethod
    def narrow(self, given: Calibrated, shape: Shape, seconds: dict[str, float]) -> Narrowed:
        """Return the model in a shape.

        seconds: the times of its stages are added here.
        """

    def rehearse(  # noqa: B027 - most compile nothing
        self, width: int, kept: int, device: torch.device, options: Options
    ) -> None:
        """Have kernels compiled that ``narrow`` will use, for maps from ``width`` to ``kept``."""

    def probe(self, given: Calibrated, shape: Shape) -> CausalLM:
        """Return the model in a shape, to measure what that costs; see narrow/search.py."""
        raise ValueError(f"{self.spelled}: has no probe for a parameter budget; give width")


class FeedForwardMethod(ABC):
    """A way to choose the inner neurons of a feed-forward that stay, and what they write."""

    name: str
    default: bool = False

    @abstractmethod
    def choose(
        self, gram: Tensor, cross: Tensor, writer: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the kept neurons and their recombined writer.

        Args:
            gram: (n, n) float64, h'h summed over tokens, h what the inner neurons deliver.
            cross: (n, out) float64, h'y, y what the writer should write; with y = h W it is
                ``gram @ writer``.
            writer: (n, out) float64, W in row convention.
            count: how many stay.

        Returns:
            int64 (count,), ascending, and (count, out) float64.
        """


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices of ``dotresize.compress``.

    Attributes:
        width: residual width, a share up to 1, rounded to what hardware takes
            (narrow/round_width.py), or an exact number of channels.
        energy: instead of width: the share of the activations' variance to keep, rounded up.
        params: instead of both widths: the share of the parameters to keep; see ``search``. 0.8 if
            nothing else says how narrow to get; where that takes a search and none can be had (an
            offloaded model, a map for each location, given targets), width is 0.8 instead.
        params_count: "total", or "non_embedding": without embedding and head.
        search: True measures what both widths cost, and a layer or two less, and takes the
            cheapest shape (narrow/search.py). False spends ``params`` on the feed-forwards alone,
            wherever they can meet it. If not given, they are narrowed alone as long as they keep
            half of their neurons and nothing is asked of the residual's map.
        method: "dot" (transport), "pca" (principal directions), or, to compare with, "magnitude"
            (selection) or "slicegpt" (a map for each location, found in order).
        targets: the neurons onto which the others are transported once ("dot"), or which alone
            are kept ("magnitude"): int64 indices, or a callable of (Statistics, k) that returns
            them. The largest mean magnitudes if not given.
        ff_width: inner width of the feed-forward blocks, as ``width``; unchanged if not given.
        layer_widths: give each layer a feed-forward width of its own, all together no larger than
            ``ff_width`` or ``params`` would make them; widths stay equal where little is predicted
            to be won (narrow/allocation.py). The directory of such a model, written by
            ``dotresize.save``, loads by ``dotresize.load``, and not in plain transformers.
        pad: fill the feed-forwards of such a model up with zeros, to the widest of them: the same
            function, larger, in a plain checkpoint.
        ff_method: how that is done: "eliminate" (narrow/feed_forward.py), or, to compare with,
            "nystrom", "magnitude" or "transport" (baselines/feed_forward.py).
        multiple_of: of what a width that was not given exactly is a multiple; by default of 256,
            128, 64 or 32, by narrow/round_width.py.
        keep_type: refuse widths for which a Llama would be saved as a Mistral (models/resized.py).
        tensor_parallel: devices that the result will be split over: the feed-forward width is a
            multiple of so many times the multiple that was chosen.
        refit: refit the weights by least squares on the same tokens (narrow/refit.py).
        ridge: weight of the old weights in the refit, relative to the Gram matrix's diagonal; if
            not given, it follows the number of tokens for each unknown (narrow/refit.py).
        reg: entropic regularisation in units of the mean cost ("dot"); 3 if not given.
        steps: transports in a row ("dot"): 1 onto the targets, as in the paper; beyond that, of
            all neurons onto all neurons; ``math.inf``, which is meant if not given, for their limit
            (narrow/transport.py).
        factor: "polar", which is meant if not given, or "qr" ("dot" with a number of steps; see
            ``dotresize.factorize``).
        sensitivity: make the map heed what the model's output feels ("dot", "pca";
            narrow/sensitivity.py), by one backward pass over the tokens; if not given, on for the
            limit of transport alone.
        untie: give a tied head its own weights: exact, but adds vocabulary x width parameters.
        self_windows: calibrate on so many windows more, which the model writes itself; by
            default as many as are given.
        seed: of those, and of the output that ``sensitivity`` draws.
        backend: of the solvers, see ``dotresize.backends``.
        batch_windows: windows per forward pass.
        figures: put what a page shows of the map into the report.

    On the command line a field is the option of its name, or of its ``flag``. Those without
    ``resume`` change no weight, and may be others when a run is resumed.
    """

    width: float | None = None
    energy: float | None = None
    params: float | None = None
    params_count: str = "total"
    search: bool | None = None
    method: WidthMethod
    targets: Targets = field(default=None, compare=False)  # tensors have no one truth value
    ff_width: float | None = None
    layer_widths: bool = False
    pad: bool = False
    ff_method: FeedForwardMethod
    multiple_of: int | None = None
    keep_type: bool = False
    tensor_parallel: int = 1
    refit: bool = field(default=True, metadata={"flag": "no_refit"})
    ridge: float | None = None
    reg: float | None = None
    steps: float | None = None
    factor: str | None = None
    sensitivity: bool | None = None
    untie: bool = False
    self_windows: int | None = None
    seed: int = 0
    backend: str = field(default="auto", metadata={"resume": False})
    batch_windows: int = field(default=4, metadata={"resume": False})
    figures: bool = field(default=False, metadata={"resume": False})

    def with_method(self, method: WidthMethod) -> Options:
        """Return the choices with another method, without those that it does not follow."""
        dropped: dict[str, Any] = dict.fromkeys(OF_METHODS.keys() - method.takes)
        return replace(self, method=method, **dropped)

    def meant(self, name: str) -> Any:
        """Return a choice of ``OF_METHODS`` as it was made, or what is meant without.

        That is None where the method does not follow it.
        """
        if name not in self.method.takes:
            return None
        if name == "steps" and self.steps is None and self.targets is not None:
            return 1  # transport onto these
        if name == "sensitivity" and self.sensitivity is None:
            # Sensitivity makes the limit a better map, but not principal directions; a number of
            # steps is the paper's transport, which has none.
            return self.meant("steps") == math.inf
        given = getattr(self, name)
        return OF_METHODS[name] if given is None else given

    @property
    def sized(self) -> bool:
        """Whether anything is said of how narrow to get."""
        asked = (self.width, self.energy, self.params, self.ff_width)
        return any(value is not None for value in asked)

    @property
    def budgeted(self) -> bool:
        """Whether a budget chooses the widths, also because nothing is said of a size."""
        if self.sized:
            return self.params is not None
        return self.method.plain and self.targets is None

    @property
    def of_residual(self) -> list[str]:
        """The choices that do nothing where the residual keeps its width, by name."""
        method = [] if self.method.default else [self.method.spelled.partition(" ")[0]]
        return method + [name for name in OF_METHODS if self._given(name)]

    def _given(self, name: str) -> bool:
        """Return whether a choice of ``OF_METHODS`` was made, other than to leave it out."""
        value = getattr(self, name)
        return value is not None and value is not False

    @property
    def _keeps_residual(self) -> bool:
        """Whether only the feed-forward blocks were asked to be narrowed."""
        of_residual = (self.width, self.energy, self.params, self.targets)
        return self.ff_width is not None and all(value is None for value in of_residual)

    def chooses_table(self, model: CausalLM) -> bool:
        """Return whether the table of a tied head is chosen (narrow/tied_head.py).

        That asks for the moment in front of the final norm, whose weight it rests on.
        """
        one_map = self.method.plain and not model.architecture.layer_norm
        return self.refit and model.tied and not self.untie and one_map

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that a compression by these choices asks for."""
        asked = {
            "moment": self.energy is not None or self.figures,
            "moment_apart": self.figures,
            "apart": callable(self.targets),
        }
        also = self.method.needs_to_heed if self.meant("sensitivity") else frozenset()
        return self.method.needs | also | {name for name, needed in asked.items() if needed}

    def own_windows(self, given: int) -> int:
        """Return how many windows the model writes itself, beside those given."""
        return given if self.self_windows is None else self.self_windows

    def check(self) -> None:
        """Raise ValueError for the first choice that would be refused whatever the model."""
        if self.factor is not None:
            check_word("factor", self.factor, FACTORS)
        check_word("params_count", self.params_count, COUNTS)
        self._check_types()
        self._check_numbers()
        if self.energy is not None and self.width is not None:
            raise ValueError("give width or energy, not both")
        asked = {"width": self.width, "energy": self.energy, "ff_width": self.ff_width}
        for name, value in asked.items():
            if self.params is not None and value is not None:
                raise ValueError(f"give params or {name}, not both: params chooses the widths")
        self._check_of_method()
        if not self.ff_method.default and self.ff_width is None and not self.budgeted:
            raise ValueError(
                f"ff_method {self.ff_method.name}: does nothing without ff_width or params"
            )
        if self.layer_widths and self.ff_width is None and not self.budgeted:
            raise ValueError("layer_widths: does nothing without ff_width or params")
        if self.pad and not self.layer_widths:
            raise ValueError("pad: does nothing without layer_widths")
        if self.params_count != "total" and not self.budgeted:
            raise ValueError(f"params_count {self.params_count}: does nothing without params")
        if self.search is not None and not self.budgeted:
            raise ValueError("search: there is none without params")
        by_rule = "energy" if self.energy is not None else "params"
        if isinstance(self.targets, Tensor) and getattr(self, by_rule) is not None:
            raise ValueError(f"targets: their number is the width; leave {by_rule} out")
        self.method.check(self)

    def _check_of_method(self) -> None:
        for name in OF_METHODS:
            if not self._given(name):
                continue
            if name not in self.method.takes:
                others = {"targets": "dot or magnitude", "sensitivity": "dot or pca"}.get(
                    name, "dot"
                )
                raise ValueError(f"{name}: {self.method.spelled} has none; give method {others}")
            if self._keeps_residual:
                raise ValueError(
                    f"{name}: ff_width alone leaves the residual as it is, without a map"
                )
        if self.meant("steps") == math.inf:
            if self.factor is not None:
                raise ValueError(
                    f"factor {self.factor}: the limit of transport has none; give steps 1"
                )
            if self.targets is not None:
                raise ValueError("targets: the limit of transport depends on none; give steps 1")

    def _check_types(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if name == "steps" and not isinstance(value, (bool, str)):
                continue  # which may be inf
            if value is not None:
                check_number(name, value, "a finite number")
        optional = ("self_windows", "multiple_of")
        for name in ("batch_windows", "tensor_parallel", *optional):
            if getattr(self, name) is not None or name not in optional:
                check_whole(name, getattr(self, name))
        whole = isinstance(self.seed, Integral) and not isinstance(self.seed, bool)
        if not whole or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {shown(self.seed)}: must fit in 64 bits")
        for name in ("refit", "untie", "figures", "keep_type", "layer_widths", "pad"):
            check_flag(name, getattr(self, name))
        for name in ("search", "sensitivity"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))

    def _check_numbers(self) -> None:
        if self.reg is not None and not 0 < self.reg < math.inf:
            raise ValueError(f"reg {self.reg:g}: must be positive and finite")
        for name in ("batch_windows", "multiple_of", "tensor_parallel"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        steps = self.steps
        if not isinstance(steps, (int, float, type(None))):
            raise ValueError(f"steps is {shown(steps)}: must be a whole number, or inf")
        if steps not in (None, math.inf) and not (1 <= steps <= MOST_STEPS and steps == int(steps)):
            raise ValueError(
                f"steps {steps:g}: must be a whole number from 1 to {MOST_STEPS}, or inf"
            )
        if self.self_windows is not None and self.self_windows < 0:
            raise ValueError(f"self_windows {self.self_windows}: must not be negative")
        if self.ridge is not None and not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge {self.ridge:g}: must be positive and finite")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy {self.energy:g}: must be a share of the variance in (0, 1]")
        if self.params is not None and not 0 < self.params <= 1:
            raise ValueError(f"params {self.params:g}: must be a share of the parameters in (0, 1]")
