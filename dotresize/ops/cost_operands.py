"""What every cost between neurons takes and returns, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dotresize.ops.arguments import check_dense, index_tensor
from dotresize.ops.constants import DTYPES

REDUCTIONS = ("mean", "sum")
OVERFLOW = "the sum over tokens overflows float32"


class CostStatistics(NamedTuple):
    """Statistics of each problem's cost, to choose reg by: numbers, or float64 ``(B,)``.

    Example:
        >>> import torch
        >>> from dotresize import l1_cost
        >>> _, found = l1_cost(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), statistics=True)
        >>> found.maximum, found.mean
        (0.5, 0.25)
    """

    minimum: float | Tensor
    maximum: float | Tensor
    mean: float | Tensor


def statistics(cost: Tensor) -> Tensor:
    """Return minimum, maximum and mean of each problem, float64 (B, 3).

    They are not finite if an entry is not, and NaN where there is none.
    """
    if not cost.numel():
        return cost.new_full((len(cost), 3), torch.nan, dtype=torch.float64)
    flat = cost.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    return torch.stack([low.double(), high.double(), flat.mean(1, dtype=torch.float64)], 1)


def statistics_of(found: Tensor, single: bool) -> CostStatistics:
    """Return what a caller gets of minima, maxima and means, float64 (B, 3)."""
    return CostStatistics(*(found[0].tolist() if single else found.unbind(1)))


class Given(NamedTuple):
    """The operands of a cost, and where it goes.

    Attributes:
        x, y: (B, T, n) and (B, T, m), without a graph; y is None where it is x, or some of x.
        targets: int64 (B, m), which neurons of x are y.
        result: float32 (B, n, m), to be written.
        single: whether the caller gave one problem, without an axis for it.
        gradient: whether x or y requires one.
    """

    x: Tensor
    y: Tensor | None
    targets: Tensor | None
    result: Tensor
    single: bool
    gradient: bool

    def check_finite(self, found: Tensor) -> None:
        """Raise ValueError, naming the neuron at fault, unless a cost is finite by its statistics.

        It is if the activations are; only if not are they looked at.
        """
        if not self.result.numel() or torch.isfinite(found).all():
            return
        check_activations(self.x, "x")
        if self.y is not None:
            check_activations(self.y, "y")
        raise ValueError(OVERFLOW)


def given(x: Tensor, y: Tensor | None, targets: Tensor | None, out: Tensor | None) -> Given:
    """Return what a caller gave; ValueError for what no cost takes."""
    check_dense("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: must be (T, n) or (B, T, n)")
    single = x.dim() == 2
    x3, y3, index = operands(x, y, targets)
    if x3.shape[1] == 0:
        raise ValueError("x has no tokens: there must be at least one")
    shape = (x3.shape[0], x3.shape[2], _count(x3, y3, index))
    gradient = wants_gradient(x, y)
    if out is not None and gradient:
        raise ValueError("out: carries no gradient, and x or y requires one; leave out away")
    return Given(x3, y3, index, _check_out(out, shape, single, x.device), single, gradient)


def wants_gradient(x: Tensor, y: Tensor | None) -> bool:
    wanted = x.requires_grad or (y is not None and y.requires_grad)
    return wanted and torch.is_grad_enabled()


def operands(
    x: Tensor, y: Tensor | None, targets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return x and y as (B, T, neurons), targets as contiguous (B, m), all checked."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: must be float32, float16 or bfloat16")
    if y is not None and targets is not None:
        raise ValueError("give y or targets, not both")
    x3 = (x if x.dim() == 3 else x[None]).detach().resolve_neg()
    if y is not None:
        check_dense("y", y)
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"y is {y.dtype} on {y.device}, x is {x.dtype} on {x.device}")
        if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: all but the last axis must be as in x, "
                f"{tuple(x.shape)}"
            )
        return x3, (y if y.dim() == 3 else y[None]).detach().resolve_neg(), None
    if targets is None:
        return x3, None, None
    if not isinstance(targets, Tensor):
        targets = index_tensor("targets", targets).to(x.device)
    check_targets(targets, x3.shape[0], x3.shape[2], x.dim() == 2)
    if targets.device != x.device:
        raise ValueError(f"targets are on {targets.device}, x on {x.device}")
    return x3, None, batched_index(targets, x3.shape[0])


def batched_index(targets: Tensor, batch: int) -> Tensor:
    """Return targets as contiguous (B, m)."""
    return (targets if targets.dim() == 2 else targets.expand(batch, -1)).contiguous()


def check_targets(targets: Tensor, batch: int, n: int, single: bool) -> None:
    """Raise ValueError unless targets are int64 (m,) or, for a batch, (batch, m), within 0..n-1."""
    check_dense("targets", targets)
    shapes: tuple[int, ...] = (1,) if single else (1, 2)
    wrong_batch = targets.dim() == 2 and targets.shape[0] != batch
    if targets.dtype != torch.int64 or targets.dim() not in shapes or wrong_batch:
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 (m,)"
            + ("" if single else f" or ({batch}, m)")
        )
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= n):
        bad = targets[(targets < 0) | (targets >= n)][0].item()
        raise ValueError(f"targets hold {bad}: must be from 0 to {n - 1}")


def _check_out(
    out: Tensor | None, shape: tuple[int, int, int], single: bool, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    check_dense("out", out)
    wanted = shape[1:] if single else shape
    if (
        tuple(out.shape) != wanted
        or out.dtype != torch.float32
        or out.device != device
        or not out.is_contiguous()
        or out.is_neg()
        or (out.requires_grad and torch.is_grad_enabled())
    ):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}: must be contiguous "
            f"float32 of shape {wanted} on {device}, without a gradient of its own"
        )
    return out[None] if single else out


def _count(x: Tensor, y: Tensor | None, index: Tensor | None) -> int:
    return y.shape[2] if y is not None else x.shape[2] if index is None else index.shape[1]


def check_activations(value: Tensor, name: str) -> None:
    """Raise ValueError naming the first problem and neuron that are not finite.

    value: (B, T, n).
    """
    finite = torch.isfinite(value)
    if finite.all():
        return
    problem, neuron = (~finite.all(1)).nonzero()[0].tolist()
    raise ValueError(f"activations {name} of problem {problem}, neuron {neuron} are not finite")
