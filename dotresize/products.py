"""Sums over tokens of products of two activations, and products with float32 matrices.

The product of two numbers in half precision is exact in float32, so a GPU's matrix units, which
add up in float32, keep what float32 arithmetic would keep, up to how they round a sum (NVIDIA's cut
off where arithmetic rounds), at several times its rate. A float32 factor goes through them as three
bfloat16 numbers whose sum it is: x = h + m + l, each the rounding of what the ones before left, 3 x
8 bits of 24. Never TF32, which drops 13 bits of each factor. Elsewhere, and where neither factor is
in half precision, both are multiplied as float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The first devices whose matrix units take such factors.
_SINCE = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}


def over_tokens(u: Tensor, v: Tensor) -> Tensor:
    """u'v, float32: u (T, n), v (T, m), of any floating type."""
    return product(u.mT, v)


def scaled_gram(x: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    """(s x)'(s x), float32: x (T, n), of any floating type; scale (T, 1) and s x, float32."""
    if _exact(x):
        return over_tokens(x, scaled * scale)
    return scaled.mT @ scaled


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32: (n, T), (T, m), of any floating type."""
    if _exact(a) and a.dtype == b.dtype:
        return _multiply(a, b)
    if _exact(a) and a.dtype == torch.bfloat16:
        return _sum(_multiply(a, part) for part in reversed(apart(b.float())))
    if _exact(b) and b.dtype == torch.bfloat16:
        return _sum(_multiply(part, b) for part in reversed(apart(a.float())))
    return a.float() @ b.float()


def _exact(x: Tensor) -> bool:
    """Whether the device has matrix units for such a factor that add up in float32."""
    if not x.is_cuda or torch.version.hip or x.dtype not in _SINCE:
        return False
    return torch.cuda.get_device_capability(x.device) >= _SINCE[x.dtype]


def apart(x: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose exact sum is a float32 one (2^-110 < |x| < 2^127, or 0)."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """One after the other, so that no more than two are held."""
    total = next(terms)
    for term in terms:
        total += term
    return total
