"""What a requested width becomes: one that loaders accept."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch

from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.absorb import resized
from dotresize.narrow.options import Options

logger = logging.getLogger("dotresize")

# What is kept where nobody says how much.
DEFAULT_SIZE = 0.8


def choose_width(asked: float, width: int, divisor: int) -> int:
    """Return the new residual width for what a user asked.

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


def default_size(model: CausalLM, options: Options) -> Options:
    """Return the options with the size that is meant where nobody asked for one; says which."""
    if options.sized:
        return options
    if model.architecture.fixed_residual:
        name = "params" if model.store.whole else "ff_width"
    else:
        name = "params" if options.budgeted and model.store.whole else "width"
    logger.info("no size was asked for: %s %g", name, DEFAULT_SIZE)
    size: dict[str, Any] = {name: DEFAULT_SIZE}
    sized = replace(options, **size)
    if not model.architecture.fixed_residual:
        sized.check()  # of choices that would do nothing at this size
    return sized


def choose_inner_width(asked: float | None, model: CausalLM) -> int | None:
    """Return the inner width of the feed-forward blocks; None where it stays as it is."""
    if asked is None:
        return None
    try:
        width = choose_width(asked, model.inner_width, 1)
    except ValueError as error:
        raise ValueError(f"feed-forward {error}") from None
    return width if width < model.inner_width else None


def check_residual(model: CausalLM, options: Options) -> None:
    """Raise ValueError where the options ask for more than the model's family lets be narrowed."""
    architecture, kind = model.architecture, model.config.model_type
    inner = options.ff_width is not None or options.params is not None
    asked = options.width not in (None, 1.0, model.width) or not inner
    if architecture.fixed_residual and (asked or options.energy is not None):
        raise ValueError(
            f"width: {kind} keeps its residual ({architecture.fixed_residual}); give ff_width or "
            "params alone"
        )
    of_residual = {
        options.method.spelled.partition(" ")[0]: not options.method.default,
        "targets": options.targets is not None,
        "untie": options.untie,
    }
    for name, given in of_residual.items():
        if architecture.fixed_residual and given:
            raise ValueError(f"{name}: {kind} keeps its residual; leave {name} out")
    if not architecture.has_inner_width and options.ff_width is not None:
        raise ValueError("ff_width: experts have no single inner width; give width or params")


def check_config(config: Any, width: int) -> None:
    """Raise ValueError where the model's own config would not be read back with that width."""
    try:
        type(config).from_dict(resized(config, width).to_dict())
    except Exception as error:  # each config has checks, and exceptions, of its own
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"width {width}: {config.model_type} refuses it: {reason}") from error


def width_for_energy(statistics: Statistics, share: float, divisor: int) -> int:
    """Return the smallest width whose principal directions keep ``share`` of the variance.

    The variance is the uncentred second moment of RMS-normalised activations, all locations
    weighing alike: what no other map of that width keeps more of.
    """
    assert statistics.moment is not None
    spectrum = torch.linalg.eigvalsh(statistics.moment.mean(0)).clamp_min(0).flip(0)
    kept = (spectrum.cumsum(0) / spectrum.sum()).clamp_max(1.0)
    # Rounding must not ask for a direction more than the share needs.
    width = int((kept < share - 1e-12).sum()) + 1
    return min(-(-width // divisor) * divisor, len(spectrum))
