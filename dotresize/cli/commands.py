"""What each verb of the command line does, but for those with a file of their own."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

import torch

import dotresize
from dotresize import checkpoint, distributed
from dotresize.accounting import check_weights
from dotresize.cli.checks import check_files, check_positions, check_windows, find_device
from dotresize.cli.choices import TextChoices, chosen
from dotresize.cli.compress import compress, sweep
from dotresize.cli.export import export
from dotresize.cli.merge_ff import merge_ff
from dotresize.cli.report import say
from dotresize.cli.texts import evaluation_texts
from dotresize.evaluate import perplexity

logger = logging.getLogger("dotresize")


def run(args: argparse.Namespace) -> int:
    """Run the verb that was given; return its exit code."""
    verbs = {
        "compress": compress,
        "sweep": sweep,
        "merge-ff": merge_ff,
        "eval": _eval,
        "export": export,
        "info": _info,
    }
    distributed.begin()
    if distributed.rank():
        logger.setLevel(logging.ERROR)  # the first process says it
        os.environ["TQDM_DISABLE"] = "1"
    code = verbs[args.verb](args)
    # Not after an error: other processes may wait for what will not come.
    distributed.end()
    return code


def _info(args: argparse.Namespace) -> int:
    import numpy
    import transformers

    versions = {"python": sys.version.split()[0]}
    versions |= {m.__name__: str(m.__version__) for m in (torch, numpy, transformers)}
    backends = dotresize.backends()
    if args.json:
        about = {"dotresize": dotresize.__version__, "backends": backends, "versions": versions}
        say(json.dumps(about, indent=2))
        return 0
    lines = [f"dotresize {dotresize.__version__}"]
    for name, details in backends.items():
        available = details.pop("available")
        what = ", ".join(f"{key} {value}" for key, value in details.items())
        lines.append(f"{name:7} {'' if available else 'not '}available: {what}")
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    say("\n".join(lines))
    return 0


def _eval(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    choices = chosen(TextChoices, args)
    check_windows(choices)
    check_files(choices)
    check_positions(choices, checkpoint.read_config(args.model))
    model, tokenizer = checkpoint.load_with_tokenizer(args.model, device, to_narrow=False)
    check_weights(model.module)
    for name, windows in evaluation_texts(
        choices.fitted(model.config), model, tokenizer
    ).windows.items():
        say(f"{name}  {perplexity(model, windows, desc=name):.4f}")
    return 0
