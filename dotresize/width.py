"""What a requested width becomes: one that loaders accept."""

from __future__ import annotations

import math


def choose_width(asked: float, width: int, divisor: int) -> int:
    """The new residual width for what a user asked.

    A number up to 1 is a fraction of ``width``, rounded to a multiple of lcm(divisor, p) for the
    largest power of two p up to 256 that has such a multiple within 2 % (GPU and k-quant kernels
    want large powers of two); 1 is the width itself. A larger number is absolute and taken
    exactly.

    Args:
        asked: > 0.
        width: the model's residual width.
        divisor: what the loader requires the width to be a multiple of.

    Raises:
        ValueError: not positive, larger than the model's, not a whole number of channels, or not
            a multiple of the divisor.
    """
    if not math.isfinite(asked) or asked <= 0:
        raise ValueError(f"width {asked:g}: must be a fraction in (0, 1] or a number of channels")
    if asked == 1:
        return width
    if asked > 1:
        if asked != int(asked) or asked > width or int(asked) % divisor:
            raise ValueError(
                f"width {asked:g}: must be a whole number up to the model's {width}"
                + (f", a multiple of {divisor} for its loader" if divisor > 1 else "")
            )
        return int(asked)
    wanted = asked * width
    for power in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        step = math.lcm(divisor, power)
        nearest = min(max(1, round(wanted / step)) * step, width // step * step)
        if nearest and abs(nearest - wanted) <= 0.02 * wanted:
            return nearest
    nearest = round(wanted / divisor) * divisor
    if not nearest:
        raise ValueError(f"width {asked:g}: that is under {divisor} channels, the least possible")
    return nearest
