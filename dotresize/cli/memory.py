"""``--memory``: what it goes together with, and the plan of a run under it."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from dotresize.cli.texts import Texts
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.choose_width import Widths
from dotresize.narrow.options import Options
from dotresize.offload.memory_plan import MemoryPlan, layer_inputs_bytes, parse, plan, shown

logger = logging.getLogger("dotresize")


def check(size: str, model: str, options: Options, others: dict[str, bool]) -> None:
    """Raise ValueError where an option would need the whole model at once.

    others: options of the command line that would, and whether they are given.
    """
    try:
        parse(size)
    except ValueError as error:
        raise ValueError(f"--memory {error}") from None
    if not Path(model).is_dir():
        raise ValueError(f"--memory: reads a model directory by parts, not {model}")
    held = {
        "--search": options.search is True,
        f"--{options.method.spelled}": not options.method.plain,
        "--self-windows": bool(options.self_windows),
        **others,
    }
    for name, given in held.items():
        if given:
            raise ValueError(f"{name}: needs the whole model in memory; leave --memory out")


def make_plan(
    size: str, options: Options, widths: Widths, model: CausalLM, tokens: Tensor, texts: Texts
) -> MemoryPlan:
    """Return the run's plan, which is announced, and which the model's store follows."""
    width = widths.residual or model.width  # --energy finds it later, and no more than this
    inner = widths.inner or model.inner_width
    sensitivity = bool(options.meant("sensitivity")) and widths.residual != model.width
    try:
        evaluated = sum(windows.numel() for windows in texts.windows.values())
        found = plan(
            *(model, tokens, width, inner, options.batch_windows, parse(size), evaluated),
            sensitivity=sensitivity,
            layer_widths=options.layer_widths,
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    model.store.activations = found.activations
    if sensitivity:
        kept = layer_inputs_bytes(model, tokens.numel())
        logger.info("sensitivity: %s in temporary files (TMPDIR)", shown(kept))
    device = f", {shown(found.device)} of the device" if found.device else ""
    logger.info(
        "memory: a peak of %s expected%s; activations on the %s",
        *(shown(found.host), device, found.activations),
    )
    return found
