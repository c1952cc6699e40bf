"""Statistics of the residual stream, collected in one pass over the calibration tokens."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.residual_stream import Streams, captured_inputs, norms_of
from dotresize.least_squares import scaled_gram
from dotresize.models.causal_lm import CausalLM
from dotresize.ops.l1_accumulator import L1CostAccumulator


@dataclass
class Statistics:
    """Statistics of one pass over the calibration tokens, at L residual locations.

    Tokens are RMS-normalised first, so that all weigh alike however large the stream has grown.
    M is L where every location is kept apart, and 1 where only their mean is: one global map needs
    no more, and L matrices of (D, D) are the largest thing there would be.

    Attributes:
        locations: names of the norms that read the stream there.
        importance: (L, D) float64, mean |x|.
        moment: (M, D, D) float64, mean of x'x; None if not asked for.
        cost: (M, D, D) float32, mean |x_i - x_j|; None if not asked for.
        final: (D, D) float64, the moment in front of the final norm; None without moments.
        seconds: "calibration" (forward passes and moments), "cost", and "self-generated text".
        own_windows: how many of the windows the model wrote itself.
    """

    locations: list[str]
    tokens: int
    importance: Tensor
    moment: Tensor | None
    cost: Tensor | None
    final: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    own_windows: int = 0

    @classmethod
    def none(cls, tokens: int, width: int) -> Statistics:
        """Return statistics of no location, for a model whose residual stays as it is."""
        seconds = {"calibration": 0.0, "cost": 0.0}
        none = torch.empty((0, width), dtype=torch.float64, device="cpu")
        return cls([], tokens, none, None, None, seconds=seconds)

    @property
    def apart(self) -> bool:
        """Whether every location has its own moment and cost."""
        return all(x is None or len(x) == len(self.locations) for x in (self.moment, self.cost))

    def mean(self) -> Statistics:
        """Return the mean over locations, as statistics of a single one."""
        moment, cost = (
            None if x is None else x.mean(0, keepdim=True) for x in (self.moment, self.cost)
        )
        importance = self.importance.mean(0, keepdim=True)
        return Statistics(["mean"], self.tokens, importance, moment, cost, seconds=self.seconds)

    def at(self, i: int) -> Statistics:
        """Return the statistics of location i alone, which must have been kept apart."""
        moment, cost = (None if x is None else x[i : i + 1] for x in (self.moment, self.cost))
        importance = self.importance[i : i + 1]
        return Statistics(
            [self.locations[i]], self.tokens, importance, moment, cost, seconds=self.seconds
        )


@torch.inference_mode()
def collect(
    model: CausalLM,
    tokens: Tensor,
    *,
    cost: bool = True,
    moment: bool = True,
    apart: bool = False,
    batch_windows: int = 4,
    backend: str = "auto",
) -> Statistics:
    """Collect importance, second moments and L1 costs of the residual stream, layer by layer.

    Args:
        tokens: int64 (windows, length).
        cost, moment: which of the two matrices to collect.
        apart: keep the matrices of every location, not only their mean.

    Raises:
        ValueError: activations that are not finite; names the location and neuron.
    """
    sums = _Sums(model, cost=cost, moment=moment, apart=apart, backend=backend)
    start = time.perf_counter()
    layers = model.layers
    with closing(Streams(model, tokens, batch_windows)) as streams:
        for i, name in enumerate(tqdm(layers, desc="calibration", unit="layer", disable=None)):
            with model.resident(name) as layer:
                for j in range(len(streams)):
                    with captured_inputs(norms_of(model.architecture, layer)) as read:
                        streams.stream[j] = streams.run(layer, j)
                    sums.add(read, 2 * i)
        for stream in streams.stream:
            sums.add([stream], 2 * len(layers))
    return sums.statistics(tokens.numel(), time.perf_counter() - start)


class _Sums:
    """Sums over tokens, of every location or of all together."""

    def __init__(
        self, model: CausalLM, *, cost: bool, moment: bool, apart: bool, backend: str
    ) -> None:
        self.names = [name for name, _ in model.architecture.norms(model.module)]
        self._apart = apart
        self._device = model.device
        width, kept = model.width, len(self.names) if apart else 1
        self.importance = self._zeros(len(self.names), width)
        self.moment = self._zeros(kept, width, width) if moment else None
        self.final = self._zeros(width, width) if moment else None
        self.costs = [
            L1CostAccumulator(width, reduction="sum", device=self._device, backend=backend)
            for _ in range(kept if cost else 0)
        ]
        self._cost_seconds = 0.0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def add(self, read: list[Tensor], first: int) -> None:
        """Add the tokens of the locations from ``first`` on, as read by their norms."""
        for i, x in enumerate(read, first):
            found = x.flatten(0, -2)
            _check_finite(found, self.names[i])
            stream = found.float()
            scale = inverse_rms(stream)
            stream = stream * scale
            self.importance[i] += stream.abs().sum(0).double()
            place = i if self._apart else 0
            if self.moment is not None and self.final is not None:
                product = scaled_gram(found, scale, stream)
                self.moment[place] += product
                if i == len(self.names) - 1:
                    self.final += product
            if self.costs:
                self._synchronize()
                start = time.perf_counter()
                self.costs[place].update(stream)
                self._synchronize()
                self._cost_seconds += time.perf_counter() - start

    def statistics(self, tokens: int, seconds: float) -> Statistics:
        each = tokens if self._apart else tokens * len(self.names)
        cost = torch.stack([sums.result() for sums in self.costs]) if self.costs else None
        distributed.total(self.importance, self.moment, self.final, cost)
        took = {"calibration": seconds - self._cost_seconds, "cost": self._cost_seconds}
        return Statistics(
            self.names,
            tokens,
            self.importance / tokens,
            None if self.moment is None else self.moment / each,
            None if cost is None else cost / each,
            None if self.final is None else self.final / tokens,
            took,
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def inverse_rms(stream: Tensor) -> Tensor:
    """Return one over each token's root mean square over the channels, (..., 1)."""
    return torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-12)


def _check_finite(stream: Tensor, name: str) -> None:
    finite = torch.isfinite(stream).all(0)
    if not finite.all():
        neuron = int((~finite).nonzero()[0])
        raise ValueError(f"activations entering {name}, neuron {neuron}, are not finite")
