"""What the device can do at most, measured: arithmetic, bytes, and what iterations wait for.

Each kernel of arithmetic does one thing from registers, with sixteen independent chains in a
thread. An iteration of a small problem waits for meetings of its programs, for the cache that they
exchange sums through, and, where it is launched, for the next launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from dotresize.kernels.gluon_compat import gl, jit
from dotresize.kernels.resident_kernel import meet

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


@jit
def meetings_kernel(p_count, steps, LONE: tl.constexpr):
    """Have all programs of the launch meet so many times."""
    alive = steps > 0
    for i in range(steps):
        alive = meet(p_count, (i + 1) * gl.num_programs(0), alive, LONE)


@triton.jit
def cached_kernel(p_in, p_out, chunks, steps, BLOCK: tl.constexpr):
    """Read chunks of a memory that the second cache holds, each program its own way round."""
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    chunk = tl.program_id(0)
    for _ in range(steps):
        chunk = (chunk + 127) % chunks
        b_sum += tl.load(p_in + chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out + tl.program_id(0), tl.sum(b_sum, 0))


@triton.jit
def nothing_kernel(p_out):
    tl.store(p_out, 1.0)


def waits(
    device: torch.device, seconds: Callable[[Callable[[], Any]], float]
) -> dict[str, Callable[[], float]]:
    """Return functions that measure meetings, cached bytes and launches of a graph per second."""
    on_gpu = device.type == "cuda"
    steps, launches = (2000, 64) if on_gpu else (2, 2)
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.empty(4096, device=device)

    def meetings(programs: int) -> float:
        def launch() -> None:
            counter.zero_()
            options = {"num_warps": 8, "launch_cooperative_grid": True}
            meetings_kernel[(programs,)](counter, steps, LONE=programs == 1, **options)

        return steps / seconds(launch)

    def cached() -> float:
        programs, chunks, block = (512, 6144, 1024) if on_gpu else (2, 4, 32)
        cache = torch.ones(chunks * block, device=device)  # 24 MB
        launch = functools.partial(
            cached_kernel[(programs,)], cache, out, chunks, steps, BLOCK=block
        )
        return programs * steps * block * 4 / seconds(launch)

    def launched() -> float:
        def several() -> None:
            for _ in range(launches):
                nothing_kernel[(1,)](out)

        several()
        if not on_gpu:
            return launches / seconds(several)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        return launches / seconds(graph.replay)

    sizes = (9, 18, 128, 132) if on_gpu else (1,)
    found: dict[str, Callable[[], float]] = {
        f"meetings of {n} programs": functools.partial(meetings, n) for n in sizes
    }
    return found | {"bytes read, second cache": cached, "launches in a graph": launched}


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
