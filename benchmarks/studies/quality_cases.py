"""The cases of benchmarks.studies.quality: options of ``dotresize.compress``, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dotresize.calibration.statistics import Statistics
from dotresize.models import architecture_of
from dotresize.narrow.maps import largest

from ..demo.texts import SOURCES

# Of calibration text, unless the command says otherwise.
WINDOWS = 24

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
        likely: of that text, leave out the fifth that is least likely under the model, and write
            as much more (arXiv 2410.17711).
        kept: of ``KEPT_SETS``, in place of the largest mean magnitudes.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    out_of_domain: bool = False
    own_text: bool = False
    likely: bool = False
    kept: str | None = None


def _random(model: Any, statistics: Statistics, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(statistics.importance.shape[1], generator=generator)[:k].sort().values


def _wanda(model: Any, statistics: Statistics, k: int) -> Tensor:
    """Return Wanda's score |W_ij| |x_j| (arXiv 2306.11695), summed over all that read neuron j."""
    assert statistics.moment is not None
    architecture = architecture_of(model.config)
    score = torch.zeros(statistics.importance.shape[1], dtype=torch.float64)
    for (layer, sublayer), moment in zip(architecture.each(model), statistics.moment, strict=False):
        scale = architecture.gain(model.get_submodule(f"{layer}.{sublayer.norm}")).abs()
        for reader in sublayer.readers:
            weight = model.get_parameter(f"{layer}.{reader}").double().abs()
            score += weight.sum(0) * scale * moment.diagonal().sqrt()
    return largest(score.detach(), k)


# Kept sets from elsewhere; beside them, the largest mean magnitudes are the package's own choice.
KEPT_SETS: dict[str, Callable[[Any, Statistics, int], Tensor]] = {
    "random": _random,
    "Wanda": _wanda,
}

# 468 of 576 channels, whatever a share would be rounded to.
PLAIN: dict[str, Any] = {"width": 468, "refit": False}
REFIT: dict[str, Any] = {"width": 468}
PCA: dict[str, Any] = {"method": "pca", "sensitivity": False}
LIMIT: dict[str, Any] = {"method": "dot", "sensitivity": False}
ONE: dict[str, Any] = LIMIT | {"steps": 1}
HEEDS = {"sensitivity": True}
# 27 % of the inner neurons are 20 % of the parameters outside the embeddings.
INNER = {"ff_width": 1126}
BUDGET = {"params": 0.8, "search": True}
INNER_PLAIN = INNER | {"refit": False}

# What the default map rests on: each refitted, with text of the model's own.
MAPS = (
    Case("transport in its limit, sensitivity", REFIT | LIMIT | HEEDS, True, True),
    Case("principal directions, sensitivity", REFIT | PCA | HEEDS, True, True),
    Case("transport in its limit", REFIT | LIMIT, True, True),
    Case("principal directions", REFIT | PCA, True, True),
    Case("20 transports", REFIT | LIMIT | {"steps": 20}, True, True),
    Case("one transport", REFIT | ONE, True, True),
    Case("magnitude", REFIT | {"method": "magnitude"}, True, True),
)

# How much text the refit needs, with text of the model's own.
AMOUNTS = tuple(
    Case(f"{name}, {'refit' if refit else 'no refit'}", size | {"refit": refit}, True, True)
    for name, size in (("468 channels", {"width": 468}), ("1152 inner neurons", {"ff_width": 1152}))
    for refit in (True, False)
)

# 80 % outside the embeddings: as many neurons for each layer, or by what each is worth, and what
# the search of a budget chooses.
BY_LAYER = {"layer_widths": True}
OUTSIDE = BUDGET | {"params_count": "non_embedding"}
LAYERS = (
    Case("equal widths", INNER, own_text=True),
    Case("a width for each layer", INNER | BY_LAYER, own_text=True),
    Case("the search", OUTSIDE, own_text=True),
    Case("the search, with a width for each layer", OUTSIDE | BY_LAYER, own_text=True),
    Case("80 % in total, equal widths", {"params": 0.8}, own_text=True),
    Case("80 % in total, the search", BUDGET, own_text=True),
)

# For models of other sizes, whose layers may differ in kind: four fifths of the feed-forwards.
FOUR_FIFTHS = {"ff_width": 0.8}
SHARES = (
    Case("magnitude", FOUR_FIFTHS | {"ff_method": "magnitude", "refit": False}, own_text=True),
    Case("equal widths", FOUR_FIFTHS, own_text=True),
    Case("a width for each layer, padded", FOUR_FIFTHS | BY_LAYER | {"pad": True}, own_text=True),
)

