"""What is called, and how its result is compared with float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kinds import Draw, Odd, tensors


class Call(NamedTuple):
    """A call that may be made odd.

    Attributes:
        function: called with ``arguments`` by keyword.
        arguments: valid ones.
        check: of the arguments in plain form (kinds.plain_of), those handed over, and the
            result; returns what is wrong with it, None if nothing. It may raise ValueError or
            TypeError where the plain arguments are refused.
        fixed: arguments that stay as they are: documented to be ignored, or not the package's.
        own: for some arguments odd values of their own.
        often: arguments that are replaced more often than others.
        after: looks at what the call should have left alone, and says what it has changed.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    check: Callable[[dict, dict, Any], str | None]
    fixed: tuple[str, ...] = ()
    own: Mapping[str, Callable[[Draw], Odd]] = MappingProxyType({})
    often: tuple[str, ...] = ()
    after: Callable[[], str | None] = lambda: None


def apart(found: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    """Return how a result differs from float64, in the sum, relative to the sum."""
    if tuple(found.shape) != tuple(wanted.shape):
        return f"shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    if found.device.type != "cpu":
        return f"result on {found.device}"
    found, wanted = (v.detach().to(torch.float64) for v in (found, wanted))
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return "not finite where float64 is, or the reverse"
    found, wanted = (v.nan_to_num(0.0, 0.0, 0.0) for v in (found, wanted))
    size = float(wanted.abs().sum()) + 1e-30
    off = float((found - wanted).abs().sum()) / size
    return None if off <= tolerance else f"off by {off:.1e} of its sum"


def same_as_plain(function: Callable[..., Any], tolerance: float, **always: Any) -> Callable:
    """Return a check against the same function's result of plain arguments."""

    def check(plain: dict, given: dict, result: Any) -> str | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = function(**{**plain, **always})
        pairs = list(zip(tensors(result), tensors(wanted), strict=True))
        return next((wrong for pair in pairs if (wrong := apart(*pair, tolerance))), None)

    return check
