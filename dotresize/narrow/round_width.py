"""The widths that hardware takes: one rule for the residual and the feed-forward width.

Rows of weights are what GPU kernels and quantisation formats cut into blocks: llama.cpp's k-quants
want 256 numbers, its simpler types and most int4 kernels 32, tensor cores 64 or 128. So a width is
the multiple of 256, 128, 64 or 32 that is near what was asked: of the largest of these with a
multiple within ``WITHIN``. Where none is so near, it is the nearest multiple of 32, or of 8 below
128 channels, where blocks of 32 would be too coarse.

A share is met from both sides. A limit, as a budget of parameters is, is met from one side, and
what rounding leaves of it is lost: near 60 % of SmolLM2-135M's feed-forward, a width that is 1 %
less has 2 % more excess. So a limit is met within ``WITHIN_LIMIT``.
"""

from __future__ import annotations

import math
from typing import Literal

# The multiples that are tried, the best first, and how far from what was asked they may be.
STEPS = (256, 128, 64, 32)
WITHIN = 0.06
WITHIN_LIMIT = 0.02
# Below so many channels a width need only be a multiple of this.
FEW, FEW_STEP = 128, 8

Towards = Literal["nearest", "up", "down"]


def round_width(
    wanted: float,
    full: int,
    *,
    towards: Towards = "nearest",
    multiple_of: int | None = None,
    times: int = 1,
    divisor: int = 1,
) -> int:
    """Return the width near ``wanted`` that hardware takes, at most ``full``.

    Args:
        wanted: > 0. If it is less than ``full``, so is the result, unless it is rounded up.
        full: the width that there is, which is always a width to be had.
        towards: "up" for at least what was asked, "down" for at most.
        multiple_of: instead of the rule: the result is a multiple of this.
        times: the result is a multiple of this times the multiple chosen (tensor parallelism).
        divisor: the result is a multiple of this, too.
    """
    if wanted >= full:
        return full
    if multiple_of is not None:
        return _near(wanted, full, math.lcm(multiple_of * times, divisor), towards) or full
    within = WITHIN if towards == "nearest" else WITHIN_LIMIT
    for step in STEPS:
        found = _near(wanted, full, math.lcm(step * times, divisor), towards)
        if found and abs(found - wanted) <= within * wanted:
            return found
    last = STEPS[-1] if wanted >= FEW else FEW_STEP
    for step in (last, FEW_STEP, 1):
        found = _near(wanted, full, math.lcm(step * times, divisor), towards)
        if found:
            return found
    return full


def _near(wanted: float, full: int, step: int, towards: Towards) -> int:
    """Return the multiple of ``step`` nearest to ``wanted`` in a direction, or 0."""
    below = math.floor(wanted / step) * step
    above = math.ceil(wanted / step) * step
    if towards == "down":
        return below
    if towards == "up":
        return above if above <= full else 0
    fitting = [width for width in (below, above) if 0 < width < full]
    return min(fitting, key=lambda width: (abs(width - wanted), -width), default=0)
