"""Checks of Sinkhorn problems, and which of them are solved together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dotresize.ops.arguments import FLOAT_NAMES, FLOATS, check_dense, shown
from dotresize.ops.backends import choose
from dotresize.ops.constants import SinkhornBatch
from dotresize.ops.sinkhorn_result import SinkhornResult

# How far the masses of a and b may be apart, relative to the larger.
_MASS_TOLERANCE = 1e-5


class Settings(NamedTuple):
    """What is asked of all problems: (B,) on the CPU, float64, the acceleration int64."""

    reg: Tensor
    tol: Tensor
    acceleration: Tensor
    max_iter: int


def checked(
    cost: Tensor | Sequence[Tensor],
    a: Tensor | Sequence[Tensor] | None,
    b: Tensor | Sequence[Tensor] | None,
    init: tuple | None,
    settings: Settings,
    backend: str,
) -> list[SinkhornBatch]:
    """Return the problems in batches that a backend solves together.

    Raises ValueError with the reason why one cannot be solved.
    """
    if not isinstance(cost, Tensor):
        return _ragged(list(cost), a, b, init, settings, backend)
    if cost.dim() not in (2, 3):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: must be (n, m) or (B, n, m)")
    if cost.dtype not in FLOATS:
        raise ValueError(f"cost has dtype {cost.dtype}: must be floating-point, {FLOAT_NAMES}")
    batch = cost[None] if cost.dim() == 2 else cost
    return [_batch(batch, a, b, init, settings, range(len(batch)))]


def _ragged(
    costs: list[Tensor],
    a: Tensor | Sequence[Tensor] | None,
    b: Tensor | Sequence[Tensor] | None,
    init: tuple | None,
    settings: Settings,
    backend: str,
) -> list[SinkhornBatch]:
    """Return batches of any shapes together; the plain reference alone wants equal shapes."""
    if len(costs) == 0:
        raise ValueError("cost is an empty list: there must be problems with entries")
    for i, cost in enumerate(costs):
        check_dense(f"cost {i} of the list", cost)
        if cost.dim() != 2 or cost.dtype not in FLOATS:
            kind = f"{cost.dim()}-D of {cost.dtype}"
            raise ValueError(f"cost {i} of the list is {kind}: must be 2-D, {FLOAT_NAMES}")
    vectors: dict[str, list[Tensor] | None] = {}
    if init is not None and not (isinstance(init, (tuple, list)) and len(init) == 2):
        raise ValueError("init: must be a result, or a pair of potentials (f, g)")
    starts = None if init is None else init[1]
    for name, value, axis in (("a", a, 0), ("b", b, 1), ("init g", starts, 1)):
        listed = isinstance(value, (list, tuple)) and len(value) == len(costs)
        if value is not None and not listed:
            raise ValueError(f"{name}: for a list of {len(costs)} costs, give a list as long")
        vectors[name] = None if value is None else list(value)
        for i, vector in enumerate(vectors[name] or []):
            check_dense(f"{name} of problem {i}", vector)
            if vector.shape != costs[i].shape[axis : axis + 1]:
                raise ValueError(
                    f"{name} of problem {i}: must have shape ({costs[i].shape[axis]},)"
                )
    groups: dict[tuple, list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault((tuple(cost.shape), cost.dtype, cost.device), []).append(i)
    found = []
    for members in groups.values():
        stacked = {
            name: None if values is None else torch.stack([values[i] for i in members])
            for name, values in vectors.items()
        }
        start = None if init is None else (None, stacked["init g"])
        alike = [costs[i] for i in members]
        found.append(_batch(alike, stacked["a"], stacked["b"], start, settings, members))
    together: dict[tuple, list[SinkhornBatch]] = {}
    for batch in found:
        cost = batch.costs[0]
        mixed = choose(backend, cost.device) != "torch"
        key = (cost.dtype, cost.device, None if mixed else tuple(cost.shape))
        together.setdefault(key, []).append(batch)
    return [SinkhornBatch.joined(parts) for parts in together.values()]


def _batch(
    costs: Tensor | list[Tensor],
    a: Tensor | Sequence[Tensor] | None,
    b: Tensor | Sequence[Tensor] | None,
    init: tuple | None,
    settings: Settings,
    labels: Sequence[int],
) -> SinkhornBatch:
    """Return checked problems of one shape.

    ``labels`` are the caller's numbers of them, for messages.
    """
    if len(costs) == 0 or costs[0].numel() == 0:
        shape = tuple(costs.shape if isinstance(costs, Tensor) else costs[0].shape)
        raise ValueError(f"cost has shape {shape}: there must be problems with entries")
    like, (n, m) = costs[0], costs[0].shape
    rows = _check_marginals("a", a, len(costs), n, like)
    columns = _check_marginals("b", b, len(costs), m, like)
    if a is not None or b is not None:  # uniform ones have mass 1, and a look would wait for a GPU
        columns = _check_masses(rows, columns, labels)
    start = _check_init(init, len(costs), m, like)
    own = {name: getattr(settings, name) for name in ("reg", "tol", "acceleration")}
    if len(labels) < len(settings.reg):  # else they are all, in order
        own = {name: values[list(labels)] for name, values in own.items()}
    return SinkhornBatch(
        labels=labels,
        costs=list(costs),
        a=rows.flatten(),
        b=columns.flatten(),
        g=start.flatten(),
        max_iter=settings.max_iter,
        **own,
    )


def per_problem(name: str, value: float | Tensor, batch: int) -> Tensor:
    """Return one number per problem, float64 (B,) on the CPU; ValueError for anything else."""
    if isinstance(value, float) and math.isfinite(value):  # nearly always
        return torch.full((batch,), value, dtype=torch.float64, device="cpu")
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and results have none by it")
    try:
        if isinstance(value, (str, bytes)) or torch.is_complex(torch.as_tensor(value)):
            raise ValueError
        given = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        accepted = f"must be a number or ({batch},) of them"
        raise ValueError(f"{name} is {shown(value)}: {accepted}") from None
    if given.dim() > 1 or (given.dim() == 1 and given.shape[0] != batch):
        raise ValueError(f"{name} has shape {tuple(given.shape)}: must be a number or ({batch},)")
    if not torch.isfinite(given).all():
        raise ValueError(f"{name} is {_first_wrong(given)}: must be finite")
    return given.expand(batch).contiguous()


def _is_real(value: Tensor) -> bool:
    return value.dtype in FLOATS or not (value.is_floating_point() or value.is_complex())


def _first_wrong(values: Tensor) -> str:
    """Return numbers in one line, those of a vector up to the first that is at fault."""
    if values.dim() == 0:
        return f"{float(values):g}"
    wrong = (~torch.isfinite(values)).nonzero()
    return f"{float(values[wrong[0, 0]]):g} at problem {int(wrong[0, 0])}"


def _check_marginals(
    name: str, value: Tensor | Sequence[Tensor] | None, batch: int, length: int, like: Tensor
) -> Tensor:
    """Return marginals, float64 (batch, length), with their graph; None is uniform with mass 1."""
    if value is None:
        uniform = 1 / max(1, length)
        return torch.full((batch, length), uniform, dtype=torch.float64, device=like.device)
    shared, own = (length,), (batch, length)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a tensor of shape {shared}")
    given = check_dense(name, value)
    if tuple(given.shape) not in (shared, own) or not _is_real(given):
        kind = f"{tuple(given.shape)} of {given.dtype}"
        raise ValueError(f"{name} has shape {kind}: must be {shared} or {own}, real numbers")
    if given.device != like.device:
        raise ValueError(f"{name} is on {given.device}, the cost on {like.device}")
    given = given.double()
    if not (torch.isfinite(given).all() and (given >= 0).all()):
        raise ValueError(f"{name} holds a negative or non-finite entry")
    return given.expand(batch, length).contiguous()


def _check_masses(a: Tensor, b: Tensor, labels: Sequence[int]) -> Tensor:
    """Return b scaled to the mass of a, which it must have up to rounding."""
    masses_a, masses_b = a.sum(1), b.sum(1)
    apart = (masses_a - masses_b).abs() > _MASS_TOLERANCE * torch.maximum(masses_a, masses_b)
    wrong = (apart | (masses_a == 0)).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"marginals of problem {labels[i]} sum to {masses_a[i]:.9g} (a) and {masses_b[i]:.9g} "
            "(b): both sums must be positive and equal"
        )
    # float32 marginals sum alike to rounding only; scaled to the rows' mass exactly, tol can hold.
    return b * (masses_a / masses_b)[:, None]


def _check_init(init: tuple | None, batch: int, m: int, like: Tensor) -> Tensor:
    """Return the initial g, a new float64 (B, m)."""
    if init is None:
        return torch.zeros(batch, m, dtype=torch.float64, device=like.device)
    g = init[1] if isinstance(init, (tuple, list)) and len(init) == 2 else None
    if isinstance(g, Tensor):
        check_dense("init: g", g)
    if not isinstance(g, Tensor) or not _is_real(g) or tuple(g.shape) not in ((batch, m), (m,)):
        raise ValueError(f"init: g, its second entry, must be a tensor of shape {(batch, m)}")
    if g.device != like.device:
        raise ValueError(f"init: g is on {g.device}, the cost on {like.device}")
    # A column that had no mass before may have some now.
    g = torch.nan_to_num(g.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)
    return g.expand(batch, m).clone(memory_format=torch.contiguous_format)


def rescaled(init: SinkhornResult, reg: Tensor, ragged: bool) -> tuple:
    """Start potentials from a result, possibly of another reg: reg g is what hardly changes."""
    found = [(problem.g, problem.reg) for problem in init._problems]
    if len(found) == 1 < len(reg):
        found *= len(reg)
    if len(found) != len(reg):
        raise ValueError(f"init holds {len(found)} problems: must be {len(reg)}, or one for all")
    starts = [g * (old / new) for (g, old), new in zip(found, reg.tolist(), strict=True)]
    if ragged:
        return None, starts
    if len({start.shape for start in starts}) > 1:
        raise ValueError("init holds problems of different shapes: the costs are of one")
    return None, torch.stack(starts)
