"""``make demo``: take a fifth of SmolLM2-135M's parameters away, and see what is left.

The table has the dense model, plain ways to spend the same parameters, among them the paper's
single transport, and the default's model. That one is then written for llama.cpp as well, and the
dense model and it write a sentence each, in plain transformers.

With ``--out FILE`` one JSON line per row of the table is appended to FILE; other options are handed
to ``dotresize compress``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dotresize.cli.report import FIGURES
from dotresize.cli.resume import partial_folder

from ..code import measured_code
from ..rows import device_name
from .texts import model_file, write_texts

FOLDER = Path("demo-output")
OUT = FOLDER / "SmolLM2-135M-narrow"
GGUF = FOLDER / "SmolLM2-135M-narrow-q8_0.gguf"
WINDOWS = 5
EVAL_WINDOWS = 2

# Runs in a process of its own, which never imports dotresize.
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
name, folder, *file = sys.argv[1:]
options = dict(zip(["gguf_file"], file))
model = AutoModelForCausalLM.from_pretrained(folder, **options)
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
prompt = tokenizer("The history of the city begins", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
text = tokenizer.decode(tokens[0], skip_special_tokens=True)
print(f"{name}, in plain transformers: {' '.join(text.split())}")
assert "dotresize" not in sys.modules
"""


def run(*words: str) -> int:
    """Run ``dotresize``; return its exit code."""
    print("$ dotresize", *words, flush=True)
    return subprocess.run([sys.executable, "-m", "dotresize", *words], check=False).returncode


def compress(options: list[str]) -> int:
    calibration, held_out = write_texts(FOLDER / "texts")
    for folder in (OUT, partial_folder(str(OUT))):  # of the last run, or one that was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    words = ["compress", str(model_file()), str(OUT), "--compare", "--windows", str(WINDOWS)]
    words += ["--calibration", *map(str, calibration), "--eval", *map(str, held_out)]
    return run(*words, "--eval-windows", str(EVAL_WINDOWS), *options)


def export() -> int:
    """Write the result as one file for llama.cpp."""
    GGUF.unlink(missing_ok=True)
    return run("export", str(OUT), str(GGUF), "--type", "q8_0")


def generate(name: str, *where: str) -> subprocess.Popen[str]:
    """Start a process in which a model writes a sentence, into a pipe.

    where: a directory, and the name of a GGUF file in it.
    """
    command = [sys.executable, "-c", GENERATE, name, *where]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet)


def shown(written: subprocess.Popen[str]) -> int:
    """Print what a process writes; return its exit code."""
    print(written.communicate()[0], end="", flush=True)
    return written.returncode


def append_rows(path: Path) -> None:
    """Append the table of the last run, one JSON line per column."""
    report = json.loads((OUT / "dotresize.json").read_text(encoding="utf-8"))
    settings = report["settings"]
    where = {
        "date": datetime.date.today().isoformat(),
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": report["versions"],
        **measured_code(),
        "model": Path(settings["model"]).stem,
        "windows": settings["windows"],
        "window": settings["window"],
        "eval_windows": settings["eval_windows"],
        "seed": settings["seed"],
    }
    kept = ("method", "refit", "width", "feed_forward", "layers", "tied", "plain_checkpoint")
    kept += ("parameters", "map", "budget")
    kept += ("recovery", "training_free", *FIGURES)
    with path.open("a", encoding="utf-8") as file:
        for row in [*report["compared"], report]:
            figures = {key: row[key] for key in (*kept, "seconds") if key in row}
            file.write(json.dumps(where | figures) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args, options = parser.parse_known_args()
    start = time.perf_counter()
    dense = model_file()
    with generate("dense", str(dense.parent), dense.name) as of_dense:
        code = compress(options)
        if code == 0 and args.out is not None:
            append_rows(args.out)
        if code:
            of_dense.kill()
        else:
            with generate("narrowed", str(OUT)) as of_narrowed:
                code = export()
                codes = [shown(of_dense), shown(of_narrowed)]
                code = code or max(codes, key=abs)
    print(f"{time.perf_counter() - start:.0f} seconds on {device_name()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
