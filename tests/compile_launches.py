"""Compiles what the launchers really ask for, without a GPU, and runs nothing of it.

Ahead-of-time cases (aot_compile.py) name types and constants by hand; here the launchers take CPU
tensors, and Triton finds them by its rules: which integers fit 32 bits, are multiples of 16, or 1.
Run as a script (the interpreter must not be on); prints the kernels that were launched, then fails
with the first that does not compile.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # its default is to change

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dotresize.kernels import l1_backward, l1_cost, l1_quantize, sinkhorn
from dotresize.kernels.sinkhorn_device import Device
from dotresize.ops.constants import MOMENTUM, PLAIN, L1Gradients, L1Operands, SinkhornBatch
from dotresize.ops.l1_u8 import quantisation

launched: Counter[str] = Counter()


class Driver:
    """Of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only() -> None:
    run = JITFunction.run

    def compiled(function, *arguments, grid, warmup, **options):
        launched[function.fn.__name__] += 1
        return run(function, *arguments, grid=grid, warmup=True, **options)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compiled
    # Nothing writes what is read back: statuses and minima are to be harmless.
    torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros
    # The resident solver leaves everything unsolved, so that the launched one is asked, too.
    sinkhorn.device_of = lambda place: Device(place, processors=132)
    warnings.filterwarnings("ignore", message="programs of one launch waited")


def l1(batch: int, tokens: int, n: int, m: int, divisor: float | None) -> None:
    x, y = torch.randn(batch, tokens, n), torch.randn(batch, tokens, m)
    index = torch.randint(n, (batch, m))
    for columns, chosen in ((y, None), (None, index), (None, None)):
        width = n if columns is None and chosen is None else m
        out = torch.empty(batch, n, width)
        l1_cost.l1_cost(L1Operands(x, columns, chosen, out, accumulate=False, divisor=divisor))
        gradient = torch.randn(batch, n, width)
        l1_backward.l1_backward(L1Gradients(x, columns, chosen, gradient, divisor or 1.0), True)
    groups = -(-tokens // l1_cost.GROUP)
    x, y = (torch.randn(batch, groups * l1_cost.GROUP, k).half() for k in (n, m))
    for columns, width in ((y, m), (None, n)):
        out = torch.empty(batch, n, width)
        work = L1Operands(x, columns, None, out, accumulate=True, divisor=divisor)
        l1_cost.l1_cost(work, torch.ones(batch, groups))
        plan = quantisation(*l1_quantize.ranges(x))
        if plan.token.shape[1] and divisor is None:
            words = (None if v is None else l1_quantize.quantize(v, plan) for v in (x, columns))
            x_words, y_words = words
            work = work._replace(x=x_words, y=y_words)
            l1_cost.l1_cost(work, plan.steps)


def solve(
    shapes: list[tuple[int, int]], storage: str, dtype: torch.dtype, acceleration: int
) -> None:
    count = len(shapes)
    a, b = (
        torch.cat([torch.full((shape[axis],), 1 / shape[axis]).double() for shape in shapes])
        for axis in (0, 1)
    )
    numbers = [torch.full((count,), value, dtype=torch.float64) for value in (0.1, 1e-5)]
    batch = SinkhornBatch(
        labels=range(count),
        costs=[torch.rand(shape, dtype=dtype) for shape in shapes],
        a=a,
        b=b,
        g=torch.zeros_like(b),
        reg=numbers[0],
        tol=numbers[1],
        acceleration=torch.full((count,), acceleration),
        max_iter=2,
    )
    sinkhorn.sinkhorn(batch, storage)


def main() -> int:
    compile_only()
    for shape in ((1, 1, 1, 1), (2, 7, 5, 3), (1, 300, 577, 469), (1, 1, 64, 128), (3, 5, 1, 40)):
        for divisor in (None, 3.0):
            l1(*shape, divisor)
    ragged = [(12, 20), (4, 130), (7, 20), (1, 1)]
    large = [(4096, 3072)]
    for shapes in ([(1, 1)], ragged, large, [(2, 13000)]):
        solve(shapes, "exact", torch.float32, PLAIN)
        solve(shapes, "u16", torch.float32, MOMENTUM)
    for shapes in (ragged, [(2, 3000)]):
        solve(shapes, "exact", torch.float64, MOMENTUM)
    sys.stdout.write(" ".join(sorted(launched)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
