"""The 8-bit path of the L1 cost: which tokens become bytes, and how.

A sum of absolute differences of bytes costs an eighth of the float32 instructions on a CPU, and a
quarter of their time on a GPU, if the tokens' values fit 256 levels well. Three things make them
fit:

* tokens are sorted by range (largest minus smallest activation) and every block of 256 has its own
  step, so that a quiet token does not pay for a loud one;
* the tokens of widest range (one in 64; in language models the few with massive activations) are
  left out and summed in float32;
* all neurons of a token are rounded with one shared random offset ``u`` in [0, 1): the expected
  difference of ``floor(v + u)`` and ``floor(w + u)`` is ``v - w`` exactly, however small, so that
  the error is noise that averages out over tokens. The offsets of consecutive tokens follow the
  golden ratio, which averages faster than chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dotresize.ops.constants import TOKEN_BLOCK, Quantisation

# One token in so many is summed in float32.
EXACT_SHARE = 64
# Tokens quantised together: at most so many, and of large batches as many as bytes may be copied at
# a time, but no fewer than the stated error holds for.
CHUNK, LEAST_CHUNK = 1 << 14, 1 << 11
_GOLDEN = (math.sqrt(5) - 1) / 2
# Bytes 0 to 254 and an offset below 1 never pass 255.
_LEVELS = 254.0


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest activation of each token of x (B, T, n): float32 (B, T)."""
    return x.amin(2).float(), x.amax(2).float()  # in aminmax they take fifteen times as long


def quantisation(low: Tensor, high: Tensor) -> Quantisation:
    """Return how to quantise tokens whose activations are from low to high: float32 (B, T)."""
    spread, order = (high - low).sort(dim=1)
    tokens = low.shape[1]
    count = tokens - math.ceil(tokens / EXACT_SHARE)
    token, exact = order[:, :count].contiguous(), order[:, count:].contiguous()
    widest = spread[:, TOKEN_BLOCK - 1 : count : TOKEN_BLOCK]
    if count % TOKEN_BLOCK:
        widest = torch.cat([widest, spread[:, count - 1 : count]], 1)
    # A token that is not finite sorts last and makes its block's step, and so the cost, not finite.
    # Ranges so small that their step has no reciprocal are as good as none.
    steps = torch.where(widest < 1e-30, 1.0, widest / _LEVELS)
    dither = (torch.arange(count, dtype=torch.float64, device=low.device) * _GOLDEN % 1.0).float()
    dither = dither.expand(len(low), -1).contiguous()
    return Quantisation(token, low.gather(1, token), dither, steps.contiguous(), exact)


def take(x: Tensor, token: Tensor) -> Tensor:
    """Return the tokens of each problem in the given order, as a copy."""
    return x.gather(1, token[:, :, None].expand(-1, -1, x.shape[2]))


def quantize(x: Tensor, plan: Quantisation) -> Tensor:
    """Return the bytes of x times their step, in plain PyTorch: float32 (B, quantised, n)."""
    step = plan.steps.repeat_interleave(TOKEN_BLOCK, 1)[:, : plan.low.shape[1], None]
    levels = (take(x, plan.token).float() - plan.low[:, :, None]) / step + plan.dither[:, :, None]
    return levels.floor().clamp(0, 255) * step
