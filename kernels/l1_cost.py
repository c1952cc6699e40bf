"""Launches of the L1 cost kernel: configurations, the choice between them, statistics."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dotresize.kernels.l1_tile import l1_cost_kernel
from dotresize.ops.halves import GROUP
from dotresize.reference import TOKEN_BLOCK

# Pairs from which an unknown device is worth a second or two of tuning.
TUNING_PAIRS = 10**11
_TUNING_TOKENS = 2 * TOKEN_BLOCK


@dataclass(frozen=True)
class L1Config:
    """A tile of ``block_m x block_n`` pairs; ``unroll`` tokens are loaded together.

    ``warps`` of 32 lanes along each axis, ``thread x thread`` pairs of each lane, and again.
    """

    block_m: int
    block_n: int
    thread: int
    warps: tuple[int, int]
    unroll: int

    def constants(self, lanes: int = 32) -> dict[str, int]:
        """The kernel's constants, on a device with so many lanes in a warp."""
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "T": self.thread,
            "UNROLL": self.unroll,
            "LANES_M": lanes // 8,
            "WARPS_M": self.num_warps(lanes) // self.warps[1],
            "WARPS_N": self.warps[1],
        }

    def num_warps(self, lanes: int = 32) -> int:
        """Half as many of 64 lanes: a tile held twice would be computed twice."""
        return self.warps[0] * self.warps[1] * 32 // lanes


# What is left of the tiles tried ahead of time: nothing in these spills on any target
# (tests/test_kernels_compile.py). The first of each list is taken where nothing was tuned.
CONFIGS = {
    "float32": [
        L1Config(64, 128, 8, (2, 2), 2),
        L1Config(64, 128, 8, (2, 2), 1),
        L1Config(128, 128, 8, (4, 2), 2),
        L1Config(64, 64, 8, (2, 1), 2),
    ],
    "packed": [
        L1Config(64, 128, 8, (2, 2), 4),
        L1Config(64, 64, 8, (2, 1), 4),
        L1Config(64, 128, 8, (2, 2), 2),
    ],
}
# For problems with too few tiles to fill a device.
SMALL = {"float32": L1Config(32, 64, 4, (2, 2), 1), "packed": L1Config(32, 64, 4, (2, 2), 8)}


def configs(kind: str, operands: str) -> list[L1Config]:
    """The tiles for y, targets or self; for self, packed, only the last has no spills on sm_100."""
    return CONFIGS[kind][-1:] if (kind, operands) == ("packed", "self") else CONFIGS[kind]


