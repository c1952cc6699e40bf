"""Narrowed models in llama.cpp: the same text as transformers, file sizes, perplexity, speed.

    npm install node-llama-cpp
    python -m benchmarks.llama_cpp [DIRECTORY ...] [--out FILE]

Each model directory is exported by ``dotresize export`` and run by a prebuilt llama.cpp: token ids
of the evaluation texts, logits and greedy text in f32 are compared with transformers', then every
type is written by llama.cpp's own quantiser, its perplexity measured and its decoding timed, all
files in turns. Without a directory the models of the README's table are made: SmolLM2-135M, dense
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

from dotresize.calibration.text import added_around, read_text, tokenize
from dotresize.checkpoint import (
    gguf_file,
    load_with_tokenizer,
    parts_of,
    write_directory,
    write_whole,
)
from dotresize.cli.resume import partial_folder
from dotresize.evaluate import evaluation_windows, perplexity

from ..demo.texts import model_file, write_texts
from ..rows import append, where
from .library import LlamaCpp, find

FOLDER = Path("demo-output/llama_cpp")
FILES = FOLDER / "files"
TYPES = ("f32", "q8_0", "q4_0", "q4_k_m", "q3_k_m")
# The rows of the table, by what dotresize compress is asked for.
NARROWED = {
    "width 0.8": ["--width", "0.8"],
    "params 0.8 --search": ["--search"],
    "ff-width 0.73": ["--ff-width", "0.73"],
    "ff-width 0.73 --layer-widths": ["--ff-width", "0.73", "--layer-widths"],
}
WINDOWS, EVAL_WINDOWS, LENGTH = 18, 4, 512
PROMPTS, NEW_TOKENS, ROUNDS = 4, 48, 5


def made_models(options: list[str], *, keep: bool) -> dict[str, Path]:
    """Return the table's models: the dense one, and those that ``NARROWED`` asks for.

    keep: whether those that are there are taken as they are.
    """
    calibration, _ = write_texts(FOLDER / "texts")
    found = {name: FOLDER / name.replace(" ", "-") for name in ("dense", *NARROWED)}
    for name, folder in found.items():
        if keep and folder.is_dir():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(partial_folder(str(folder)), ignore_errors=True)
        if name == "dense":
            device = torch.device("cpu")
            model, tokenizer = load_with_tokenizer(str(model_file()), device, to_narrow=True)
            write_whole(folder, lambda new, m=model, t=tokenizer: write_directory(m, t, new))
            continue
        command = [sys.executable, "-m", "dotresize", "compress", str(model_file()), str(folder)]
        command += [*NARROWED[name], "--windows", str(WINDOWS), "--quiet", *options]
        command += ["--calibration", *map(str, calibration)]
        print("$ dotresize", *command[3:], flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return found


def compared(folder: Path, opened: Any, texts: list[str], windows: Tensor) -> dict[str, Any]:
    """Return how a file in f32 differs from the directory that it was made of."""
    device = torch.device("cpu")
    model, tokenizer = load_with_tokenizer(str(folder), device, to_narrow=False)
    model.module.float()  # the weights as they are, computed as llama.cpp does
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
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Return a row for every type of a model directory, and the files, by type."""
    path, config, tokenizer = parts_of(str(folder))
    first, _ = added_around(tokenizer)
    windows = {
        name: evaluation_windows(tokenize(text, tokenizer), LENGTH, EVAL_WINDOWS, first)
        for name, text in texts.items()
    }
    FILES.mkdir(parents=True, exist_ok=True)
    files = {kind: FILES / f"{folder.name}-{kind}.gguf" for kind in TYPES}
    rows = []
    for kind, file in files.items():
        file.unlink(missing_ok=True)
        if kind == "f32":
            gguf_file.write(path, config, tokenizer, file, kind, folder.name)
        else:
            library.quantise(files["f32"], file, kind, threads)
        row: dict[str, Any] = {"type": kind, "bytes": file.stat().st_size}
        with library.opened(file, length=LENGTH, threads=threads) as opened:
            row["perplexity"] = {
                name: math.exp(sum(map(opened.loss, found)) / found[:, 1:].numel())
                for name, found in windows.items()
            }
            if kind == "f32":
                documents = [text for path in texts.values() for text in read_text(path)]
                everything = torch.cat(list(windows.values()))
                row["compared"] = compared(folder, opened, documents, everything)
        row["layer_widths"] = gguf_file.inner_widths(config)
        row["widths"] = [config.hidden_size, max(row["layer_widths"])]
        row["model_type"] = config.model_type
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows, files


def speeds(library: LlamaCpp, files: list[Path], threads: int) -> list[float]:
    """Return each file's tokens a second when decoding: medians of runs in turns."""
    taken: list[list[float]] = [[] for _ in files]
    for _ in range(ROUNDS):
        for file, found in zip(files, taken, strict=True):
            with library.opened(file, length=LENGTH, threads=threads) as opened:
                opened.greedy(list(range(300, 316)), 4)
                found.append(opened.greedy(list(range(300, 316)), NEW_TOKENS)[1])
    return [statistics.median(found) for found in taken]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="directories (the README's table)")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--keep", action="store_true", help="take models that were made before")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args, options = parser.parse_known_args()
    library = find()
    FOLDER.mkdir(parents=True, exist_ok=True)
    _, held_out = write_texts(FOLDER / "texts")
    texts = {path.stem: path for path in held_out}
    models = {path.name: path for path in args.models} or made_models(options, keep=args.keep)
    about = where(args.threads) | {"llama_cpp": library.version}
    about |= {"windows": EVAL_WINDOWS, "window": LENGTH}
    rows: list[dict[str, Any]] = []
    files: list[Path] = []
    for name, folder in models.items():
        print(f"{name}:", flush=True)
        found, written = measured(library, folder, texts, args.threads)
        rows += [about | {"model": name} | row for row in found]
        files += [written[row["type"]] for row in found]
    for row, speed in zip(rows, speeds(library, files, args.threads), strict=True):
        row["tokens_per_s"] = speed
        print(f"{row['model']}, {row['type']}: {speed:.1f} tokens/s", flush=True)
    if args.out is not None:
        append(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
