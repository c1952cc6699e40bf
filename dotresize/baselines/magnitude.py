"""Plain selection: the neurons of largest magnitude stay, and the others are cut off."""

from __future__ import annotations

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.narrow.maps import WidthMap
from dotresize.narrow.one_map import OneMap
from dotresize.narrow.options import Options


class Magnitude(OneMap):
    """Selection of the neurons with the largest mean magnitudes, or of given ones."""

    name = "magnitude"
    takes = frozenset({"targets"})

    def maps(
        self, statistics: list[Statistics], selections: list[Tensor], options: Options
    ) -> list[WidthMap]:
        pairs = zip(statistics, selections, strict=True)
        return [selected(kept, own.importance.shape[1]) for own, kept in pairs]


def selected(selection: Tensor, width: int) -> WidthMap:
    """Return the map that cuts off what is not selected. selection: int64 (k,)."""
    q = torch.zeros(width, len(selection), dtype=torch.float64, device=selection.device)
    q[selection, torch.arange(len(selection), dtype=torch.int64, device=q.device)] = 1.0
    return WidthMap(q, selection)
