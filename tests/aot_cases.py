"""What tests/aot_compile.py compiles: every configuration that the launchers can choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dotresize.kernels import (
    l1_backward,
    l1_cost,
    l1_quantize,
    sinkhorn_columns,
    sinkhorn_finish,
    sinkhorn_prepare,
    sinkhorn_sweep,
)
from dotresize.kernels.l1_tile import l1_cost_kernel
from dotresize.kernels.resident import Division, choose
from dotresize.kernels.resident_kernel import resident_kernel
from dotresize.kernels.sinkhorn_device import Device
from dotresize.kernels.sinkhorn_sheet import RUNNING, TOO_COARSE
from dotresize.kernels.sinkhorn_tables import COLUMN_BLOCK, Tile
from dotresize.ops.constants import far_potential
from dotresize.ops.reference import TOKEN_BLOCK

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# Each way to hold a row, and a row that is not aligned; the last ones do not fit in registers.
WIDTHS = {"fp32": (160, 464, 768, 3072, 4096, 11469, 40000), "fp64": (90, 768, 2048, 3073)}
RUN = {"RUNNING": RUNNING}


class AotCase(NamedTuple):
    name: str
    function: Any
    types: str  # of the arguments that are not constants
    constants: Callable[[int], dict[str, Any]]  # by the lanes of a warp
    options: Callable[[int], dict[str, int]]  # what the compiler is told, likewise
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16
    elements: int = 0  # pairs or entries that one trip through the busiest loop does in a thread
    kept_elements: int = 0  # entries of the kept plan, through its loop
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


# What is small, or float64, is compiled for one target of each vendor: it takes minutes in all.
FEW = ("sm_90", "gfx942")


def four(lanes: int) -> dict[str, int]:
    return {"num_warps": 4}


def cases() -> Iterator[AotCase]:
    yield from l1_cases()
    yield from quantize_cases()
    yield l1_backward_case()
    yield with_ones(l1_backward_case(), "tokens", "n", "m")
    yield from sinkhorn_cases()
    yield from resident_cases()


def l1_cases() -> Iterator[AotCase]:
    """Every tile for every kind of numbers, and each for a cost of x with itself."""
    for precision, config in l1_cost.CONFIGS.items():
        for one in (config, l1_cost.SMALL[precision]):
            for operands in ("y", "self"):
                yield l1_case(precision, one, operands)
        yield l1_case(precision, config, "y", strides="i64")
        # On AMD's, 59 of 512 registers of the totals that are read first are spilled, once a tile.
        yield l1_case(precision, config, "y", accumulate=True)._replace(targets=tuple(DEVICES))
        # What is 1 is a constant to Triton.
        yield with_ones(l1_case(precision, l1_cost.SMALL[precision], "y"), "tokens", "n", "m")
        yield with_ones(l1_case(precision, l1_cost.SMALL[precision], "self"), "tokens")


def l1_case(
    precision: str,
    config: l1_cost.L1Config,
    operands: str,
    strides: str = "i32",
    accumulate: bool = False,
) -> AotCase:
    """strides: as Triton passes them, by their size."""
    kind = l1_cost.KINDS[precision]
    pointer = {"float32": "*fp32", "packed": "*fp16", "bytes": "*i32"}[precision]
    name = f"l1_cost/{precision}/{config.block_m}x{config.block_n}/{operands}"
    name += "/far" if strides == "i64" else "/more" if accumulate else ""
    constants = {
        "KIND": kind.code,
        "SYMMETRIC": operands == "self",
        "ACCUMULATE": accumulate,
        "FINISH": True,
        "BLOCK": kind.block,
    }
    return AotCase(
        name,
        l1_cost_kernel,
        f"{pointer} {pointer} *fp32 *fp32 *fp32" + " i32" * 5 + f" {strides}" * 4 + " i32 fp32",
        lambda lanes: (
            constants | config.constants(lanes) | {"NVIDIA": lanes == 32, "SHARED": lanes == 32}
        ),
        config.options,
        ("read_n", "read_m", "stride_xb", "stride_xt", "stride_yb", "stride_yt"),
        config.block_m * config.block_n // (32 * config.num_warps()) * config.chunk,
    )


def quantize_cases() -> Iterator[AotCase]:
    constants = {"TOKEN_BLOCK": TOKEN_BLOCK, "BN": 1024}
    types = "*bf16 *i64 *fp32 *fp32 *fp32 *i32" + " i32" * 7
    kernel = l1_quantize.quantize_kernel
    yield AotCase("quantize", kernel, types, lambda lanes: constants, four, targets=FEW)
    types = "*bf16 *fp32 *fp32" + " i32" * 4
    kernel = l1_quantize.ranges_kernel
    yield AotCase("ranges", kernel, types, lambda lanes: {"BN": 4096}, four, targets=FEW)


def l1_backward_case() -> AotCase:
    config = l1_backward.CONFIG
    return AotCase(
        f"l1_backward/{config.block_m}x{config.block_n}",
        l1_backward.l1_backward_kernel,
        "*fp32 *fp32 *fp32 *fp32" + " i32" * 10 + " fp32",
        lambda lanes: {"TOKEN_BLOCK": TOKEN_BLOCK, "NVIDIA": lanes == 32} | config.constants(lanes),
        config.options,
        ("stride_yb", "stride_ym", "stride_gb", "stride_gm"),
        config.block_m * config.block_n // (32 * config.num_warps()) * config.chunk,
    )


def with_ones(case: AotCase, *names: str) -> AotCase:
    """The case with these arguments equal to 1."""
    arguments, constants = case.function.arg_names, case.constants(32)
    given = [name for name in arguments if name not in constants]
    types = dict(zip(given, case.types.split(), strict=True))
    return case._replace(
        name=f"{case.name}/1",
        types=" ".join(types[name] for name in given if name not in names),
        constants=lambda lanes: case.constants(lanes) | dict.fromkeys(names, 1),
    )


def sinkhorn_cases() -> Iterator[AotCase]:
    """Every kind of row, every storage, aligned or not."""
    for kind, dtype in DTYPES.items():
        for columns in WIDTHS[kind]:
            align = 16 // dtype.itemsize
            yield sweep_case(kind, columns, align, shifted=False)
            if kind == "fp32" and columns in (3072, 11469):
                yield sweep_case(kind, columns, align, shifted=True)
            if kind == "fp32" and columns in (160, 3072, 11469, 40000):
                yield sweep_case(kind, columns, 8, shifted=False, stored="u16")
            if columns in (464, 2048, 11469, 40000):
                yield minima_case(kind, columns, span=False)
            if kind == "fp32" and columns == 11469:
                yield minima_case(kind, columns, span=True)
        for stored in (kind,) if kind == "fp64" else (kind, "u16"):
            yield column_case(kind, stored)
        if kind == "fp32":
            yield with_ones(sweep_case(kind, 20, 4, shifted=False), "rows_per_program")
        yield from small_cases(kind)


def blocks(columns: int) -> int:
    return 1 << (-(-columns // COLUMN_BLOCK) - 1).bit_length()


def sweep_case(
    kind: str, columns: int, align: int, *, shifted: bool, stored: str | None = None
) -> AotCase:
    tile = Tile(columns, DTYPES[kind], shifted=shifted, vector=8 if stored else None)
    keep = stored is None and tile.keeps
    stored = stored or kind
    p = f"*{kind}"
    width = tile.parts * tile.block
    name = f"sinkhorn_sweep/{kind}/{columns}/{stored}" + ("/shifted" if shifted else "")
    constants = RUN | {
        "CONVERGED": 0,
        "COLUMN_BLOCK": COLUMN_BLOCK,
        "BLOCKS": blocks(columns),
        "ALIGN": align,
        "SHIFTED": shifted,
        "KEEP": keep,
        "HELD": tile.held,
    }
    return AotCase(
        name + ("" if tile.held else "/streamed"),
        sinkhorn_sweep.sinkhorn_sweep_kernel,
        f"*{stored} *i64 *i64 *fp64 *fp64" + f" {p}" * 6 + f" *fp16 {p} {p} {p} {p} {p} *i32 i32",
        lambda lanes: constants | tile.constants() | tile.kept_constants(),
        tile.options,
        elements=tile.rows * width // (32 * tile.warps),
        kept_elements=math.prod(tile.kept) // (32 * tile.warps) if keep else 0,
        targets=FEW if kind == "fp64" else AotCase._field_defaults["targets"],
    )


# Multiprocessors, and bytes of shared memory of one and of a program at most: A100, H200, B200.
DEVICES = {
    "sm_80": (108, 164 << 10, 163 << 10),
    "sm_90": (132, 228 << 10, 227 << 10),
    "sm_100": (148, 228 << 10, 227 << 10),
}
RESIDENT = ((1, 576, 464), (64, 576, 464), (1, 4096, 3072), (7, 300, 33), (2, 40, 12000))


def device(target: str) -> Device:
    processors, shared, of_program = DEVICES[target]
    found = Device(torch.device("cuda"), processors=processors)
    return replace(found, shared=shared, shared_program=of_program)


def resident_cases() -> Iterator[AotCase]:
    """What stays on a multiprocessor: every kind of storage, on every device that can."""
    for target in DEVICES:
        for storage in ("exact", "u16"):
            for count, n, m in RESIDENT:
                division = choose([(n, m)] * count, torch.float32, storage, device(target))
                if division is not None:
                    yield resident_case(target, f"{count}x{n}x{m}/{storage}", division)


def resident_case(target: str, name: str, division: Division) -> AotCase:
    store = ("exact", "levels", "kept")[division.store]
    constants = {
        "CONVERGED": 0,
        "MAX_ITER": 1,
        "INFEASIBLE": 2,
        "INVALID": 3,
        "TOO_COARSE": TOO_COARSE,
        "COARSEST": 2621.4,
        "FAR": far_potential(torch.float32),
        "MOMENTUM": True,
        "ALIGN": 4,
    }
    return AotCase(
        f"resident/{name}/{store}/{target}",
        resident_kernel,
        "*fp32 *i64 *fp64 *fp64 *i32 *fp64 *fp64 *fp64" + " *fp32" * 10 + " *fp64 *fp64 i32 i32",
        lambda lanes: constants | division.constants(),
        lambda lanes: division.options(),
        elements=division.rows * division.width // (32 * division.warps),
        kept_elements=division.rows * division.width // (32 * division.warps),
        targets=(target,),
    )


def minima_case(kind: str, columns: int, *, span: bool) -> AotCase:
    tile = Tile(columns, DTYPES[kind])
    p = f"*{kind}"
    constants = {"INFEASIBLE": 2, "INVALID": 3, "SPAN": span, "HELD": tile.held}
    constants["ALIGN"] = 16 // DTYPES[kind].itemsize
    return AotCase(
        f"minima/{kind}/{columns}" + ("/span" if span else "") + ("" if tile.held else "/streamed"),
        sinkhorn_prepare.minima_kernel,
        f"{p} *i64 *i64 *fp64 *fp64 {p} {p} {p} *i32 i32",
        lambda lanes: constants | tile.constants(),
        lambda lanes: {"num_warps": tile.num_warps(lanes)},
        elements=tile.rows * tile.parts * tile.block // (32 * tile.warps),
        targets=FEW,
    )


def column_case(kind: str, stored: str) -> AotCase:
    p = f"*{kind}"
    constants = RUN | {
        "BLOCKS": 128,
        "BP": sinkhorn_columns.PROGRAM_BLOCK,
        "BC": COLUMN_BLOCK,
        "MOMENTUM": True,
        "KEEP": kind == stored == "fp32",
        "FAR": far_potential(DTYPES[kind]),
    }
    return AotCase(
        f"sinkhorn_column/{kind}/{stored}",
        sinkhorn_columns.sinkhorn_column_kernel,
        f"*{stored} *i64 *i64 *fp64" + f" {p}" * 15 + " *i32 i32",
        lambda lanes: constants,
        four,
    )


def small_cases(kind: str) -> Iterator[AotCase]:
    p = f"*{kind}"
    codes = {"INFEASIBLE": 2, "INVALID": 3}
    many = {"BP": sinkhorn_prepare.MANY, "BC": COLUMN_BLOCK}
    ends = RUN | codes | {"CONVERGED": 0, "MAX_ITER": 1, "COLUMN_BLOCK": COLUMN_BLOCK}
    kernels = [
        (
            sinkhorn_prepare.begin_kernel,
            f"*i64 *i64 *i64 *fp64 *fp64 *i32 *fp64 *fp64 {p} {p} {p} {p} {p} *i32 i32 i32",
            {"INFEASIBLE": 2, "SPAN": kind == "fp32"} | many,
        ),
        (
            sinkhorn_prepare.start_kernel,
            f"*i64 *i64 *fp64 *fp64 *fp64 {p} {p} {p} {p} {p}",
            {"SHIFTED": True, "BC": COLUMN_BLOCK},
        ),
        (
            sinkhorn_finish.finish_kernel,
            f"*i64 *i64 *i64 *fp64 *fp64 *fp64 {p} {p} {p} {p} {p} *fp64 *fp64 *i32 i32 i32 i32",
            ends | {"SHIFTED": True, "BLOCKS": 128, "BR": sinkhorn_prepare.MANY},
        ),
    ]
    if kind == "fp32":
        rows = {"BR": sinkhorn_prepare.ROWS, "BC": sinkhorn_prepare.COLUMNS}
        types = f"{p} *i64 *u16 *i64 {p} {p} *fp64 *fp64 {p} i32"
        kernels.append((sinkhorn_prepare.store_linear_kernel, types, rows))
    for function, types, constants in kernels:
        name = function.fn.__name__.removesuffix("_kernel")
        yield AotCase(
            f"{name}/{kind}", function, types, lambda lanes, c=constants: c, four, targets=FEW
        )
