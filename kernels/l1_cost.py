"""Launches of the L1 cost kernel: tiles, operands that it can read, statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dotresize.kernels.l1_tile import BYTES, FLOATS, HALVES, l1_cost_kernel
from dotresize.ops.constants import GROUP, TOKEN_BLOCK, L1Operands, chunk_tokens

# Copies that go past the registers are NVIDIA's; AMD's GPUs have registers for totals.
SHARED_TOTALS = torch.version.hip is None
NVIDIA = not triton.knobs.runtime.interpret and torch.version.hip is None
# Neurons: what Triton asks of a number to read 16 bytes at a time along it.
ALIGNED = 16


@dataclass(frozen=True)
class Kind:
    """Says what numbers a kernel reads: activations, copies scaled to float16, words of bytes."""

    code: int
    dtype: torch.dtype
    block: int  # of them are summed before the total is touched


KINDS = {
    "float32": Kind(FLOATS.value, torch.float32, TOKEN_BLOCK),
    "packed": Kind(HALVES.value, torch.float16, TOKEN_BLOCK),
    "bytes": Kind(BYTES.value, torch.int32, TOKEN_BLOCK // 4),
}


@dataclass(frozen=True)
class L1Config:
    """A tile of ``block_m x block_n`` pairs; ``chunk`` tokens are fetched at a time.

    ``warps`` of 32 lanes along each axis, ``thread x thread`` pairs of each lane, and again;
    ``stages - 1`` chunks are on their way; ``registers`` of a thread at most, where the compiler
    takes a limit.
    """

    block_m: int
    block_n: int
    thread: int
    warps: tuple[int, int]
    chunk: int
    stages: int
    registers: int

    def constants(self, lanes: int = 32) -> dict[str, int]:
        """Return the kernel's constants, on a device with so many lanes in a warp."""
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "T": self.thread,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "LANES_M": lanes // 8,
            "WARPS_M": self.num_warps(lanes) // self.warps[1],
            "WARPS_N": self.warps[1],
        }

    def options(self, lanes: int = 32) -> dict[str, int]:
        """Return what the compiler is told; AMD's takes no limit."""
        limit = {} if lanes == 64 or torch.version.hip else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps(lanes)} | limit

    def num_warps(self, lanes: int = 32) -> int:
        """Return the warps; half as many of 64 lanes, as a tile held twice is computed twice."""
        return self.warps[0] * self.warps[1] * 32 // lanes


# Measured on an H200, T pairs/s: float32 12.0 / 12.9 / 13.6 with 112 / 128 / 160 registers, packed
# 19.2 / 18.3 with 128 / 160; 128 x 128 pairs with twice the warps 13.5 and 18.6; more or fewer
# tokens in a chunk, or more chunks on their way, no better (with 128 registers).
CONFIGS = {
    "float32": L1Config(64, 128, 4, (2, 2), 8, 3, 160),
    "packed": L1Config(64, 128, 8, (2, 2), GROUP, 3, 128),
    "bytes": L1Config(64, 128, 4, (2, 2), 8, 3, 128),  # not yet timed
}
# Bytes of shared memory that three programs of these need on a multiprocessor. Devices for
# workstations have 100 KB.
ENOUGH_SHARED = 3 * (51 << 10)
# For problems with too few tiles to fill a device.
SMALL = {
    "float32": L1Config(32, 64, 4, (2, 2), 8, 3, 128),
    "packed": L1Config(32, 64, 4, (2, 2), GROUP, 3, 128),
    "bytes": L1Config(32, 64, 4, (2, 2), 8, 3, 128),
}


def l1_cost(work: L1Operands, scale: Tensor | None = None) -> Tensor | None:
    """Compute a cost, or add to it.

    With ``scale``, x and y are either float16, T is a multiple of GROUP, and the sum of each group
    is multiplied by its scale (B, T / GROUP); or they are words of bytes (l1_quantize.py), and the
    sum of each TOKEN_BLOCK is multiplied by its scale (B, blocks). Returns, with a divisor, the
    minimum, maximum and mean of each problem: float64 (B, 3), NaN if an entry is. Shapes are the
    caller's responsibility (dotresize.ops.l1_cost).
    """
    x, y, targets, out = work.x, work.y, work.targets, work.out
    name = "float32" if scale is None else "packed" if x.dtype == torch.float16 else "bytes"
    config, kind = choose_config(out, name, x.device), KINDS[name]
    # One neuron alone has no mirror, and triton 3.6 fails to compile that with n known to be 1.
    shared = y is None and targets is None and out.shape[2] > 1
    blocks = config.block_m, config.block_n
    if shared:
        blocks = (max(blocks),)
    copied = 0 if _readable(x, blocks[0], kind.dtype) else x.shape[2]
    columns = x if y is None else y
    if not shared and (targets is not None or not _readable(columns, blocks[1], kind.dtype)):
        copied += out.shape[2]
    step = x.shape[1]
    if copied and scale is None:  # other copies are of few enough tokens
        step = chunk_tokens(len(x), copied, 4)
    found = None
    for part in work.chunks(step):
        xs = _operand(part.x, None, blocks[0], kind.dtype)
        columns = part.x if part.y is None else part.y
        ys = xs if shared else _operand(columns, targets, blocks[1], kind.dtype)
        found = _launch(config, kind, part._replace(x=xs, y=ys), scale, symmetric=shared)
    return found


