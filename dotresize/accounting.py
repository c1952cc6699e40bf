"""Figures for reports: parameters, memory, versions."""

from __future__ import annotations

import logging
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from dotresize.models.causal_lm import CausalLM

# What a run is doing, which --quiet leaves out.
stages = logging.getLogger("dotresize.stages")

STAGES = (
    *("self-generated text", "calibration", "budget", "layer widths", "cost", "sensitivity"),
    "sinkhorn",
    "factorisation",
    "absorption",
    *("refit", "recovery"),
    "evaluation",
)


@contextmanager
def stage(name: str, seconds: dict[str, float], detail: str = "") -> Iterator[None]:
    """Say when a stage starts and when it has ended, and add its time to ``seconds``."""
    stages.info("%s%s ...", name, f" {detail}" if detail else "")
    start = time.perf_counter()
    yield
    took = time.perf_counter() - start
    seconds[name] = seconds.get(name, 0.0) + took
    stages.info("%s took %s", name, f"{took:.1f} s" if took < 100 else f"{took:.0f} s")


def count_parameters(model: CausalLM) -> dict[str, int]:
    """Return a model's parameters: ``total``, tied tensors once, and ``non_embedding``.

    Non-embedding leaves out the input embedding and the head, tied or not.
    """
    architecture, module = model.architecture, model.module
    outer = {
        id(module.get_submodule(name).weight)
        for name in (architecture.embedding, architecture.head)
    }
    unique = {id(p): p.numel() for p in module.parameters()}
    total = unique_parameters(module)
    return {
        "total": total,
        "non_embedding": total - sum(unique.get(key, 0) for key in outer),
    }


def unique_parameters(module: Any) -> int:
    """Return the parameters of a model, tied tensors once."""
    return sum({id(p): p.numel() for p in module.parameters()}.values())


@torch.no_grad()
def check_weights(module: Any) -> None:
    """Raise ValueError naming the first weight in memory that holds NaN or Inf."""
    for name, weight in module.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} of the model holds NaN or Inf")


def peak_memory() -> dict[str, int]:
    """Return the bytes that this process has held at most, by device."""
    peak = {"host": _peak_resident()}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    # Linux keeps ru_maxrss across exec: a child starts with the peak of its parent.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0])
    except (OSError, IndexError):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    import transformers

    return {
        "dotresize": _own_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _own_version() -> str:
    try:
        return metadata.version("dotresize")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
