"""Linear layers of either layout: ``nn.Linear`` (outputs, inputs), Conv1D (inputs, outputs)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def linear_of(layer: nn.Module, weight: str) -> Any:
    """Return the module that a weight of a layer belongs to."""
    return layer.get_submodule(weight.removesuffix(".weight"))


def rows_of(linear: Any) -> Tensor:
    """Return the weight as (inputs, outputs): what a row of activations is multiplied by."""
    return linear.weight.mT if isinstance(linear, nn.Linear) else linear.weight


def set_rows(linear: Any, rows: Tensor) -> None:
    """Set another weight, (inputs, outputs), of any number of inputs; its dtype stays."""
    value = rows.mT if isinstance(linear, nn.Linear) else rows
    linear.weight = nn.Parameter(value.to(linear.weight.dtype).contiguous())
    setattr(linear, "in_features" if isinstance(linear, nn.Linear) else "nx", len(rows))


def pad_outputs(linear: Any, count: int, stacked: int = 1) -> None:
    """Add ``count`` outputs that are zero, behind each of ``stacked`` equal parts."""
    axis = 0 if isinstance(linear, nn.Linear) else 1

    def padded(value: Tensor, axis: int) -> Tensor:
        parts = []
        for part in value.detach().chunk(stacked, axis):
            shape = list(part.shape)
            shape[axis] = count
            parts += [part, part.new_zeros(shape)]
        return torch.cat(parts, axis)

    linear.weight = nn.Parameter(padded(linear.weight, axis))
    if linear.bias is not None:
        linear.bias = nn.Parameter(padded(linear.bias, 0))
    setattr(linear, "out_features" if axis == 0 else "nf", linear.weight.shape[axis])


def keep_outputs(linear: Any, kept: Tensor, stacked: int = 1) -> None:
    """Leave only some outputs, of each of ``stacked`` equal parts. kept: int64."""
    axis = 0 if isinstance(linear, nn.Linear) else 1
    part = linear.weight.shape[axis] // stacked
    kept = torch.cat([kept + i * part for i in range(stacked)])
    linear.weight = nn.Parameter(linear.weight.index_select(axis, kept).contiguous())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[kept].clone())
    setattr(linear, "out_features" if axis == 0 else "nf", len(kept))