# What more text, and shorter windows of it, are worth: the channels that are kept here are those of
# the other tables.
RECIPES = (
    Case("equal widths", INNER, True, True),
    Case("equal widths, likely text of its own", INNER, True, True, likely=True),
    Case("equal widths, given text alone", INNER, True),
    Case("a width for each layer", INNER | BY_LAYER, True, True),
    Case("468 channels", REFIT, True, True),
)

CASES = (
    Case("magnitude", PLAIN | {"method": "magnitude"}, True),
    Case("transport", PLAIN | ONE, True),
    Case("PCA", PLAIN | PCA, True),
    Case("SliceGPT", PLAIN | {"method": "slicegpt"}, True),
    Case("PCA per location", PLAIN | PCA | {"scope": "location"}),
    Case("transport per location", PLAIN | ONE | {"scope": "location"}),
    Case("SliceGPT + refit", REFIT | {"method": "slicegpt"}, own_text=True),
    Case("PCA per location + refit", REFIT | PCA | {"scope": "location"}, own_text=True),
    Case("transport per location + refit", REFIT | ONE | {"scope": "location"}, own_text=True),
    # With text of the model's own, and without one of the parts.
    Case("PCA + refit", REFIT | PCA, True, True),
    Case("PCA + refit, no own text", REFIT | PCA, True),
    Case("PCA, own text", PLAIN | PCA, True, True),
    Case("PCA + refit, untied", REFIT | PCA | {"untie": True}, own_text=True),
    Case("magnitude + refit", REFIT | {"method": "magnitude"}, own_text=True),
    Case("transport + refit", REFIT | ONE, own_text=True),
    Case("transport, 20 in a row + refit", REFIT | LIMIT | {"steps": 20}, own_text=True),
    *(
        Case(f"PCA + refit, ridge {r:g}", REFIT | PCA | {"ridge": r}, True, True)
        for r in (0.03, 0.3)
    ),
    *(Case(f"transport, {q} in a row", PLAIN | LIMIT | {"steps": q}) for q in (2, 6, 20)),
    *(Case(f"transport, reg {r:g}", PLAIN | ONE | {"reg": r}) for r in (0.3, 1.0, 10.0)),
    *(
        Case(f"{label}, kept set {name}", options, own_text="refit" in label, kept=name)
        for name in KEPT_SETS
        for label, options in (
            ("selection", PLAIN | {"method": "magnitude"}),
            ("transport", PLAIN | ONE),
            ("transport + refit", REFIT | ONE),
        )
    ),
    Case("budget, 80 % outside the embeddings", OUTSIDE, own_text=True),
    Case("budget, 80 % in total", BUDGET, own_text=True),
    # As many outside the embeddings by both widths, whatever the budget chose.
    Case("both widths + refit", PCA | {"width": 567, "ff_width": 1152}, own_text=True),
    # What the first channels cost, by which the budget leaves them all.
    *(Case(f"{k} channels", PCA | {"width": k}, own_text=True) for k in (567, 558)),
    # What 80 % in total is compared with: 19.7 % fewer parameters, all of them inner neurons.
    *(
        Case(f"feed-forward 1024, {name}", {"ff_width": 1024, "ff_method": name, "refit": False})
        for name in ("magnitude", "nystrom", "transport")
    ),
    Case("feed-forward 1024, eliminate + refit", {"ff_width": 1024}, own_text=True),
    Case("PCA, untied", PLAIN | PCA | {"untie": True}),
    Case("transport, untied", PLAIN | ONE | {"untie": True}),
    Case("feed-forward, magnitude", INNER_PLAIN | {"ff_method": "magnitude"}),
    Case("feed-forward, nystrom", INNER_PLAIN | {"ff_method": "nystrom"}),
    Case("feed-forward, transport", INNER_PLAIN | {"ff_method": "transport"}),
    Case("feed-forward, eliminate", INNER_PLAIN),
    Case("feed-forward, eliminate + refit", INNER, True, True),
    *(
        Case(f"feed-forward, eliminate + refit, ridge {r:g}", INNER | {"ridge": r}, own_text=True)
        for r in (0.03, 0.3)
    ),
)

HEADLINE = (
    *("magnitude", "transport", "PCA", "SliceGPT", "PCA + refit"),
    *("feed-forward, magnitude", "feed-forward, nystrom", "feed-forward, eliminate + refit"),
    *("budget, 80 % outside the embeddings", "budget, 80 % in total"),
)
