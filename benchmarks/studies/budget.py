"""What the budget of ``--params`` chooses, by the number of calibration windows and their seed.

    python -m benchmarks.studies.budget --out FILE

SmolLM2-135M, the texts of the demo, windows of 512 tokens and as many of its own. A choice
that hangs on the windows is none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from dotresize.calibration.text import random_windows, tokenize
from dotresize.checkpoint import load_with_tokenizer
from dotresize.compression import make_options
from dotresize.narrow.calibrate import with_own_text
from dotresize.narrow.search import split_budget

from ..demo.texts import model_file, write_texts
from ..rows import append, where

WINDOW = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[12, 24], help="(12 24)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(0 1)")
    parser.add_argument("--params", type=float, default=0.8, help="share to keep (0.8)")
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    args = parser.parse_args()
    model, tokenizer = load_with_tokenizer(str(model_file()), torch.device("cpu"), to_narrow=True)
    with tempfile.TemporaryDirectory() as folder:
        calibration, _ = write_texts(Path(folder))
        streams = [tokenize(path, tokenizer) for path in calibration]
    for count in args.windows:
        for seed in args.seeds:
            start = time.perf_counter()
            options = make_options(params=args.params, search=True, seed=seed)
            tokens = random_windows(streams, count, WINDOW, seed)
            tokens, _ = with_own_text(model, tokens, options)
            split = split_budget(model, tokens, options, len(tokens) - count)
            row = {"params": args.params, "windows": count, "seed": seed}
            row |= {"width": split.width, "inner": split.inner, "dropped": list(split.dropped)}
            row |= split.details()
            row["seconds"] = round(time.perf_counter() - start, 1)
            append(args.out, [where(torch.get_num_threads()) | row])
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
