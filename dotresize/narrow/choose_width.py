"""What a user's choices make of a model's widths, decided from its config before anything runs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.models.causal_lm import CausalLM
from dotresize.models.layer_widths import differ
from dotresize.models.resized import becomes_mistral, has_biases, resized
from dotresize.narrow.allocation import check_room, multiple_for
from dotresize.narrow.budget import inner_without_search, residual_step
from dotresize.narrow.options import Inner, Options
from dotresize.narrow.round_width import FEW, FEW_STEP, STEPS, round_width
from dotresize.narrow.targets import check_kept

logger = logging.getLogger("dotresize")

# What is kept where nobody says how much.
DEFAULT_SIZE = 0.8


@dataclass(frozen=True)
class Widths:
    """The widths of a narrowed model.

    Attributes:
        residual: None where the variance or a search decides it later.
        inner: of the feed-forward blocks; None where it stays, or a search decides it later.
    """

    residual: int | None
    inner: int | None


def choose_widths(model: CausalLM, options: Options) -> Widths:
    """Return the widths that the options ask for; ValueError where the model cannot have them.

    model: its config and its names are enough; see ``checkpoint.outline``.
    """
    check_residual(model, options)
    check_parallel(model, options)
    alone = None if options.params is None else inner_without_search(model, options)
    inner = choose_inner_width(model, options)
    if alone is not None and alone < model.inner_width:
        inner = alone
    equal = by_layer(model, inner)
    if options.layer_widths and equal is not None:
        full = model.inner_widths
        check_room(full, sum(equal), multiple_for(full, options))
    if alone is not None:
        return Widths(model.width, inner)
    if options.energy is not None or options.params is not None:
        return Widths(None, inner)
    width = choose_width(model, options)
    if isinstance(options.targets, Tensor):
        check_kept(options.targets, model.width, width)
    check_config(model.config, width)
    return Widths(width, inner)


def residual_stays(model: CausalLM, options: Options) -> bool:
    """Return whether it is known beforehand that the residual keeps its width."""
    if model.architecture.fixed_residual:
        return True
    return choose_widths(model, options).residual == model.width


def choose_width(model: CausalLM, options: Options) -> int:
    """Return the residual width that the options ask for, rounded as hardware wants it.

    A number up to 1 is a share of the model's width, rounded by narrow/round_width.py; 1 is all of
    it. A larger number is taken exactly.

    Raises:
        ValueError: not positive, larger than the model's, not a whole number of channels, or no
            multiple of what the options or the model ask for; says which widths are near.
    """
    asked = 1.0 if options.width is None else options.width
    found = _chosen("width", asked, model.width, options, divisor=model.architecture.width_multiple)
    check_type(model, found, options)
    return found


def choose_inner_width(model: CausalLM, options: Options) -> int | None:
    """Return the inner width of the feed-forward blocks; None where it stays as it is."""
    if options.ff_width is None:
        return None
    times = options.tensor_parallel
    found = _chosen("ff_width", options.ff_width, model.inner_width, options, times=times)
    return found if found < model.inner_width else None


def by_layer(model: CausalLM, inner: int | None) -> Inner:
    """Return a feed-forward width as that of every layer, none wider than it was."""
    if inner is None or not model.architecture.has_inner_width:
        return None
    widths = model.inner_widths
    return [min(inner, own) for own in widths] if inner < max(widths) else None


def _chosen(
    name: str, asked: float, full: int, options: Options, *, times: int = 1, divisor: int = 1
) -> int:
    multiple = options.multiple_of
    if not math.isfinite(asked) or asked <= 0:
        raise ValueError(f"{name} {asked:g}: must be a share in (0, 1] or a number of channels")
    if asked <= 1:
        rule: dict[str, Any] = {"multiple_of": multiple, "times": times, "divisor": divisor}
        found = round_width(asked * full, full, **rule)
        if asked < 1 and found == full and full > 1:
            least = math.lcm((multiple or FEW_STEP) * times, divisor)
            raise ValueError(
                f"{name} {asked:g}: there is no multiple of {least} below {full}; give an exact "
                "number, or a smaller multiple_of"
            )
        return found
    step = math.lcm((multiple or 1) * times, divisor)
    if asked == full:
        return full
    if asked != int(asked) or asked > full:
        raise ValueError(f"{name} {asked:g}: must be a whole number up to the model's {full}")
    if int(asked) % step:
        raise ValueError(
            f"{name} {asked:g}: must be a multiple of {step}, such as {nearest(asked, full, step)}"
        )
    return int(asked)


def nearest(asked: float, full: int, step: int) -> str:
    """Return the multiples of a step on both sides of a width, in words."""
    below, above = int(asked) // step * step, -(-int(asked) // step) * step
    around = [str(width) for width in dict.fromkeys((below, above)) if 0 < width <= full]
    return " or ".join(around) or str(full)


def check_type(model: CausalLM, width: int, options: Options) -> None:
    """Raise ValueError where a width asks for another model type, and must not or cannot."""
    config = model.config
    if not becomes_mistral(config, width):
        return
    heads = config.num_attention_heads
    near = nearest(width, model.width, heads)
    if has_biases(config):
        raise ValueError(
            f"width {width}: a llama's is a multiple of its {heads} heads, such as {near}; this "
            "one has biases, which mistral has not"
        )
    if options.keep_type:
        raise ValueError(
            f"width {width}: a llama's is a multiple of its {heads} heads, such as {near}; without "
            "keep_type it is written as mistral, with the same function"
        )


def default_size(model: CausalLM, options: Options, *, whole: bool | None = None) -> Options:
    """Return the options with the size that is meant where nobody asked for one; says which.

    whole: whether the model will be in memory; what its store says if not given.
    """
    if options.sized:
        return options
    whole = model.store.whole if whole is None else whole
    name = "ff_width" if model.architecture.fixed_residual else "width"
    if options.budgeted:
        budget = replace(options, params=DEFAULT_SIZE)
        alone = inner_without_search(model, budget) is not None
        if not whole and not alone and options.search is not None:
            raise ValueError("search: none can be had of a model that stays in its files")
        if whole or alone:
            name = "params"
    logger.info("no size was asked for: %s %g", name, DEFAULT_SIZE)
    size: dict[str, Any] = {name: DEFAULT_SIZE}
    sized = replace(options, **size)
    if not model.architecture.fixed_residual:
        sized.check()  # of choices that would do nothing at this size
    return sized


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
    for name in [*options.of_residual, *(["untie"] if options.untie else [])]:
        if architecture.fixed_residual:
            raise ValueError(f"{name}: {kind} keeps its residual; leave {name} out")
    if not architecture.has_inner_width and options.ff_width is not None:
        raise ValueError("ff_width: experts have no single inner width; give width or params")
    if options.method.scope == "location" and differ(model.inner_widths):
        raise ValueError(
            f"{options.method.spelled}: takes models whose layers have feed-forwards of one width"
        )
    if not architecture.has_inner_width and options.layer_widths:
        raise ValueError("layer_widths: experts have no single inner width; give width or params")


def check_parallel(model: CausalLM, options: Options) -> None:
    """Raise ValueError where a model cannot be split over so many devices."""
    heads = model.config.num_attention_heads
    if heads % options.tensor_parallel:
        raise ValueError(
            f"tensor_parallel {options.tensor_parallel}: must divide the model's {heads} heads"
        )
    if options.tensor_parallel > 1 and not model.architecture.has_inner_width:
        raise ValueError("tensor_parallel: experts have no single inner width")


def check_config(config: Any, width: int) -> None:
    """Raise ValueError where the model's own config would not be read back with that width."""
    new = resized(config, width)
    try:
        type(new).from_dict(new.to_dict())
    except Exception as error:  # each config has checks, and exceptions, of its own
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"width {width}: {config.model_type} refuses it: {reason}") from error