def _readable(x: Tensor, block: int, kind: torch.dtype) -> bool:
    """Return whether a kernel can read x as it is: 16 bytes at a time, none past the end."""
    n = x.shape[2]
    steps = (*x.stride()[:2], n)
    aligned = x.data_ptr() % 16 == 0 and all(step % ALIGNED == 0 for step in steps)
    return x.dtype == kind and x.stride(2) == 1 and aligned and n >= block


def _operand(x: Tensor, index: Tensor | None, block: int, kind: torch.dtype) -> Tensor:
    """Return x, or its neurons ``index``, as a kernel reads it.

    What is copied may have more neurons.
    """
    if index is None and _readable(x, block, kind):
        return x
    n = x.shape[2] if index is None else index.shape[1]
    wide = x.new_empty(*x.shape[:2], max(block, -(-n // ALIGNED) * ALIGNED), dtype=kind)
    if index is not None:
        x = x.gather(2, index[:, None, :].expand(-1, x.shape[1], -1))
    wide[:, :, :n] = x
    return wide


def _launch(
    config: L1Config, kind: Kind, work: L1Operands, scale: Tensor | None, *, symmetric: bool
) -> Tensor | None:
    """Launch the kernel; x and y are what it reads, and both are there."""
    x, y, out, divisor = work.x, work.y, work.out, work.divisor
    batch, n, m = out.shape
    lanes = lanes_of(x)
    tiles = _tiles(batch, n, m, config)
    statistics = out if divisor is None else x.new_empty(tiles, 3, dtype=torch.float32)
    with torch.cuda.device_of(x):
        l1_cost_kernel[(tiles,)](
            p_x=x,
            p_y=y,
            p_scale=out if scale is None else scale,
            p_out=out,
            p_statistics=statistics,
            tokens=x.shape[1],
            n=n,
            m=m,
            read_n=x.shape[2],
            read_m=y.shape[2],
            stride_xb=x.stride(0),
            stride_xt=x.stride(1),
            stride_yb=y.stride(0),
            stride_yt=y.stride(1),
            groups=0 if scale is None else scale.shape[1],
            divisor=1.0 if divisor is None else divisor,
            KIND=kind.code,
            SYMMETRIC=symmetric,
            ACCUMULATE=work.accumulate,
            FINISH=divisor is not None,
            BLOCK=kind.block,
            NVIDIA=NVIDIA,
            SHARED=SHARED_TOTALS,
            **config.options(lanes),
            **config.constants(lanes),
        )
    if divisor is None:
        return None
    parts = statistics.view(batch, -1, 3).double()
    mean = parts[:, :, 2].sum(1) * (config.block_m * config.block_n / (n * m))
    return torch.stack([parts[:, :, 0].amin(1), parts[:, :, 1].amax(1), mean], 1)


def _tiles(batch: int, n: int, m: int, config: L1Config) -> int:
    return batch * triton.cdiv(n, config.block_m) * triton.cdiv(m, config.block_n)


def lanes_of(x: Tensor) -> int:
    """Return the lanes of a warp on the device of x."""
    return torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32


def choose_config(out: Tensor, kind: str, device: torch.device) -> L1Config:
    """Return the tile for one call: the small one where others were too few, or mostly padding.

    And where a multiprocessor has room for the totals of one or two programs only.
    """
    processors, shared = 1, ENOUGH_SHARED
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        processors, shared = found.multi_processor_count, found.shared_memory_per_multiprocessor
    usual = CONFIGS[kind]
    narrow = out.shape[1] < usual.block_m or out.shape[2] < usual.block_n
    few = _tiles(*out.shape, usual) < 2 * processors
    scarce = SHARED_TOTALS and shared < ENOUGH_SHARED
    return SMALL[kind] if few or narrow or scarce else usual
