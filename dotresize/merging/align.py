"""Alignment of the inner neurons of two feed-forwards: features, correlations, assignment.

Features are what the inner neurons are before their non-linearity, on all tokens that count. They
are collected in one pass of the model and lie in temporary files; with mu and sigma a neuron's mean
and standard deviation, layer i is aligned to layer a by

    C = E[(x_a - mu_a)' (x_i - mu_i)] / (sigma_a sigma_i)        pi = argmax sum_j C[j, pi(j)]

a few pairs of layers at a time, so that memory does not depend on the number of tokens or layers.
Windows that share a pair share its permutation.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from dotresize.calibration.activation_cache import ActivationCache
from dotresize.calibration.residual_stream import captured
from dotresize.least_squares import FLOAT
from dotresize.models.linear import linear_of
from dotresize.models.stacks import Stack, layers_of
from dotresize.ops.assignment import assignment
from dotresize.ops.product_cost import ProductSums
from dotresize.ops.sinkhorn import sinkhorn

# Of correlations that are aligned together.
BATCH_BYTES = 2**30

logger = logging.getLogger("dotresize")


class Aligner:
    """Alignments between the layers of one stack, each made when it is first asked for.

    Attributes:
        tokens: how many counted.
    """

    def __init__(
        self, stack: Stack, layers: int, batches: int, soft: float | None, backend: str
    ) -> None:
        self.stack = stack
        self.tokens = 0
        self._soft, self._backend = soft, backend
        self._features = [ActivationCache(batches) for _ in range(layers)]
        self._found: dict[tuple[int, int], Tensor] = {}

    def close(self) -> None:
        """Let the features go."""
        for cache in self._features:
            cache.close()

    def keep(self, layer: int, batch: int, features: Tensor, mask: Tensor | None) -> None:
        """Keep a layer's features, (..., n). mask: what counts, (...); None for all."""
        flat = features.flatten(0, -2)
        if mask is not None:
            flat = flat[mask.flatten().to(flat.device)]
        if not torch.isfinite(flat).all():
            raise ValueError(f"{self.stack.layers}.{layer}: its inner neurons are not finite")
        self._features[layer][batch] = flat
        self.tokens += len(flat) if layer == 0 else 0

    def to_anchor(self, anchor: int, others: list[int]) -> list[Tensor]:
        """Return how each of the layers is aligned to the anchor.

        int64 (n,), the neuron of the layer for each of the anchor's, or, soft, (n, n) float64 with
        rows and columns that sum to one.
        """
        if self._soft is not None:
            return [self._plan(self.correlation(anchor, i), self._soft) for i in others]
        missing = [i for i in others if (anchor, i) not in self._found]
        neurons = self._features[anchor][0].shape[1]
        together = max(1, BATCH_BYTES // (8 * neurons**2))
        for first in range(0, len(missing), together):
            some = missing[first : first + together]
            scores = torch.stack([self.correlation(anchor, i) for i in some])
            for i, found in zip(some, assignment(scores, backend=self._backend), strict=True):
                self._found[anchor, i] = found
        return [self._found[anchor, i] for i in others]

    def _plan(self, score: Tensor, soft: float) -> Tensor:
        cost = 1.0 - score
        result = sinkhorn(cost, soft * float(cost.mean()), tol=1e-7, backend=self._backend)
        if not result.converged:
            logger.warning("soft alignment at reg %g: %s", soft, result.status)
        return cast(Tensor, result.plan).to(FLOAT) * len(score)

    def correlation(self, a: int, i: int) -> Tensor:
        """Return C of the module's header, (n, n) float64; 0 for a neuron that never changes."""
        first = self._features[a][0]
        n = first.shape[1]
        sums = ProductSums("correlation", (1, n, n), None, first.device)
        for x, y in zip(self._features[a], self._features[i], strict=True):
            sums.add(x[None], y[None])
        return sums.similarity()[0]


@torch.inference_mode()
def features(
    model: Any,
    stacks: tuple[Stack, ...],
    batches: list[dict[str, Tensor]],
    soft: float | None,
    backend: str,
) -> dict[str, Aligner]:
    """Return an aligner for each stack, from one pass over the batches."""
    counts = [len(layers_of(model, stack)) for stack in stacks]
    found = {
        stack.name: Aligner(stack, count, len(batches), soft, backend)
        for stack, count in zip(stacks, counts, strict=True)
    }
    for number, batch in enumerate(batches):
        with ExitStack() as hooks:
            seen = [hooks.enter_context(captured(_known_by(model, stack))) for stack in stacks]
            run(model, batch)
        for stack, delivered in zip(stacks, seen, strict=True):
            mask = counted(stack, batch)
            for i, output in enumerate(delivered):
                values = output.chunk(stack.stacked, -1)[-1]
                tokens = values.shape[:-1].numel()  # some layers flatten them
                if mask is not None and mask.numel() != tokens:
                    raise ValueError(
                        f"{stack.mask}: has {mask.numel()} tokens, the {stack.name} sees {tokens}"
                    )
                found[stack.name].keep(i, number, values, mask)
    for aligner in found.values():
        if not aligner.tokens:
            raise ValueError(f"no token counts in the {aligner.stack.name}: all are masked")
    return found


def run(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Return the model's outputs; ValueError in one line for inputs that it cannot take."""
    try:
        return model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        names = ", ".join(inputs)
        raise ValueError(f"the model cannot run a batch of {names}: {reason}") from error


def _known_by(model: Any, stack: Stack) -> list[nn.Module]:
    """Return what delivers the features of each layer."""
    return [linear_of(layer, stack.readers[-1]) for layer in layers_of(model, stack)]


def counted(stack: Stack, batch: dict[str, Tensor]) -> Tensor | None:
    """Return which tokens of the stack count: by its mask, for decoders with labels by these."""
    if stack.mask is None:
        return None
    if stack.mask in batch:
        return batch[stack.mask][..., :: stack.stride] != 0
    if stack.mask.startswith("decoder") and "labels" in batch:
        return batch["labels"] != -100
    return None
