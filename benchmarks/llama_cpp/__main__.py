"""Narrowed models in llama.cpp: the same text as transformers, file sizes, perplexity, speed.

    npm install node-llama-cpp
    python -m benchmarks.llama_cpp [DIRECTORY ...] [--out FILE]

Each model directory is exported by ``dotresize export`` and run by a prebuilt llama.cpp: token ids
of the evaluation texts, logits and greedy text in f32 are compared with transformers', then every
type is written by llama.cpp's own quantiser, its perplexity measured and its decoding timed, all
types in turns. Without a directory the models of the README's table are made: SmolLM2-135M, dense
and narrowed by the demo's calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import checkpoint
from dotresize.calibration.text import added_around, read_text, tokenize
from dotresize.checkpoint import gguf_file
from dotresize.evaluate import evaluation_windows, perplexity

from ..demo.texts import model_file, write_texts
from ..rows import append, where
from .library import LlamaCpp, find

FOLDER = Path("demo-output/llama_cpp")
TYPES = ("f32", "q8_0", "q4_0", "q4_k_m")
# The rows of the table, by what dotresize compress is asked for.
NARROWED = {
    "width 0.8": ["--width", "0.8"],
    "params 0.8": [],
    "ff-width 0.73": ["--ff-width", "0.73"],
}
WINDOWS, EVAL_WINDOWS, LENGTH = 18, 4, 512
PROMPTS, NEW_TOKENS, ROUNDS = 4, 48, 5


def made_models(options: list[str]) -> dict[str, Path]:
    """Return the table's models, made anew: the dense one, and those that ``NARROWED`` asks for."""
    calibration, _ = write_texts(FOLDER / "texts")
    dense = FOLDER / "dense"
    for folder in FOLDER.iterdir():
        if folder.is_dir() and folder.name != "texts":
            shutil.rmtree(folder)
    device = torch.device("cpu")
    model, tokenizer = checkpoint.load_with_tokenizer(str(model_file()), device, to_narrow=True)
    checkpoint.write_whole(dense, lambda folder: checkpoint.save(model, tokenizer, folder))
    found = {"dense": dense}
    for name, asked in NARROWED.items():
        found[name] = FOLDER / name.replace(" ", "-")
        command = [sys.executable, "-m", "dotresize", "compress", str(model_file())]
        command += [str(found[name]), *asked, "--windows", str(WINDOWS), "--quiet", *options]
        command += ["--calibration", *map(str, calibration)]
        print("$ dotresize", *command[3:], flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return found


def compared(folder: Path, opened: Any, texts: list[str], windows: Tensor) -> dict[str, Any]:
    """Return how a file in f32 differs from the directory that it was made of."""
    device = torch.device("cpu")
    model, tokenizer = checkpoint.load_with_tokenizer(str(folder), device, to_narrow=False)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    other = sum(own != opened.tokenise(text) for own, text in zip(ids, texts, strict=True))
    window = windows[0]
    with torch.inference_mode():
        logits = model.module(window[None]).logits[0]
        found = opened.logits(window.tolist())
        # Keys and values are float16 in llama.cpp's cache.
        divergence = torch.nn.functional.kl_div(
            found.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
        )
        same = 0
        for row in windows[:PROMPTS]:
            prompt = row[:32]
            written = model.module.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
            )[0, 32:]
            theirs, _ = opened.greedy(prompt.tolist(), NEW_TOKENS)
            same += int(written.tolist() == theirs)
    return {
        "texts": len(texts),
        "texts_of_other_ids": other,
        "largest_logit_difference": float((found - logits).abs().max()),
        "kl_of_a_window": float(divergence),
        "greedy_texts": f"{same} of {PROMPTS} equal",
        "transformers_perplexity": perplexity(model, windows),
    }


def measured(
    library: LlamaCpp, folder: Path, texts: dict[str, Path], threads: int
) -> list[dict[str, Any]]:
    """Return a row for every type of a model directory."""
    path, config, tokenizer = checkpoint.parts_of(str(folder))
    base = FOLDER / "f32.gguf"
    base.unlink(missing_ok=True)
    gguf_file.write(path, config, tokenizer, base, "f32", folder.name)
    first, _ = added_around(tokenizer)
    windows = {
        name: evaluation_windows(tokenize(text, tokenizer), LENGTH, EVAL_WINDOWS, first)
        for name, text in texts.items()
    }
    rows = []
    files = {}
    for kind in TYPES:
        files[kind] = base if kind == "f32" else FOLDER / f"{kind}.gguf"
        if kind != "f32":
            library.quantise(base, files[kind], kind, threads)
        row: dict[str, Any] = {"type": kind, "bytes": files[kind].stat().st_size}
        with library.opened(files[kind], length=LENGTH, threads=threads) as opened:
            row["perplexity"] = {
                name: math.exp(sum(map(opened.loss, found)) / found[:, 1:].numel())
                for name, found in windows.items()
            }
            if kind == "f32":
                documents = [text for path in texts.values() for text in read_text(path)]
                everything = torch.cat(list(windows.values()))
                row["compared"] = compared(folder, opened, documents, everything)
        rows.append(row)
        print(json.dumps(row), flush=True)
    prompt = next(iter(windows.values()))[0][:16].tolist()
    speeds: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for _ in range(ROUNDS):
        for kind, file in files.items():
            with library.opened(file, length=LENGTH, threads=threads) as opened:
                opened.greedy(prompt, 4)
                speeds[kind].append(opened.greedy(prompt, NEW_TOKENS)[1])
    for row in rows:
        row["tokens_per_s"] = statistics.median(speeds[row["type"]])
        row["widths"] = [config.hidden_size, config.intermediate_size]
        row["model_type"] = config.model_type
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="directories (the README's table)")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args, options = parser.parse_known_args()
    library = find()
    FOLDER.mkdir(parents=True, exist_ok=True)
    _, held_out = write_texts(FOLDER / "texts")
    texts = {path.stem: path for path in held_out}
    models = {path.name: path for path in args.models} or made_models(options)
    about = where(args.threads) | {"llama_cpp": library.version}
    about |= {"windows": EVAL_WINDOWS, "window": LENGTH}
    for name, folder in models.items():
        print(f"{name}:", flush=True)
        rows = [
            about | {"model": name} | row for row in measured(library, folder, texts, args.threads)
        ]
        if args.out is not None:
            append(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
