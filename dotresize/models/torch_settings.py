"""torch's settings while models are made and run: transformers' own code follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def usual_settings() -> Iterator[None]:
    """Give torch its own defaults, and give the caller's back: float32, the CPU, no autocast.

    Works as a decorator too. Otherwise a default of float16 would make half of a model in it, and
    an autocast around a compression would round its statistics.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # a mode that every call of torch passes
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
