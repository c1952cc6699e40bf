"""What kernels take: tensors whose values lie in memory, and the addresses of buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_dense(name: str, value: Any) -> Tensor:
    """Return the value; ValueError for anything but a tensor whose entries lie in memory."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a torch tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} is {value.layout}: must be a dense tensor")
    if value.is_quantized:
        raise ValueError(f"{name} has dtype {value.dtype}: must not be quantized")
    if value.device.type == "meta" or not _has_memory(value):
        place = "on meta" if value.device.type == "meta" else "a stand-in without values"
        advice = "must be a dense tensor with values (torch.func and fake tensors have none)"
        raise ValueError(f"{name} is {place}: {advice}")
    return value


def _has_memory(value: Tensor) -> bool:
    """Return whether a tensor has an address; those that torch traces or vectorises have none."""
    try:
        return value.numel() == 0 or value.data_ptr() != 0
    except RuntimeError:
        return False


def address(tensor: Tensor | None, dtype: torch.dtype) -> int:
    """Return where a tensor's first entry lies, for the C++ kernels; 0 for None.

    Raises RuntimeError for a dtype or a device that the kernel would misread: whatever defaults a
    caller has given to torch, memory is never read or written as something else.
    """
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        given = f"{tensor.dtype} on {tensor.device}"
        raise RuntimeError(f"a buffer is {given}: the kernel takes {dtype} on cpu")
    return tensor.data_ptr()
