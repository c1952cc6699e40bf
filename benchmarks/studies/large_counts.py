"""Operations and bytes of compressing a model of a given shape to four fifths of its width.

With D and k the residual widths, F the inner one, P the parameters of all layers, P' those of the
narrowed ones, E those of embedding and head, L layers, T tokens, R the readers' rows of a layer,
g = 5/8 the share of a Gram matrix that is multiplied:

forward  2 T (2 P + P')                                calibration, and both models in the refit
gram     2 T L (2 g k^2 + 2 k D + g F^2 + w) + 2 s k (E + L (D + F + R) D)
float64  9 D^3 + L (2/3 k^3 + 4 k^2 D + 1/3 F^3 + 2 F^2 k + v)

for transport with a number of steps and a head of its own, which asks for no moments. The default
asks for those of activations, 2 T s g (2 L + 1) D^2 more, and passes the model backwards. The
forward passes run in the model's dtype (float32 on a CPU). Products of activations, and of weights
by a map, run on a GPU's matrix units, where one with a float32 factor is s = 3 products
(least_squares.py), or in float32, s = 1. A writer's cross products are w = F (D + k) + s D k with
matrix units, and v = 2 F D k after them; else w = k (D + F) and v = 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dotresize.least_squares import GRAM_BLOCKS, over_tokens
from dotresize.models.causal_lm import CausalLM
from dotresize.offload.memory_plan import activation_bytes, stage_bytes

KEPT = 0.8
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class Shape:
    """Llama's numbers."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(4, 64, 160, 4, 2, 300),
    "1.1B": Shape(22, 2048, 5632, 32, 4, 32000),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "70B": Shape(80, 8192, 28672, 64, 8, 128256),
}


def counts(shape: Shape, tokens: int, split: int) -> dict[str, float]:
    """Return the header's sums, in floating-point operations; split: s."""
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    k, readers, layer = round(KEPT * width), _readers(shape), _layer(shape)
    writer, after = k * (width + inner), 0
    if split > 1:
        writer, after = inner * (width + k) + split * width * k, 2 * inner * width * k
    share = (GRAM_BLOCKS + 1) / (2 * GRAM_BLOCKS)
    gram = share * (2 * k**2 + inner**2) + 2 * k * width + writer
    tables = 2 * shape.vocab_size * width
    maps = tables + layers * (width + inner + readers) * width
    solves = 2 / 3 * k**3 + 4 * k**2 * width + 1 / 3 * inner**3 + 2 * inner**2 * k + after
    return {
        "forward": 2.0 * tokens * layers * layer * (2 + KEPT),
        "gram": 2.0 * tokens * layers * gram + 2.0 * split * k * maps,
        "float64": 9.0 * width**3 + layers * solves,
    }


def parameters(shape: Shape) -> int:
    """Return parameters of the layers, the embeddings and the head; P + E."""
    outer = 2 * shape.vocab_size * shape.hidden_size
    return shape.num_hidden_layers * _layer(shape) + outer


def _readers(shape: Shape) -> int:
    grouped = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    return shape.hidden_size + 2 * grouped + 2 * shape.intermediate_size


def _layer(shape: Shape) -> int:
    return shape.hidden_size * (_readers(shape) + shape.hidden_size + shape.intermediate_size)


def gpu_bytes(model: CausalLM, tokens: int, window: int) -> dict[str, int]:
    """Return the bytes that a GPU must hold in bfloat16, perhaps with the activations."""
    k, inner = round(KEPT * model.width), model.inner_width
    stages = stage_bytes(model, BATCH_WINDOWS * window, window, k, inner, 2, evaluated=False)
    return {"stages": max(stages.values()), "activations": activation_bytes(model, tokens, k, 2)}


def measured_rates(device: torch.device) -> dict[str, float]:
    """Measure operations a second of one product of each kind, the median of three."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device)
    low, high = x.to(half), x.double() + n * torch.eye(n, device=device)

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def rate(run: Callable[[], Any], operations: float) -> float:
        took = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            run()
            finish()
            took.append(time.perf_counter() - start)
        return operations / sorted(took[1:])[1]

    return {
        "forward": rate(lambda: low @ low, 2.0 * n**3),
        "gram": rate(lambda: over_tokens(low, low), 2.0 * n**3),
        "float64": rate(lambda: torch.linalg.solve(high, high), (2 / 3 + 2) * n**3),
    }
