"""``--memory``: what it goes together with, and the plan of a run under it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from dotresize.files import Files
from dotresize.inputs import Texts
from dotresize.memory import Plan, parse, plan, shown
from dotresize.models import architecture_of
from dotresize.options import Options
from dotresize.resident import shelf_of
from dotresize.width import choose_inner_width, choose_width, residual_share

logger = logging.getLogger("dotresize")


def check(args: argparse.Namespace, options: Options) -> None:
    """ValueError where an option would need the whole model at once."""
    try:
        parse(args.memory)
    except ValueError as error:
        raise ValueError(f"--memory {error}") from None
    if not Path(args.model).is_dir():
        raise ValueError(f"--memory: reads a model directory by parts, not {args.model}")
    held = {
        "--params": options.params is not None,
        "--method slicegpt": options.method == "slicegpt",
        "--scope location": options.per_location,
        "--self-windows": bool(options.self_windows),
        "--recover": args.recover is not None,
        "--compare": args.compare,
        "--report": args.report is not None,
    }
    for name, given in held.items():
        if given:
            raise ValueError(f"{name}: needs the whole model in memory; leave --memory out")


def make_plan(
    args: argparse.Namespace, options: Options, model: Any, tokens: Tensor, texts: Texts
) -> Plan:
    """The run's plan, announced and handed to the model's shelf."""
    config, architecture = model.config, architecture_of(model.config)
    width = config.hidden_size  # --energy finds it later, and no more than this
    if options.energy is None and not architecture.fixed_residual:
        share = residual_share(options.width, options.ff_width)
        width = choose_width(share, width, architecture.divisor(config))
    inner = choose_inner_width(options.ff_width, config) or architecture.inner_width(config)
    budget = parse(args.memory)
    try:
        longest = max((windows.numel() for windows in texts.windows.values()), default=0)
        found = plan(model, tokens, width, inner, options.batch_windows, budget, longest)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    shelf = shelf_of(model)
    assert isinstance(shelf, Files)
    shelf.place = found.place
    device = f", {shown(found.device)} of the device" if found.device else ""
    logger.info(
        "memory: a peak of %s expected%s; activations on the %s",
        *(shown(found.host), device, found.place),
    )
    return found
