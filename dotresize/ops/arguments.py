"""Checks of what callers give, each with one line that says what it was and what is accepted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

_P = ParamSpec("_P")
_R = TypeVar("_R")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def shown(value: Any) -> str:
    """Return in one short line what a value is: numbers and words themselves, of others the kind.

    The representation of others may be long, of several lines, or not to be had at all.
    """
    plain = (str, bytes, bool, int, float, complex, np.generic, Path, torch.dtype, torch.device)
    entries = value if isinstance(value, (list, tuple)) else [value]
    if not all(entry is None or isinstance(entry, plain) for entry in entries):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_tensor(name: str, value: Any) -> Tensor:
    """Return the value; ValueError for anything but a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a torch tensor")
    if is_lazy(value):
        raise ValueError(f"{name} is an uninitialized parameter: must be a tensor with values")
    return value


def check_dense(name: str, value: Any) -> Tensor:
    """Return the value; ValueError for anything but a tensor whose entries lie in memory."""
    check_tensor(name, value)
    if value.is_nested or value.layout is not torch.strided:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} is {kind}: must be a dense tensor")
    if value.is_quantized:
        raise ValueError(f"{name} has dtype {value.dtype}: must not be quantized")
    if value.device.type == "meta" or not _has_memory(value):
        place = "on meta" if value.device.type == "meta" else "a stand-in without values"
        advice = "must be a dense tensor with values (those of torch.func and fake ones have none)"
        raise ValueError(f"{name} is {place}: {advice}")
    inside = forward_ad._current_level >= 0
    if inside and forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{name} has a forward-mode tangent: gradients are reverse-mode here")
    return value


def _has_memory(value: Tensor) -> bool:
    """Return whether all entries of a tensor lie in memory that it owns.

    Tensors that torch traces or vectorises have no address, and a storage may have been freed.
    """
    if value.numel() == 0:
        return True
    try:
        steps = zip(value.shape, value.stride(), strict=True)
        last = value.storage_offset() + sum((size - 1) * step for size, step in steps)
        room = value.untyped_storage().nbytes()
        return value.data_ptr() != 0 and (last + 1) * value.element_size() <= room
    except (RuntimeError, NotImplementedError):
        return False


def address(tensor: Tensor | None, dtype: torch.dtype) -> int:
    """Return where a tensor's first entry lies, for the C++ kernels; 0 for None.

    Raises RuntimeError for a dtype or a device that the kernel would misread: whatever defaults a
    caller has given to torch, memory is never read or written as something else. ValueError where
    there is no memory.
    """
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        given = f"{tensor.dtype} on {tensor.device}"
        raise RuntimeError(f"a buffer is {given}: the kernel takes {dtype} on cpu")
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # Inside a transform everything that torch computes is a stand-in, whatever was given.
        raise ValueError(
            "this is inside torch.func, whose tensors have no memory: must be called outside"
        ) from None


def check_word(name: str, value: Any, words: Iterable[str]) -> None:
    """Raise ValueError unless a choice is one of some words."""
    known = list(words)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {shown(value)}: must be one of {', '.join(known)}")


def check_flag(name: str, value: Any) -> bool:
    """Return a choice that is True or False; ValueError for anything else."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {shown(value)}: must be True or False")
    return bool(value)


def check_whole(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer, of at least ``least``; ValueError for anything else."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    lowest = -(2**63) if least is None else least
    if not whole or not lowest <= int(value) < 2**63:
        accepted = "an integer" + ("" if least is None else f" from {least} up")
        raise ValueError(f"{name} is {shown(value)}: must be {accepted}")
    return int(value)


def check_number(name: str, value: Any, accepted: str) -> float:
    """Return one finite real number; ValueError, saying what is ``accepted``, for anything else.

    NumPy's and torch's numbers, and arrays of one entry, are numbers.
    """
    number, only = math.nan, value
    if isinstance(value, Tensor) and check_dense(name, value).numel() == 1:
        only = value.detach().reshape(()).tolist()
    elif isinstance(value, np.ndarray) and value.size == 1:
        only = value.reshape(())[()]
    if isinstance(only, (float, int, np.floating, np.integer)) and not isinstance(only, bool):
        try:
            number = float(only)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}: must be {accepted}")
    return number


def index_tensor(name: str, value: Any) -> Tensor:
    """Return indices as int64, from a tensor of that type, or a list or NumPy array of integers.

    ValueError for anything else.
    """
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.dtype != torch.int64:
            raise ValueError(f"{name} are {value.dtype}: must be int64")
        return value
    if isinstance(value, (list, tuple, range, np.ndarray)):
        try:
            given = np.asarray(value)
        except ValueError:  # rows of different lengths
            given = np.empty(0, dtype=object)
        hidden = np.ma.is_masked(value)
        if given.dtype.kind in "iu" and given.dtype.itemsize <= 8 and given.size and not hidden:
            return torch.from_numpy(given.astype(np.int64))
    raise ValueError(f"{name} is {shown(value)}: must be int64 indices, as a tensor, array or list")


def exact(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the function so that an autocast around its call does not round what it computes."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call
