"""Compiles every shipped kernel configuration for every target, without a GPU.

Run as a script (the interpreter must not be on); prints one JSON line per kernel and target with
what the vendor's tools say about registers and spills, and, for NVIDIA, what the busiest loop of
the machine code is made of. A word on the command line keeps the kernels that have it in their
name; AOT_TARGETS=sm_90,gfx942 keeps those targets.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # its default is to change

import triton
from aot_cases import cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def build(case, target):
    """Compile with pointers, and strides as the case says, known to be multiples of 16."""
    names = case.function.arg_names
    constants = case.constants(target.warp_size)
    types = dict(zip([n for n in names if n not in constants], case.types.split(), strict=True))
    source = (GluonASTSource if case.function.is_gluon() else ASTSource)(
        fn=case.function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*") or name in case.aligned
        },
    )
    return triton.compile(source, target=target, options=case.options(target.warp_size))


def tool(name: str, kernel, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(NVIDIA_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict:
    """Registers, bytes spilled to local memory, bytes of shared memory, as built."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

        spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
        found = {"registers": field("vgpr_count"), "spilled": spilled, "shared": shared}
        return found | {"sad": len(re.findall("v_sad_u8", text))}
    text = tool("cuobjdump", kernel, "-res-usage")
    registers = int(re.search(r"REG:(\d+)", text)[1])
    code = tool("nvdisasm", kernel, "-c")
    loops = inner_loops(code)
    found: dict = {"registers": registers, "shared": shared}
    found["loop"] = max(loops, key=work, default={})
    # Into registers, anywhere in the kernel.
    found["loads"] = len(re.findall(r"\bLDG\.", code))
    # What is spilled around the loop costs nothing that counts.
    found["spilled"] = spills(found["loop"])
    if kept := [loop for loop in loops if is_cheap(loop)]:
        # The launched sweep has a longer one for the first time, the resident one a shorter.
        found["kept"] = sorted(kept, key=work)
        found["spilled"] = max(found["spilled"], *map(spills, kept))
    return found


def spills(loop: dict[str, int]) -> int:
    return sum(count for name, count in loop.items() if name.startswith(("LDL", "STL")))


def is_cheap(loop: dict[str, int]) -> bool:
    """Return whether a loop reads the kept plan: float16 is unpacked, and nothing exponentiated.

    But for the weights of rows: few.
    """
    entries = sum(count for name, count in loop.items() if name.startswith("HADD2.F32"))
    exponentials = loop.get("MUFU.EX2", 0)
    return entries > 2 * exponentials and entries > 0


def work(loop: dict[str, int]) -> int:
    arithmetic = re.compile(r"FADD|FFMA|FMUL|HADD2|HFMA2|MUFU|DADD|DFMA")
    return sum(number for name, number in loop.items() if arithmetic.match(name))


def inner_loops(code: str) -> list[dict[str, int]]:
    """Instructions of every innermost loop, by name."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            found.append((labels[jump[1]], i))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    instruction = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)")
    return [
        dict(Counter(m[1] for line in lines[first : last + 1] if (m := instruction.search(line))))
        for first, last in inner
    ]


def row(task: tuple[str, str]) -> dict:
    name, target = task
    case = CASES[name]
    found: dict = {"kernel": case.name, "target": target, "elements": case.elements}
    found["kept_elements"] = case.kept_elements
    try:
        found |= resources(build(case, TARGETS[target]))
    except Exception as error:  # the report has a row for everything
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


CASES = {case.name: case for case in cases()}  # kernels cannot be pickled; their names can

if __name__ == "__main__":
    wanted = [name for name in CASES if all(word in name for word in sys.argv[1:])]
    targets = os.environ.get("AOT_TARGETS", ",".join(TARGETS)).split(",")
    tasks = [(n, t) for n, t in itertools.product(wanted, targets) if t in CASES[n].targets]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for found in pool.map(row, tasks, chunksize=4):
            sys.stdout.write(json.dumps(found | {"triton": triton.__version__}) + "\n")
            sys.stdout.flush()
