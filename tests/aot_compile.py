"""Compiles every shipped kernel configuration for every target, without a GPU.

Run as a script (the interpreter must not be on); prints one JSON line per kernel with what the
vendor's tools say about registers and spills.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dotresize.kernels import l1_cost, sinkhorn, sinkhorn_sweep
from dotresize.reference import TOKEN_BLOCK

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(function, types, constants, target, num_warps):
    """Compile with pointers aligned to 16 bytes, as torch allocates them."""
    names = function.arg_names
    types = dict(zip([n for n in names if n not in constants], types.split(), strict=True))
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def cases():
    """(name, function, types of the non-constexpr arguments, constants, warps)."""
    for config_name, c in l1_cost.CONFIGS.items():
        for kind in ("fp32", "fp16", "bf16"):
            for operands in ("y", "targets", "self"):
                yield (
                    f"l1_cost/{config_name}/{kind}/{operands}",
                    l1_cost.l1_cost_kernel,
                    f"*{kind} *{kind} *i64 *fp32 i32 i32 i32 i64 i64 i64 i64",
                    {
                        "HAS_INDEX": operands == "targets",
                        "SYMMETRIC": operands == "self",
                        "ACCUMULATE": True,
                        "TOKEN_BLOCK": TOKEN_BLOCK,
                        "BM": c.block_m,
                        "BN": c.block_n,
                    },
                    c.num_warps,
                )
    running = {"RUNNING": sinkhorn_sweep.RUNNING}
    columns = {"BC": sinkhorn.COLUMN_BLOCK}
    for kind, warps in {"fp32": 4, "fp64": 8}.items():
        p = f"*{kind}"
        for m in (64, 512, 2048, sinkhorn_sweep.MAX_RESIDENT, 2 * sinkhorn_sweep.MAX_RESIDENT):
            rows, block = sinkhorn_sweep.sweep_tile(m)
            resident = m <= sinkhorn_sweep.MAX_RESIDENT
            yield (
                f"sinkhorn_sweep/{kind}/{m}",
                sinkhorn_sweep.sinkhorn_sweep_kernel,
                " ".join([p] * 8 + ["*i32 i32 i32 i32 i32"]),
                running | {"RESIDENT": resident, "BR": rows, "BC": block},
                warps,
            )
        yield (
            f"sinkhorn_reduce/{kind}",
            sinkhorn.sinkhorn_reduce_kernel,
            " ".join([p] * 6 + ["*i32 i32 i32 i32"]),
            running | columns,
            4,
        )
        yield (
            f"sinkhorn_stop/{kind}",
            sinkhorn.sinkhorn_stop_kernel,
            " ".join([p] * 5 + ["*i32 *i32", p, "i32 i32 i32"]),
            running | {"CONVERGED": 0, "MAX_ITER": 1, "BLOCKS": 128},
            4,
        )
        yield (
            f"sinkhorn_update/{kind}",
            sinkhorn.sinkhorn_update_kernel,
            " ".join([p] * 9 + ["*i32 i32 i32 i32"]),
            running | columns | {"TINY": sinkhorn.TINY_COLUMN},
            4,
        )


def resources(kernel) -> dict[str, int]:
    """Registers, bytes spilled to local memory, bytes of shared memory, as built."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

        spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
        return {"registers": field("vgpr_count"), "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}


if __name__ == "__main__":
    for name, function, types, constants, warps in cases():
        for target_name, target in TARGETS.items():
            row: dict = {"kernel": name, "target": target_name}
            try:
                row |= resources(build(function, types, constants, target, warps))
            except Exception as error:  # the report has a row for everything
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
