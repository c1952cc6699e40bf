"""The backends that can run on this machine, and the choice between them."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from dotresize.ops.arguments import check_word
from dotresize.ops.process import IMPORTED_IN

NAMES = ("triton", "cpp", "torch")


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here; the message says why.

    Example:
        >>> import torch
        >>> from dotresize import BackendError, sinkhorn
        >>> try:
        ...     sinkhorn(torch.rand(3, 3), 0.1, acceleration="anderson", backend="cpp")
        ... except BackendError as error:
        ...     print(error)
        acceleration 'anderson' is built for torch, not for cpp
    """


@functools.cache
def cpp() -> ModuleType:
    """Return the compiled extension; torch is imported first, to share one OpenMP runtime."""
    from dotresize import _cpp

    _cpp.simd_level()  # an impossible DOTRESIZE_SIMD shows here, not in the middle of a solve
    return _cpp


def threads() -> int:
    """Return the threads of a C++ kernel: torch's number, 1 in a process that was forked.

    Forked means after dotresize was imported. OpenMP's threads are not forked with a process, and
    waiting for them would never end. That holds for the kernels of this package alone: operations
    of torch that a solver makes beside them may still wait for ever in such a process, unless it
    calls ``torch.set_num_threads(1)`` first. A spawned process has no such limits.
    """
    return torch.get_num_threads() if os.getpid() == IMPORTED_IN else 1


@functools.cache
def _why_no_cpp() -> str | None:
    try:
        cpp()
    except ImportError as error:
        return f"the C++ extension is not built ({error}); reinstall dotresize with a C++ compiler"
    except RuntimeError as error:
        return str(error)
    return None


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _why_no_triton() -> str | None:
    try:
        interpreting = _interpreting()
    except (ImportError, AttributeError) as error:
        return f"triton cannot be used ({error})"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreting:
        return "no CUDA or ROCm device is visible to torch"
    return None


def _why_not(name: str, device: torch.device) -> str | None:
    """Return why the backend does not run on tensors of this device; None where it does."""
    if name == "torch":
        return None
    if name == "cpp":
        why = _why_no_cpp()
        return why or (None if device.type == "cpu" else f"it runs on CPU tensors, not {device}")
    why = _why_no_triton()
    if why is None and device.type != "cuda" and not (_interpreting() and device.type == "cpu"):
        why = f"it runs on CUDA or ROCm tensors, not {device}"
    return why


def choose(backend: str, device: torch.device) -> str:
    """Return the backend to run on tensors of ``device``.

    "auto" takes Triton on CUDA/ROCm, C++ on a CPU, and torch where neither fits. Raises ValueError
    for an unknown name and BackendError, with the reason, for a named backend that cannot run.
    """
    check_word("backend", backend, ("auto", *NAMES))
    if backend == "auto":
        preferred = "triton" if device.type == "cuda" else "cpp"
        return preferred if _why_not(preferred, device) is None else "torch"
    why = _why_not(backend, device)
    if why is not None:
        raise BackendError(f"backend {backend!r} cannot run here: {why}")
    return backend


def backends() -> dict[str, dict[str, object]]:
    """Return what runs here: for each backend its details, or the ``reason`` why it does not.

    >>> import dotresize
    >>> dotresize.backends()["torch"]["available"]
    True
    """
    report: dict[str, dict[str, object]] = {}
    why = _why_no_triton()
    if why is None:
        import triton

        interpreted = _interpreting()
        device = "cpu (interpreter)" if interpreted else torch.cuda.get_device_name()
        report["triton"] = {"available": True, "device": device, "version": triton.__version__}
    else:
        report["triton"] = {"available": False, "reason": why}
    why = _why_no_cpp()
    if why is None:
        report["cpp"] = {
            "available": True,
            "device": "cpu",
            "simd": cpp().simd_level(),
            "openmp": cpp().OPENMP,
            "threads": threads(),
        }
    else:
        report["cpp"] = {"available": False, "reason": why}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report["torch"] = {"available": True, "device": device, "version": torch.__version__}
    return report
