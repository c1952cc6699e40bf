"""The error of a faster precision on real activations.

    python -m benchmarks.studies.precision u8|fp16

The residual stream of the demo's model at every norm, on the demo's calibration text: 4096 tokens
of each location, unnormalised, massive activations included. "fp16" is the Triton kernel's; where
no GPU is, set TRITON_INTERPRET=1, and 128 of the neurons are taken. With ``--out FILE`` one JSON
line per location is appended.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dotresize import l1_cost
from dotresize.calibration.text import random_windows, tokenize
from dotresize.checkpoint import load_with_tokenizer

from ..demo.texts import model_file, write_texts
from ..rows import append, where
from .activations import residual_stream

WINDOWS, WINDOW = 8, 512


def real_activations() -> Iterator[Tensor]:
    """Return the demo model's residual stream at every norm, (4096, 576) each."""
    logging.basicConfig(level=logging.ERROR)
    model, tokenizer = load_with_tokenizer(str(model_file()), torch.device("cpu"), to_narrow=False)
    with tempfile.TemporaryDirectory() as folder:
        calibration, _ = write_texts(Path(folder))
        streams = [tokenize(path, tokenizer) for path in calibration]
    windows = random_windows(streams, WINDOWS, WINDOW, seed=0)
    with torch.no_grad():
        yield from residual_stream(model.module, windows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("precision", choices=("u8", "fp16"))
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    arguments = parser.parse_args()
    precision, out = arguments.precision, arguments.out
    backend = "triton" if precision == "fp16" else "auto"
    device = "cuda" if precision == "fp16" and torch.cuda.is_available() else "cpu"
    os.environ["TQDM_DISABLE"] = "1"
    about = where(torch.get_num_threads()) | {"model": model_file().stem}
    rows = []
    for number, x in enumerate(real_activations()):
        if precision == "fp16" and device == "cpu":
            x = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:128]]
        exact = l1_cost(x)
        fast = l1_cost(x.to(device), precision=precision, backend=backend).cpu()
        used = ~torch.eye(len(exact), dtype=torch.bool)
        error = ((fast - exact).abs() / exact)[used]
        row = {"precision": precision, "location": number}
        row |= {"tokens": len(x), "neurons": x.shape[1]}
        row |= {"median": float(error.median()), "p99": float(error.quantile(0.99))}
        row |= {"max": float(error.max()), "largest_activation": float(x.abs().max())}
        rows.append(about | row)
        shown = (f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(*shown, sep="  ")
    for key in ("median", "p99", "max"):
        print(f"worst {key} over {len(rows)} locations: {max(r[key] for r in rows):.1e}")
    if out is not None:
        append(out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
