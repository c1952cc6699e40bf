"""Statistics of the residual stream, collected while the calibration tokens pass the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.gradients import BackwardPass
from dotresize.calibration.residual_stream import Streams, captured_inputs, norms_of
from dotresize.least_squares import scaled_gram
from dotresize.models.causal_lm import CausalLM
from dotresize.ops.cost_accumulator import L1CostAccumulator

# What is collected for every location, if it is asked for.
MATRICES = ("moment", "cost", "fisher", "gradient_cost")


@dataclass
class Statistics:
    """Statistics of the calibration tokens, at L residual locations.

    Tokens are RMS-normalised first, so that all weigh alike however large the stream has grown.
    M is L where a matrix of every location is kept, and 1 where only their mean is: one map needs
    no more, and L matrices of (D, D) are the largest thing there would be.

    Attributes:
        locations: names of the norms that read the stream there.
        importance: (L, D) float64, mean |x|.
        moment: (M, D, D) float64, mean of x'x; None if not asked for.
        cost: (M, D, D) float32, mean |x_i - x_j|; None if not asked for.
        fisher: (M, D, D) float64, mean of g'g, g the gradients of calibration/gradients.py; None if
            not asked for.
        gradient_cost: (M, D, D) float32, mean |g_i - g_j|; None if not asked for.
        final: (D, D) float64, the moment in front of the final norm; None if not asked for.
        seconds: "calibration" (forward passes and moments), "cost", "sensitivity" (the backward
            pass, its matrices and costs), and "self-generated text".
        own_windows: how many of the windows the model wrote itself.
        kept_bytes: what the backward pass kept of the forward pass.
    """

    locations: list[str]
    tokens: int
    importance: Tensor
    moment: Tensor | None
    cost: Tensor | None
    final: Tensor | None = None
    fisher: Tensor | None = None
    gradient_cost: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    own_windows: int = 0
    kept_bytes: int = 0

    @classmethod
    def none(cls, tokens: int, width: int) -> Statistics:
        """Return statistics of no location, for a model whose residual stays as it is."""
        seconds = dict.fromkeys(("calibration", "cost", "sensitivity"), 0.0)
        none = torch.empty((0, width), dtype=torch.float64, device="cpu")
        return cls([], tokens, none, None, None, seconds=seconds)

    @property
    def apart(self) -> bool:
        """Whether every location has matrices of its own."""
        matrices = (getattr(self, name) for name in MATRICES)
        return all(x is None or len(x) == len(self.locations) for x in matrices)

    def mean(self) -> Statistics:
        """Return the mean over locations, as statistics of a single one."""
        return self._of("mean", lambda x: x.mean(0, keepdim=True))

    def at(self, i: int) -> Statistics:
        """Return the statistics of location i alone, which must have been kept apart."""
        return self._of(self.locations[i], lambda x: x[i : i + 1])

    def _of(self, location: str, one: Callable[[Tensor], Tensor]) -> Statistics:
        found = {name: getattr(self, name) for name in MATRICES}
        found = {name: None if x is None else one(x) for name, x in found.items()}
        return replace(
            self, locations=[location], importance=one(self.importance), final=None, **found
        )


@torch.inference_mode(False)  # of whose tensors no gradient can be taken
@torch.no_grad()
def collect(
    model: CausalLM,
    tokens: Tensor,
    *,
    cost: bool = True,
    moment: bool = True,
    fisher: bool = False,
    gradient_cost: bool = False,
    final: bool = True,
    apart: bool = False,
    moment_apart: bool = False,
    seed: int = 0,
    batch_windows: int = 4,
    backend: str = "auto",
) -> Statistics:
    """Collect importance, second moments and L1 costs of activations and gradients, by layers.

    Args:
        tokens: int64 (windows, length).
        cost, moment, fisher, gradient_cost: which matrices to collect; each of the last two asks
            for a backward pass.
        final: whether to collect the moment in front of the final norm.
        apart: keep the matrices of every location, not only their mean.
        moment_apart: keep the moments of every location.
        seed: of the output whose gradients are taken.

    Raises:
        ValueError: activations, predictions or gradients that are not finite; names the location
            and neuron.
    """
    locations = len(list(model.architecture.norms(model.module)))
    kept = locations if apart else 1
    moments = locations if moment_apart else kept
    activations = _Matrices(model, moments * moment, kept * cost, backend)
    gradients = _Matrices(model, kept * fisher, kept * gradient_cost, backend)
    sums = _Sums(model, activations, gradients, final=final)
    start = time.perf_counter()
    layers = model.layers
    with closing(Streams(model, tokens, batch_windows)) as streams, ExitStack() as stack:
        back = None
        if fisher or gradient_cost:
            back = stack.enter_context(closing(BackwardPass(model, tokens, streams, seed)))
        for i, name in enumerate(tqdm(layers, desc="calibration", unit="layer", disable=None)):
            if back is not None:
                back.keep()
            with model.resident(name) as layer:
                for j in range(len(streams)):
                    with captured_inputs(norms_of(model.architecture, layer)) as read:
                        streams.stream[j] = streams.run(layer, j)
                    sums.add(read, 2 * i)
        for stream in streams.stream:
            sums.add([stream], 2 * len(layers))
        forward = time.perf_counter()
        if back is not None:
            back.run(sums.add_gradients)
    seconds = {
        "calibration": forward - start - activations.cost_seconds,
        "cost": activations.cost_seconds,
        "sensitivity": time.perf_counter() - forward if back is not None else 0.0,
    }
    return sums.statistics(tokens.numel(), seconds, 0 if back is None else back.kept_bytes)


def precision_on(device: torch.device) -> str:
    """Return the precision of costs: tokens as bytes on a GPU, where they are most of the time.

    On a CPU they are a small part of it, and float32 has the same bits whatever the batches are.
    """
    return "u8" if device.type == "cuda" else "fp32"


class _Matrices:
    """Sums of second moments and of L1 costs, of every location or of all together."""

    def __init__(self, model: CausalLM, moments: int, costs: int, backend: str) -> None:
        """Begin with no token. moments, costs: how many are kept apart, 0 for none."""
        self._device, width = model.device, model.width
        self.moment = _zeros(model, moments, width, width) if moments else None
        self._costs = [
            L1CostAccumulator(
                width,
                reduction="sum",
                precision=precision_on(self._device),
                device=self._device,
                backend=backend,
            )
            for _ in range(costs)
        ]
        self.cost_seconds = 0.0

    def add(self, i: int, given: Tensor, scale: Tensor, scaled: Tensor) -> Tensor | None:
        """Add tokens of location i; return their second moment, float32.

        given: (T, D) of any floating type; scale: (T, 1) float32; scaled: their product, float32.
        """
        product = None
        if self.moment is not None:
            product = scaled_gram(given, scale, scaled)
            self.moment[min(i, len(self.moment) - 1)] += product
        if self._costs:
            self._synchronize()
            start = time.perf_counter()
            self._costs[min(i, len(self._costs) - 1)].update(scaled)
            self._synchronize()
            self.cost_seconds += time.perf_counter() - start
        return product

    def costs(self) -> Tensor | None:
        """Return the sums of costs, (count, D, D) float32."""
        return torch.stack([sums.result() for sums in self._costs]) if self._costs else None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Sums:
    """All sums over tokens."""

    def __init__(
        self, model: CausalLM, activations: _Matrices, gradients: _Matrices, *, final: bool
    ) -> None:
        self._names = [name for name, _ in model.architecture.norms(model.module)]
        self._activations, self._gradients = activations, gradients
        self._importance = _zeros(model, len(self._names), model.width)
        self._final = _zeros(model, model.width, model.width) if final else None

    def add(self, read: list[Tensor], first: int) -> None:
        """Add the tokens of the locations from ``first`` on, as read by their norms."""
        for i, x in enumerate(read, first):
            found = x.flatten(0, -2)
            _check_finite("activations", found, self._names[i])
            scaled = found.float()
            scale = inverse_rms(scaled)
            scaled = scaled * scale
            self._importance[i] += scaled.abs().sum(0).double()
            product = self._activations.add(i, found, scale, scaled)
            if self._final is not None and i == len(self._names) - 1:
                self._final += scaled_gram(found, scale, scaled) if product is None else product

    def add_gradients(
        self, read: list[Tensor], gradients: list[Tensor], first: int, times: float
    ) -> None:
        """Add the gradients by the normalised streams of the locations from ``first`` on.

        times: what they have been multiplied by.
        """
        for i, (x, g) in enumerate(zip(read, gradients, strict=True), first):
            found = g.flatten(0, -2)
            _check_finite("gradients", found, self._names[i], "; turn sensitivity off")
            scale = 1 / (times * inverse_rms(x.flatten(0, -2).float()))
            self._gradients.add(i, found, scale, found.float() * scale)

    def statistics(self, tokens: int, seconds: dict[str, float], kept_bytes: int) -> Statistics:
        sums = {
            "moment": self._activations.moment,
            "cost": self._activations.costs(),
            "fisher": self._gradients.moment,
            "gradient_cost": self._gradients.costs(),
        }
        distributed.total(self._importance, self._final, *sums.values())
        matrices: dict[str, Any] = {}
        for name, value in sums.items():
            each = tokens * (1 if value is None else len(self._names) // len(value))
            matrices[name] = None if value is None else value / each
        return Statistics(
            self._names,
            tokens,
            self._importance / tokens,
            final=None if self._final is None else self._final / tokens,
            seconds=seconds,
            kept_bytes=kept_bytes,
            **matrices,
        )


def _zeros(model: CausalLM, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=model.device)


def inverse_rms(stream: Tensor) -> Tensor:
    """Return one over each token's root mean square over the channels, (..., 1)."""
    return torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-12)


def _check_finite(what: str, found: Tensor, name: str, remedy: str = "") -> None:
    finite = torch.isfinite(found).all(0)
    if not finite.all():
        neuron = int((~finite).nonzero()[0])
        raise ValueError(f"{what} entering {name}, neuron {neuron}, are not finite{remedy}")
