"""Models larger than memory, with random weights: made by layers, compressed by layers.

    python -m benchmarks.studies.large make 1.1B DIR    a Llama-shaped model in shards
    python -m benchmarks.studies.large run DIR --memory 3GB --out FILE
    python -m benchmarks.studies.large make 8B DIR --layers 3    the same, of a few layers
    python -m benchmarks.studies.large run DIR --memory 64GB --profile FILE    where time goes
    python -m benchmarks.studies.large project 8B 70B   operations, memory and time of larger ones

``run`` is ``dotresize compress --memory`` in a process of its own; its row has the times by stage
and the peak of resident memory, predicted and met. Random weights take as long as trained ones.
``project`` counts operations (large_counts.py), and divides them by the rates of three products
that it measures on this device first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from safetensors.torch import save_file

from dotresize.models.causal_lm import CausalLM
from dotresize.models.skeleton import skeleton
from dotresize.offload.headers import INDEX

from ..rows import append, device_name, where
from .large_counts import SHAPES, Shape, counts, gpu_bytes, measured_rates

SHARDS = 4
# The calibration of the published runs: 128 windows.
WINDOW = 2048
TOKENS = 128 * WINDOW


def make(shape: Shape, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint in bfloat16, a shard at a time, with a tokenizer of single bytes."""
    model = llama(shape)
    config = model.config
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    names, shards = model.parts, min(SHARDS, shape.num_hidden_layers)
    index: dict[str, str] = {}
    size = 0
    for i in range(shards):
        weights: dict[str, torch.Tensor] = {}
        for part in names[i * len(names) // shards : (i + 1) * len(names) // shards]:
            for name, empty in model.module.get_submodule(part).named_parameters():
                weights[f"{part}.{name}"] = _random(empty.shape)
        path = folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, path.name)
        size += sum(weight.nbytes for weight in weights.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / INDEX).write_text(text, encoding="utf-8")
    config.save_pretrained(folder)
    _bytes_tokenizer().save_pretrained(folder)


def llama_config(shape: Shape, **others: Any) -> Any:
    """Return the config of a shape, with other numbers where they are given."""
    import transformers

    sizes = asdict(shape) | others
    config = transformers.LlamaConfig(
        **sizes, tie_word_embeddings=False, dtype="bfloat16", max_position_embeddings=4096
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def llama(shape: Shape) -> CausalLM:
    """Return a model of that shape whose weights have no memory."""
    import transformers

    config = llama_config(shape)
    module = skeleton(transformers.LlamaForCausalLM, config, torch.device("cpu"))
    return CausalLM.in_memory(module)


def _random(shape: torch.Size) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 8 B numbers take a CPU minutes
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return (weight.fill_(1.0) if len(shape) == 1 else weight.normal_(std=0.02)).cpu()


def _bytes_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def run(folder: Path, options: list[str], profile: Path | None = None) -> dict[str, Any]:
    """Compress the directory and return the report; OUT is thrown away.

    profile: a file for the operations that took longest, of a run in this process.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        text, out = Path(work) / "topics.txt", Path(work) / "out"
        text.write_text("\n".join(topics.topics.values()), encoding="utf-8")
        words = ["compress", str(folder), str(out), "--calibration", str(text), *options]
        if profile is None:
            done = subprocess.run([sys.executable, "-m", "dotresize", *words], check=False)
            if done.returncode:  # it has said why
                raise SystemExit(done.returncode)
        else:
            profile.write_text(_profiled(words), encoding="utf-8")
        return json.loads((out / "dotresize.json").read_text(encoding="utf-8"))


def _profiled(words: list[str]) -> str:
    """Run a command in this process; return its operations, those with most time of their own."""
    from torch.profiler import ProfilerActivity, profile

    from dotresize.cli import main as command

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        if code := command(words):
            raise SystemExit(code)
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    return found.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=40)


def project(names: list[str], out: Path | None) -> None:
    """Print and write what each shape asks for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measured_rates(device)
    for name in names:
        shape = SHAPES[name]
        found = counts(shape, TOKENS, 3 if device.type == "cuda" else 1)
        size = gpu_bytes(llama(shape), TOKENS, WINDOW)
        seconds = {kind: found[kind] / rates[kind] for kind in rates}
        row = {"shape": name, "tokens": TOKENS, "operations": found, "rates": rates}
        row |= {"seconds": seconds, "bytes_on_a_gpu": size, "measured_on": str(device)}
        if out is not None:
            append(out, [_about() | row])
        sys.stdout.write(json.dumps(row, indent=2) + "\n")


def _about() -> dict[str, Any]:
    about = where(torch.get_num_threads())
    return about | ({"device": device_name()} if torch.cuda.is_available() else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("shape", choices=SHAPES)
    maker.add_argument("folder", type=Path)
    maker.add_argument("--layers", type=int, help="as many as the shape has, if not given")
    runner = verbs.add_parser("run", help="further options go to dotresize compress")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--out", type=Path, help="a row is appended to this file")
    runner.add_argument("--profile", type=Path, help="the operations that took longest, a table")
    projector = verbs.add_parser("project")
    projector.add_argument("shapes", nargs="+", choices=SHAPES)
    projector.add_argument("--out", type=Path, help="rows are appended to this file")
    args, options = parser.parse_known_args()
    if args.verb != "run" and options:
        parser.error(f"unknown: {' '.join(options)}")
    if args.verb == "make":
        shape = SHAPES[args.shape]
        layers = shape.num_hidden_layers if args.layers is None else args.layers
        if not 1 <= layers <= shape.num_hidden_layers:
            parser.error(f"--layers {layers}: must be from 1 to {shape.num_hidden_layers}")
        if args.folder.exists():
            parser.error(f"{args.folder}: exists")
        make(replace(shape, num_hidden_layers=layers), args.folder)
        return 0
    if args.verb == "run":
        if not args.folder.is_dir():
            parser.error(f"{args.folder}: is no directory")
        for option in ("out", "profile"):
            path = getattr(args, option)
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                parser.error(f"--{option} {path}: must be a file in a folder that exists")
    if args.verb == "project":
        project(args.shapes, args.out)
        return 0
    report = run(args.folder, options, args.profile)
    kept = (
        *("width", "feed_forward", "method", "refit", "parameters", "calibration", "seconds"),
        *("predicted_memory_bytes", "peak_memory_bytes"),
    )
    row = _about() | {"model": args.folder.name, "options": options}
    row |= {name: report[name] for name in kept}
    if args.out is not None:
        append(args.out, [row])
    sys.stdout.write(json.dumps({name: row[name] for name in kept[-3:]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
