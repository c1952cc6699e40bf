"""What a merged model takes on the disk and in memory, loaded by a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dotresize.accounting import unique_parameters
from dotresize.checkpoint import load_with_tokenizer
from dotresize.merging.checkpoint import MergedStore, PlainStore
from dotresize.merging.merge import merge_feed_forward
from dotresize.models.causal_lm import CausalLM

from ...demo.texts import model_file
from .cases import Case

DATA = Path()
MERGED, START = 10, 15
# Every page of the weights is touched: files that are mapped take memory only then.
LOADING = """
import sys, psutil, torch
import transformers, dotresize
class_of, folder = sys.argv[1:]
process = psutil.Process()
getattr(transformers, class_of)
before = process.memory_info().rss
if folder.endswith("shared"):
    model = dotresize.load(folder)
else:
    model = getattr(transformers, class_of).from_pretrained(folder)
total = sum(float(p.flatten()[::256].sum()) for p in model.parameters())
print(process.memory_info().rss - before)
"""


class Memory:
    """SmolLM2-135M in the three ways to write it; it has the methods of ``cases.Task``."""

    name, data = "memory", "none"

    def __init__(self) -> None:
        cpu = torch.device("cpu")
        self._model, self._tokenizer = load_with_tokenizer(str(model_file()), cpu, to_narrow=True)

    def cases(self) -> list[Case]:
        """Return the merged model, and the one of ``--plain``."""
        return [Case(name, {"decoder": MERGED}) for name in ("shared", "plain")]

    def dense(self) -> dict[str, Any]:
        """Return the row of the model as it is."""
        return self._row("dense", self._model)

    def run(self, case: Case, seed: int, folder: Path) -> dict[str, Any]:
        """Return the row of a case."""
        batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
        rule: dict[str, Any] = {"permute": False, "start": START, "metric": lambda model: 0.0}
        merged, _ = merge_feed_forward(self._model.module, [batch], k=MERGED, **rule)
        store = MergedStore(merged) if case.name == "shared" else PlainStore(merged)
        return self._row(case.name, CausalLM(merged, store))

    def _row(self, name: str, model: CausalLM) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / name
            out.mkdir()
            model.save(out)
            class_of = type(self._model.module).__name__
            command = [sys.executable, "-c", LOADING, class_of, str(out)]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            size = (out / "model.safetensors").stat().st_size
        resident = int(found.stdout.split()[-1])
        return {
            "before": {"resident MB": resident / 1e6, "file MB": size / 1e6},
            "parameters": unique_parameters(model.module),
        }


def task(folder: Path, cache: Path, steps: int) -> Memory:
    """Return the task; nothing is trained."""
    return Memory()
