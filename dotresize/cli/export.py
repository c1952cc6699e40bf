"""``dotresize export``: write a model directory as a GGUF file, which llama.cpp runs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dotresize import checkpoint, distributed
from dotresize.checkpoint import gguf_file
from dotresize.checkpoint.origin import origin_of
from dotresize.cli.report import say

logger = logging.getLogger("dotresize")


def export(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if distributed.size() > 1:
        raise ValueError("export: runs in one process; run it without torchrun")
    gguf_file.check(args.out, args.type)
    folder, config, tokenizer = checkpoint.parts_of(args.model)
    name = origin_of(args.model).hub_id or folder.resolve().name
    gguf_file.write(folder, config, tokenizer, Path(args.out), args.type, name)
    inner = sorted(set(gguf_file.inner_widths(config)))
    rows = [("width", config.hidden_size), *(("feed-forward width", size) for size in inner)]
    odd = [f"{what} {size}" for what, size in rows if size % gguf_file.BLOCK]
    if odd and args.type in ("q8_0", "q4_0"):
        logger.info(
            "%s: no multiple of %d, so tensors with such rows are f16",
            *(" and ".join(odd), gguf_file.BLOCK),
        )
    size = Path(args.out).stat().st_size
    say(f"{args.out}  {size / 1e6:.1f} MB, {args.type}, {gguf_file.architecture_of(config)}")
    return 0
