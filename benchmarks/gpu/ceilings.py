"""What the device can do at most: additions, exponentials and copied bytes per second, measured.

Each kernel does one thing from registers, with sixteen independent chains in a thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

THREADS = 128
BLOCK = 16 * THREADS
UNROLL = 8


@triton.jit
def pairs_kernel(p_out, steps, HALF: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Add |x - y|: the two additions of a pair, float32, or float16 with two pairs in one."""
    kind: tl.constexpr = tl.float16 if HALF else tl.float32
    b_x = tl.load(p_out + tl.arange(0, BLOCK)).to(kind)
    b_sum = tl.zeros((BLOCK,), dtype=kind)
    y = tl.load(p_out).to(kind)
    for _ in range(steps):
        for _ in tl.static_range(UNROLL):
            b_sum += tl.abs(b_x - y)
            y += 1
    tl.store(p_out + tl.arange(0, BLOCK), b_sum.to(tl.float32))


@triton.jit
def bytes_kernel(p_out, steps, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Add four pairs of bytes in one instruction, where the device has one."""
    b_x = tl.load(p_out + tl.arange(0, BLOCK)).to(tl.int32)
    b_sum = tl.zeros((BLOCK,), dtype=tl.int32)
    b_y = tl.arange(0, BLOCK)
    for _ in range(steps):
        for _ in tl.static_range(UNROLL):
            b_sum = tl.inline_asm_elementwise(
                "vabsdiff4.u32.u32.u32.add $0, $1, $2, $3;",
                "=r,r,r,r",
                [b_x, b_y, b_sum],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        b_y += 1
    tl.store(p_out + tl.arange(0, BLOCK), b_sum.to(tl.float32))


@triton.jit
def exponentials_kernel(p_out, steps, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    b_x = tl.load(p_out + tl.arange(0, BLOCK))
    for _ in range(steps):
        for _ in tl.static_range(UNROLL):
            b_x = tl.exp2(-b_x)
    tl.store(p_out + tl.arange(0, BLOCK), b_x)


def ceilings(
    device: torch.device, seconds: Callable[[Callable[[], Any]], float]
) -> dict[str, Callable[[], float]]:
    """Return functions that measure pairs, exponentials and bytes per second."""
    on_gpu = device.type == "cuda"
    programs, steps, size = 2, 1, 1 << 12
    if on_gpu:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs, steps, size = 16 * processors, 4096, 1 << 30
    out = torch.rand(BLOCK, device=device)
    work = programs * steps * UNROLL * BLOCK

    def rate(kernel: Any, pairs: int, **constants: bool) -> Callable[[], float]:
        # Every program writes the same numbers to the same place.
        launch = functools.partial(
            kernel[(programs,)], out, steps, BLOCK=BLOCK, UNROLL=UNROLL, **constants
        )
        return lambda: pairs * work / seconds(launch)

    def copied() -> float:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / seconds(lambda: target.copy_(source))

    found = {
        "pairs, float32": rate(pairs_kernel, 1, HALF=False),
        "pairs, float16": rate(pairs_kernel, 1, HALF=True),
        "exponentials": rate(exponentials_kernel, 1),
        "bytes copied": copied,
    }
    if on_gpu and not torch.version.hip:
        found["pairs, bytes"] = rate(bytes_kernel, 4)
    return found
