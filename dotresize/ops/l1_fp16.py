"""The packed float16 path of the L1 cost: how activations become float16.

Two float16 pairs share one instruction. A group of GROUP consecutive tokens is summed in float16,
then in float32. Each group is first scaled by a power of two, which is exact, so that its largest
activation is at most 1024: the sum of GROUP differences then stays below 65504, and a value is
subnormal only if it is 2^24 times smaller than the largest of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.ops.constants import GROUP, neurons_of

_LARGEST = 10  # log2 of the largest scaled activation


def scales(x: Tensor, y: Tensor | None) -> Tensor:
    """Return what a group's float16 sum is multiplied by: float32 (B, groups), powers of two.

    Not finite where an activation is not, which makes the cost not finite.
    """
    largest = x.abs().amax(2)
    if y is not None:
        largest = torch.maximum(largest, y.abs().amax(2))
    short = -largest.shape[1] % GROUP
    largest = torch.nn.functional.pad(largest.float(), (0, short))
    largest = largest.view(len(x), -1, GROUP).amax(2)
    exponent = torch.frexp(largest).exponent - _LARGEST
    # Both the scale and its reciprocal must be normal numbers.
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 126))
    return torch.where(largest.isfinite(), scale, torch.nan)


def halve(x: Tensor, scale: Tensor, index: Tensor | None = None) -> Tensor:
    """Return x (B, T, n), or its neurons ``index``, over its scale: float16, whole groups."""
    if index is not None:
        x = neurons_of(x, index)
    tokens = scale.shape[1] * GROUP
    half = x.new_zeros(x.shape[0], tokens, x.shape[2], dtype=torch.float16)
    half[:, : x.shape[1]] = x / scale.repeat_interleave(GROUP, 1)[:, : x.shape[1], None]
    return half
