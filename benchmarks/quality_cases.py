"""The cases of benchmarks.quality: options of ``dotresize.compress``, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dotresize.calibration import Statistics
from dotresize.maps import largest

from .texts import SOURCES

# With all sources in the calibration, and with each one left out in turn.
MIXTURES: dict[str, tuple[str, ...]] = {
    "all": SOURCES,
    **{f"without {left}": tuple(s for s in SOURCES if s != left) for left in SOURCES},
}


@dataclass(frozen=True)
class Case:
    """One row for each calibration.

    Attributes:
        out_of_domain: also run with each source left out of the calibration.
        own_text: calibrate on text that the model writes itself as well.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    out_of_domain: bool = False
    own_text: bool = False


class KeptSet:
    """A kept set from elsewhere, as ``--targets`` takes it; its name is what the rows say."""

    def __init__(self, name: str, choose: Callable[[Statistics, int], Tensor]) -> None:
        self.name, self._choose = name, choose

    def __call__(self, statistics: Statistics, k: int) -> Tensor:
        return self._choose(statistics, k)

    def __str__(self) -> str:
        return self.name


def _random(statistics: Statistics, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(statistics.importance.shape[1], generator=generator)[:k].sort().values


def _second_moment(statistics: Statistics, k: int) -> Tensor:
    """Root mean square instead of mean magnitude: what Wanda multiplies a weight's size by."""
    assert statistics.moment is not None
    return largest(statistics.moment.mean(0).diagonal().sqrt(), k)


KEPT_SETS = {
    "random": KeptSet("random", _random),
    "root mean square": KeptSet("root mean square", _second_moment),
}

PLAIN: dict[str, Any] = {"width": 0.8, "refit": False}
REFIT: dict[str, Any] = {"width": 0.8}
# 27 % of the inner neurons are 20 % of the parameters outside the embeddings.
INNER = {"ff_width": 1126}
BUDGET = {"params": 0.8}
INNER_PLAIN = INNER | {"refit": False}

CASES = (
    Case("magnitude", PLAIN | {"method": "magnitude"}, True),
    Case("transport", PLAIN | {"method": "dot"}, True),
    Case("PCA", PLAIN, True),
    Case("SliceGPT", PLAIN | {"method": "slicegpt"}, True),
    Case("PCA per location", PLAIN | {"scope": "location"}),
    Case("transport per location", PLAIN | {"method": "dot", "scope": "location"}),
    # What `dotresize compress --width 0.8` does, and without one of its parts.
    Case("default", REFIT, True, True),
    Case("default, no own text", REFIT, True),
    Case("default, no refit", PLAIN, True, True),
    Case("default, untied", REFIT | {"untie": True}, own_text=True),
    Case("magnitude + refit", REFIT | {"method": "magnitude"}, own_text=True),
    Case("transport + refit", REFIT | {"method": "dot"}, own_text=True),
    Case("transport, 20 in a row + refit", REFIT | {"method": "dot", "steps": 20}, own_text=True),
    *(Case(f"default, ridge {r:g}", REFIT | {"ridge": r}, True, True) for r in (0.03, 0.3)),
    *(Case(f"transport, {q} in a row", PLAIN | {"method": "dot", "steps": q}) for q in (2, 6, 20)),
    *(Case(f"transport, reg {r:g}", PLAIN | {"method": "dot", "reg": r}) for r in (0.3, 1.0, 10.0)),
    *(
        Case(f"{label}, kept set {name}", PLAIN | {"method": method, "targets": kept})
        for name, kept in KEPT_SETS.items()
        for label, method in (("selection", "magnitude"), ("transport", "dot"))
    ),
    Case(
        "budget, 80 % outside the embeddings",
        BUDGET | {"params_count": "non_embedding"},
        own_text=True,
    ),
    Case("budget, 80 % in total", BUDGET, own_text=True),
    Case("PCA, untied", PLAIN | {"untie": True}),
    Case("transport, untied", PLAIN | {"method": "dot", "untie": True}),
    Case("feed-forward, magnitude", INNER_PLAIN | {"ff_method": "magnitude"}),
    Case("feed-forward, nystrom", INNER_PLAIN | {"ff_method": "nystrom"}),
    Case("feed-forward, transport", INNER_PLAIN | {"ff_method": "transport"}),
    Case("feed-forward, eliminate", INNER_PLAIN),
    Case("feed-forward, eliminate + refit", INNER, True, True),
    *(
        Case(f"feed-forward, eliminate + refit, ridge {r:g}", INNER | {"ridge": r}, own_text=True)
        for r in (0.003, 0.01, 0.03)
    ),
)

HEADLINE = (
    *("magnitude", "transport", "PCA", "SliceGPT", "default"),
    *("feed-forward, magnitude", "feed-forward, nystrom", "feed-forward, eliminate + refit"),
    *("budget, 80 % outside the embeddings", "budget, 80 % in total"),
)
