"""Models whose parameters have shapes, and no memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dotresize.models import architecture_of
from dotresize.models.layer_widths import set_inner_widths


def skeleton(
    kind: Any, config: Any, device: torch.device, widths: Sequence[int] | None = None
) -> Any:
    """Return a model of class ``kind`` whose parameters have no memory; its buffers are real.

    kind: a transformers model class, or an Auto class.
    widths: of the feed-forward of every layer, where the config does not say.
    """
    make = getattr(kind, "from_config", kind)
    with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
        model = make(config)
    if widths:
        set_inner_widths(architecture_of(config), model, widths)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


_LOCK = threading.Lock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have modules that this thread makes during the block take parameters without memory."""
    thread = threading.get_ident()

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _LOCK:  # one thread's replacement must not become what another one puts back
        register = nn.Module.register_parameter
        nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
