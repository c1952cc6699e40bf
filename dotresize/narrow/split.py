"""How a parameter budget is split: the shape that spends it, and the shapes that were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dotresize.models.causal_lm import CausalLM
from dotresize.models.fewer_layers import kept_layers
from dotresize.narrow.allocation import Allocation
from dotresize.narrow.choose_width import by_layer
from dotresize.narrow.options import Shape


class Tried(NamedTuple):
    """A shape, as the report names it, and what it was found to cost.

    Attributes:
        width, ff_width: residual and feed-forward width, of different ones the widest.
        dropped: numbers of the layers that are left out.
        by_layer: whether each layer has a feed-forward width of its own.
        predicted: loss in nats; None where nothing predicts it.
        excess: on held-out windows; None where it was not measured, or is not finite.
    """

    width: int
    ff_width: int
    dropped: tuple[int, ...] = ()
    by_layer: bool = False
    predicted: float | None = None
    excess: float | None = None


@dataclass(frozen=True)
class Split:
    """A shape that fits a budget, and why this one.

    Attributes:
        width, inner: residual and feed-forward width.
        params, count: the share of which parameters that they fit.
        layer_widths: whether layers may get widths of their own.
        search: what was said of trying other shapes.
        dropped: numbers of the layers that are left out.
        allocation: of feed-forward widths to the layers; None where all get the same.
        tried: the shapes that it was chosen from.
    """

    width: int
    inner: int
    params: float = 1.0
    count: str = "total"
    layer_widths: bool = False
    search: bool | None = None
    dropped: tuple[int, ...] = ()
    allocation: Allocation | None = None
    tried: tuple[Tried, ...] = ()

    @property
    def excess(self) -> float | None:
        """The excess that was measured, on held-out windows; None where none was."""
        chosen = (self.width, self.inner, self.dropped, self.allocation is not None)
        return next((own.excess for own in self.tried if own[:4] == chosen), None)

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        allocation = None if self.allocation is None else vars(self.allocation)
        return vars(self) | {
            "allocation": allocation,
            "tried": [own._asdict() for own in self.tried],
        }

    @classmethod
    def recorded(
        cls,
        *,
        tried: list[dict[str, Any]],
        dropped: list[int],
        allocation: dict[str, Any] | None,
        **others: Any,
    ) -> Split:
        """Return a split whose fields have been through JSON."""
        found = [Tried(**own | {"dropped": tuple(own["dropped"])}) for own in tried]
        return cls(
            tried=tuple(found),
            dropped=tuple(dropped),
            allocation=None if allocation is None else Allocation.recorded(**allocation),
            **others,
        )

    def details(self) -> dict[str, Any]:
        """Return what the report says of it."""
        return {"excess": self.excess, "tried": [own._asdict() for own in self.tried]}


def shape_of(split: Split, model: CausalLM) -> Shape:
    """Return the shape that a split stands for."""
    if split.allocation is not None:
        return Shape(split.width, split.allocation.widths, split.dropped)
    own = model.inner_widths
    inner = by_layer(model, split.inner)
    if inner is not None:
        inner = [inner[i] for i in kept_layers(len(own), split.dropped)]
    return Shape(split.width, inner, split.dropped)
