"""What a user may choose about a compression, checked before anything expensive."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dotresize import budget, feed_forward, maps
from dotresize.refit import RIDGE
from dotresize.targets import Targets

METHODS = ("pca", "dot", "magnitude", "slicegpt")
SCOPES = ("global", "location")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of ``dotresize.compress``, where each is described."""

    width: float | None = None
    energy: float | None = None
    params: float | None = None
    params_count: str = "total"
    method: str = "pca"
    targets: Targets = field(default=None, compare=False)  # tensors have no one truth value
    scope: str = "global"
    ff_width: float | None = None
    ff_method: str = "eliminate"
    refit: bool = True
    ridge: float = RIDGE
    reg: float = 3.0
    steps: int = 1
    factor: str = "polar"
    untie: bool = False
    self_windows: int | None = None
    seed: int = 0
    backend: str = "auto"
    batch_windows: int = 4
    figures: bool = False

    @property
    def per_location(self) -> bool:
        """Whether every residual location has a map of its own."""
        return self.scope == "location" or self.method == "slicegpt"

    def own_windows(self, given: int) -> int:
        """How many windows the model writes itself, beside those given."""
        return given // 3 if self.self_windows is None else self.self_windows

    def check(self) -> None:
        """ValueError for the first choice that would be refused whatever the model."""
        self._check_words()
        self._check_numbers()
        if self.energy is not None and self.width is not None:
            raise ValueError("give width or energy, not both")
        asked = {"width": self.width, "energy": self.energy, "ff_width": self.ff_width}
        for name, value in asked.items():
            if self.params is not None and value is not None:
                raise ValueError(f"give params or {name}, not both: params chooses both widths")
        if self.targets is not None and self.method not in ("dot", "magnitude"):
            raise ValueError(f"targets: method {self.method} has none; give dot or magnitude")
        if self.ff_method != "eliminate" and self.ff_width is None and self.params is None:
            raise ValueError(f"ff_method {self.ff_method}: does nothing without ff_width or params")
        if self.params_count != "total" and self.params is None:
            raise ValueError(f"params_count {self.params_count}: does nothing without params")
        by_rule = "energy" if self.energy is not None else "params"
        if isinstance(self.targets, Tensor) and getattr(self, by_rule) is not None:
            raise ValueError(f"targets: their number is the width; leave {by_rule} out")
        if self.per_location:
            self._check_per_location()

    def _check_words(self) -> None:
        allowed = {
            "method": METHODS,
            "scope": SCOPES,
            "ff_method": feed_forward.METHODS,
            "factor": maps.FACTORS,
            "params_count": budget.COUNTS,
        }
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: must be one of {', '.join(words)}"
                )

    def _check_numbers(self) -> None:
        if not 0 < self.reg < float("inf"):
            raise ValueError(f"reg {self.reg:g}: must be positive and finite")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: must be at least 1")
        if self.self_windows is not None and self.self_windows < 0:
            raise ValueError(f"self_windows {self.self_windows}: must not be negative")
        if not 0 < self.ridge < float("inf"):
            raise ValueError(f"ridge {self.ridge:g}: must be positive and finite")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy {self.energy:g}: must be a share of the variance in (0, 1]")

        if self.params is not None and not 0 < self.params <= 1:
            raise ValueError(f"params {self.params:g}: must be a share of the parameters in (0, 1]")

    def _check_per_location(self) -> None:
        """Adapters at every residual connection: for comparison, and no more than that."""
        what = "method slicegpt" if self.method == "slicegpt" else "scope location"
        if self.ff_width is not None or self.params is not None:
            raise ValueError(f"{what}: narrows the residual only; leave ff_width and params out")
        if self.method == "magnitude":
            raise ValueError(f"{what}: must be of pca or dot")