def l1_cost(
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    *,
    accumulate: bool,
    divisor: float | None,
    scale: Tensor | None = None,
) -> Tensor | None:
    """out (+)= sum over tokens; then, unless ``divisor`` is None, out /= divisor.

    x (B, T, n); y (B, T, m), or index (B, m), or neither: y = x. With ``scale`` (B, T / GROUP),
    x and y are float16, T is a multiple of GROUP, and each group's sum is multiplied by its scale.
    Returns, with a divisor, the minimum, maximum and mean of each problem: float64 (B, 3), NaN if
    an entry is. Shapes are the caller's responsibility (dotresize.ops.l1_cost).
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    if y is not None:
        y = y if y.stride(2) == 1 else y.contiguous()
    config = choose_config(x, y, index, out, packed=scale is not None)
    return _launch(l1_cost_kernel, config, x, y, index, scale, out, accumulate, divisor)


def _launch(
    kernel: Any,
    config: L1Config | None,
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    accumulate: bool,
    divisor: float | None,
) -> Tensor | None:
    """``config`` None leaves the tile to the kernel, a tuner, and ``divisor`` must be None."""
    batch, tokens, n = x.shape
    m = out.shape[2]
    columns = x if y is None else y
    tile, statistics = {}, out
    if config is not None:
        masked = n < config.block_m or m < config.block_n
        tile = config.constants(_lanes(x)) | {
            "num_warps": config.num_warps(_lanes(x)),
            "MASKED": masked,
        }
        if divisor is not None:
            statistics = x.new_empty(_tiles(batch, n, m, tile), 3, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernel[lambda constants: (_tiles(batch, n, m, constants),)](
            *(x, columns, out if index is None else index, out if scale is None else scale),
            *(out, statistics, tokens, n, m),
            *(x.stride(0), x.stride(1), columns.stride(0), columns.stride(1)),
            *(0 if scale is None else scale.shape[1], 1.0 if divisor is None else divisor),
            HAS_INDEX=index is not None,
            SYMMETRIC=y is None and index is None,
            ACCUMULATE=accumulate,
            PACKED=scale is not None,
            FINISH=divisor is not None,
            TOKEN_BLOCK=TOKEN_BLOCK,
            GROUP=GROUP,
            **tile,
        )
    if divisor is None:
        return None
    parts = statistics.view(batch, -1, 3).double()
    mean = parts[:, :, 2].sum(1) * (tile["BM"] * tile["BN"] / (n * m))
    return torch.stack([parts[:, :, 0].amin(1), parts[:, :, 1].amax(1), mean], 1)


def _tiles(batch: int, n: int, m: int, constants: dict[str, Any]) -> int:
    return batch * triton.cdiv(n, constants["BM"]) * triton.cdiv(m, constants["BN"])


def _lanes(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32


def choose_config(
    x: Tensor, y: Tensor | None, index: Tensor | None, out: Tensor, *, packed: bool
) -> L1Config:
    """The tile for one call: small for few pairs, tuned on this device for very many."""
    kind = "packed" if packed else "float32"
    batch, n, m = out.shape
    operands = "targets" if index is not None else "self" if y is None else "y"
    first = configs(kind, operands)[0]
    fits = n >= first.block_m and m >= first.block_n
    processors = (
        torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    )
    if not fits or _tiles(batch, n, m, first.constants()) < 2 * processors:
        return SMALL[kind]
    if not x.is_cuda or x.numel() * m < TUNING_PAIRS:
        return first
    strides = [x.stride(1), (x if y is None else y).stride(1)]
    aligned = all(stride * x.element_size() % 16 == 0 for stride in strides)
    return tune(kind, x.dtype, operands, aligned, x.device)


@functools.cache
def tune(
    kind: str, dtype: torch.dtype, operands: str, aligned: bool, device: torch.device
) -> L1Config:
    """The fastest configuration for this kind of operands; Triton keeps the answer on disk."""
    width = 4096 if device.type == "cuda" else 128
    x = torch.arange(_TUNING_TOKENS * (width + (not aligned)), device=device) * 0.37 % 1
    x = x.view(1, _TUNING_TOKENS, -1).to(dtype)
    y = x.flip(2) if operands == "y" else None
    index = torch.arange(width, device=device)[None] if operands == "targets" else None
    scale = (
        x.new_ones(1, _TUNING_TOKENS // GROUP, dtype=torch.float32) if kind == "packed" else None
    )
    out = torch.empty(1, x.shape[2], width if index is not None else x.shape[2], device=device)
    tuner = _tuner(configs(kind, operands), _lanes(x))
    _launch(tuner, None, x, y, index, scale, out, False, None)
    best = tuner.best_config.kwargs
    same = (c for c in configs(kind, operands) if c.constants(_lanes(x)).items() <= best.items())
    return next(same)


def _tuner(candidates: list[L1Config], lanes: int) -> Any:
    choices = [
        triton.Config(c.constants(lanes) | {"MASKED": False}, num_warps=c.num_warps(lanes))
        for c in candidates
    ]
    # The interpreter knows no device to take the time with.
    clock = _stopwatch if triton.knobs.runtime.interpret else None
    return triton.autotune(
        choices, key=["n", "m", "SYMMETRIC"], cache_results=True, do_bench=clock
    )(l1_cost_kernel)


def _stopwatch(call: Callable[[], Any], quantiles: tuple[float, ...] = (0.5,)) -> list[float]:
    start = time.perf_counter()
    call()
    return [time.perf_counter() - start] * len(quantiles)
