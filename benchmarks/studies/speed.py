"""Tokens a second and memory, before and after.

    python -m benchmarks.studies.speed DENSE NARROW

Each model runs in processes of its own, in turns, so that neither profits from a quiet moment:
prefill (one forward pass over a prompt) and decode (token by token, with the cache), at batch 1
and 8. The first pass of each kind is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..rows import append, where

PROMPT = 256
NEW_TOKENS = 24
BATCHES = (1, 8)


def measure(source: str) -> dict[str, float]:
    """Measure tokens a second of one model, and the peak memory of this process."""
    from dotresize.checkpoint import load_with_tokenizer

    loaded, _ = load_with_tokenizer(source, torch.device("cpu"), to_narrow=False)
    model = loaded.module
    figures: dict[str, float] = {}
    with torch.inference_mode():
        for batch in BATCHES:
            ids = torch.randint(1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
            model(input_ids=ids[:, :16], use_cache=False)
            start = time.perf_counter()
            cache = model(input_ids=ids, use_cache=True).past_key_values
            figures[f"prefill, batch {batch}"] = ids.numel() / (time.perf_counter() - start)
            token = ids[:, -1:]
            model(input_ids=token, past_key_values=cache, use_cache=True)
            start = time.perf_counter()
            for _ in range(NEW_TOKENS):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            took = time.perf_counter() - start
            figures[f"decode, batch {batch}"] = batch * NEW_TOKENS / took
    figures["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def in_turns(sources: list[str], rounds: int) -> list[dict[str, list[float]]]:
    """Measure every model in turns; one list entry for each round."""
    found: list[dict[str, list[float]]] = [{} for _ in sources]
    for _ in range(rounds):
        for figures, source in zip(found, sources, strict=True):
            command = [sys.executable, "-m", "benchmarks.studies.speed", "--measure", source]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for name, value in json.loads(done.stdout).items():
                figures.setdefault(name, []).append(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directories or .gguf files")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each model, in turns (3)")
    parser.add_argument("--out", type=Path, help="a row for each model is appended to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        sys.stdout.write(json.dumps(measure(args.models[0])) + "\n")
        return 0
    rows: list[dict[str, Any]] = []
    for source, figures in zip(args.models, in_turns(args.models, args.rounds), strict=True):
        medians = {name: statistics.median(values) for name, values in figures.items()}
        ranges = {name: [min(values), max(values)] for name, values in figures.items()}
        about = {"model": Path(source).name, "prompt": PROMPT, "new_tokens": NEW_TOKENS}
        rows.append(where(torch.get_num_threads()) | about | {"median": medians, "range": ranges})
        line = "  ".join(f"{name} {value:.1f}" for name, value in medians.items())
        sys.stdout.write(f"{Path(source).name}: {line}\n")
    if args.out is not None:
        append(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