def width_for_energy(statistics: Statistics, model: CausalLM, options: Options) -> int:
    """Return the smallest width whose principal directions keep a share of the variance.

    It is rounded up to what hardware takes. The variance is the uncentred second moment of
    RMS-normalised activations, all locations weighing alike: what no other map of that width keeps
    more of.
    """
    assert statistics.moment is not None
    assert options.energy is not None
    spectrum = torch.linalg.eigvalsh(statistics.moment.mean(0)).clamp_min(0).flip(0)
    kept = (spectrum.cumsum(0) / spectrum.sum()).clamp_max(1.0)
    # Rounding must not ask for a direction more than the share needs.
    width = int((kept < options.energy - 1e-12).sum()) + 1
    return round_width(
        width,
        model.width,
        towards="up",
        multiple_of=options.multiple_of,
        divisor=residual_step(model, options),
    )


def announce(model: CausalLM, widths: Widths, options: Options) -> None:
    """Say which widths were chosen, under which type the result is saved, and what it costs."""
    changes: list[tuple[str, int, int, float]] = []
    if widths.residual is not None and options.width is not None:
        changes.append(("width", model.width, widths.residual, options.width))
    if widths.inner is not None and options.ff_width is not None:
        changes.append(("feed-forward width", model.inner_width, widths.inner, options.ff_width))
    if options.layer_widths and not options.pad:
        logger.info(
            "layer widths: transformers does not load feed-forwards of different widths yet; "
            "dotresize.load does, so does llama.cpp where dotresize export takes the model's type, "
            "and everything with pad"
        )
    for change in changes:
        logger.info("%s %d -> %d (asked for %g)", *change)
    # Layers of different widths have multiples of their own.
    announce_found(model, widths.residual, None if options.layer_widths else widths.inner)


def announce_found(model: CausalLM, residual: int | None, inner: int | None) -> None:
    """Say under which type widths are saved, and what those cost that are no multiple of 32."""
    if residual is not None and becomes_mistral(model.config, residual):
        logger.info(
            "width %d is no multiple of the %d heads, which LlamaConfig asks for: saved as mistral "
            "without sliding window, the same function",
            *(residual, model.config.num_attention_heads),
        )
    for name, old, new in (
        ("width", model.width, residual),
        ("feed-forward width", model.inner_width, inner),
    ):
        if new is not None and new < old and new % STEPS[-1]:
            near = round_width(new, old)
            advice = f"; {near} would not" if near != new and near % STEPS[-1] == 0 else ""
            logger.info(
                "%s %d is no multiple of %d: in llama.cpp such rows stay in 16 bits (4-bit files "
                "nearly twice as large, and slower), and int4 kernels pad or refuse them%s",
                *(name, new, STEPS[-1], advice if old >= FEW else ""),
            )
