"""``make demo``: narrow SmolLM2-135M by 20 %, compare, load the result with plain transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.texts import model_file, write_texts

FOLDER = Path("demo-output")
WINDOWS = 24
EVAL_WINDOWS = 4

# Runs in a process of its own, which never imports dotresize.
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("The history of the city begins", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
assert "dotresize" not in sys.modules
text = tokenizer.decode(tokens[0], skip_special_tokens=True)
print(f"plain transformers, width {model.config.hidden_size}: {' '.join(text.split())}")
"""


def main() -> int:
    start = time.perf_counter()
    calibration, held_out = write_texts(FOLDER / "texts")
    out = FOLDER / "SmolLM2-135M-narrow"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "dotresize", "compress", str(model_file()), str(out)]
    command += ["--width", "0.8", "--compare", "--windows", str(WINDOWS)]
    command += ["--calibration", *map(str, calibration)]
    command += ["--eval", *map(str, held_out), "--eval-windows", str(EVAL_WINDOWS)]
    print("$ dotresize", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        code = subprocess.run([sys.executable, "-c", GENERATE, str(out)], check=False).returncode
    print(f"{time.perf_counter() - start:.0f} seconds")
    return code


if __name__ == "__main__":
    sys.exit(main())
