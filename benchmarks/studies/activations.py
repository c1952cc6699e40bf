"""Activations of a whole model at once, for studies and tests of small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dotresize.calibration.residual_stream import captured_inputs
from dotresize.calibration.statistics import inverse_rms
from dotresize.models import architecture_of


def residual_stream(module: Any, ids: Tensor) -> Tensor:
    """Return the residual stream at every location, (L, tokens, D): what its norms read.

    module: a transformers model; ids: int64 (windows, length).
    """
    norms = [norm for _, norm in architecture_of(module.config).norms(module)]
    with captured_inputs(norms) as read, torch.no_grad():
        module(input_ids=ids, use_cache=False)
    return torch.stack([x.flatten(0, -2) for x in read])


def unit_rms(stream: Tensor) -> Tensor:
    """Return every token divided by its root mean square over the channels, the last axis."""
    return stream * inverse_rms(stream)
