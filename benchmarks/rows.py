"""JSON lines: what was measured, on what, with what."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import dotresize

from .code import measured_code

_PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "lapx", "scikit-learn", "faiss-cpu", "POT", "geomloss"),
    *("jax", "jaxlib", "ott-jax", "pykeops", "flash-sinkhorn", "cupy-cuda13x", "cuvs-cu13"),
    *("mdot-tnt", "torch-linear-assignment"),
)


def device_name() -> str:
    """Return the CUDA device's name, or the processor's with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Return versions of this package and of every known peer that is installed."""
    found = {"dotresize": dotresize.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def where(threads: int, commit: str | None = None) -> dict[str, Any]:
    """Return the part of a row that says on what CPU operators were measured.

    ``commit`` as for ``measured_code``.
    """
    cpp = dotresize.backends()["cpp"]
    return {
        "date": datetime.date.today().isoformat(),
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": f"{processor()}, {threads} threads",
        "simd": cpp.get("simd"),
        "versions": versions(),
        **measured_code(commit),
    }


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
