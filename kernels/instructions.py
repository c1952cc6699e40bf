"""This module names instructions that no expression compiles to, in each vendor's assembler.

NVIDIA says whether the kernel is compiled for one of its GPUs, and not for one of AMD's. The
interpreter has expressions for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.kernels.gluon_compat import gl, jit

# Multiplied with any difference above 2^-128 it is at least 1/2.
STEEP = tl.constexpr(2.0**127)


if triton.knobs.runtime.interpret:

    @jit
    def add_distances_of_bytes(b_x, b_y, b_sum, NVIDIA: tl.constexpr):
        bits = (8 * tl.arange(0, 4))[None, None, :]
        b_distances = tl.abs((b_x[:, :, None] >> bits & 255) - (b_y[:, :, None] >> bits & 255))
        return b_sum + tl.sum(b_distances, 2)

    @jit
    def step_up(b_difference, NVIDIA: tl.constexpr):
        return gl.where(b_difference > 0, 1.0, gl.where(b_difference < 0, 0.0, 0.5))

else:

    @jit
    def add_distances_of_bytes(b_x, b_y, b_sum, NVIDIA: tl.constexpr):
        """Return ``b_sum + sum_k |x_k - y_k|`` over the four bytes of 32-bit words."""
        CODE: tl.constexpr = (
            "vabsdiff4.u32.u32.u32.add $0, $1, $2, $3;" if NVIDIA else "v_sad_u8 $0, $1, $2, $3"
        )
        REGISTERS: tl.constexpr = "=r,r,r,r" if NVIDIA else "=v,v,v,v"
        return gl.inline_asm_elementwise(
            CODE, REGISTERS, [b_x, b_y, b_sum], dtype=gl.int32, is_pure=True, pack=1
        )

    @jit
    def step_up(b_difference, NVIDIA: tl.constexpr):
        """Return 1 where a difference is positive, 1/2 where it is 0, and 0 where it is negative.

        Between -2^-128 and 2^-128 the step is a slope.
        """
        if NVIDIA:
            return gl.inline_asm_elementwise(
                "fma.rn.sat.f32 $0, $1, 0f7F000000, 0f3F000000;",
                "=f,f",
                [b_difference],
                dtype=gl.float32,
                is_pure=True,
                pack=1,
            )
        return gl.minimum(gl.maximum(b_difference * STEEP + 0.5, 0.0), 1.0)
