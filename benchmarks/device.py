"""What a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name() -> str:
    """The CUDA device's name, or the processor's with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
