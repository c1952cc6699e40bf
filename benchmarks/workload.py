"""What is timed: one piece of work, and everyone who can do it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def one_line(error: BaseException) -> str:
    """Return an exception as a short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class NotHere(Exception):
    """A competitor cannot take part; the message says why."""


def need(module: str, install: str) -> Any:
    """Return the module, or raise NotHere with the way to install it."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise NotHere(f"not installed: pip install {install}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"installed, but cannot be imported: {error}") from None


def need_installed(install: str) -> None:
    """Raise NotHere with the way to install it, unless this package is installed."""
    try:
        importlib.metadata.version(install)
    except importlib.metadata.PackageNotFoundError:
        raise NotHere(f"not installed: pip install {install}") from None


@dataclass(frozen=True)
class Case:
    """An operator and the sizes of one piece of work, as they go into a row."""

    operator: str  # "l1", "gradient", "sinkhorn" or "assignment"
    sizes: dict[str, int]
    kind: str = ""  # of an assignment's scores, or whose gradient is wanted

    @property
    def shape(self) -> str:
        s = self.sizes
        many = f"{s['problems']} of " if s.get("problems", 1) > 1 else ""
        return f"{many}{s['n']} x {s['m']}"

    @property
    def label(self) -> str:
        s, shape = self.sizes, self.shape
        if self.operator == "l1":
            return f"L1 cost, {s['tokens']} tokens, {shape}"
        if self.operator == "gradient":
            return f"L1 gradient {self.kind}, {s['tokens']} tokens, {shape}"
        if self.operator == "assignment":
            return f"Assignment, {self.kind}, {shape}"
        return f"Sinkhorn, {s['iterations']} iterations, {shape}"

    @property
    def work(self) -> int:
        """Return pairs of activations, or entries times iterations."""
        s = self.sizes
        return s.get("problems", 1) * s["n"] * s["m"] * s.get("tokens", 1) * s.get("iterations", 1)


@dataclass(frozen=True)
class Competitor:
    """One way to do the work. ``call`` gives a result that ``Workload.error`` understands."""

    call: Callable[[], Any]
    accepted: float = 1e-4  # relative error against float64
    temporaries: bool = False  # allocates and frees large arrays, so that malloc's choices count
    checked: bool = True  # False only for a bound, which computes nothing of use


@dataclass
class Workload:
    """Competitors over the same inputs, and those that cannot take part with the reason."""

    error: Callable[[Any], float]
    competitors: dict[str, Competitor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Callable[[], Competitor]) -> None:
        try:
            self.competitors[name] = build()
        except NotHere as reason:
            self.missing[name] = str(reason)
        except Exception as error:  # a peer that changed must not end the run
            self.missing[name] = f"cannot be prepared: {one_line(error)}"
