"""Batched log-domain Sinkhorn on a GPU: which way each problem is solved, and its solution.

The iterations are in resident_kernel.py and sinkhorn_swept.py, what their programs agree on in
sinkhorn_rules.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dotresize.kernels.resident import Resident, choose
from dotresize.kernels.sinkhorn_device import device_of
from dotresize.kernels.sinkhorn_pool import Pool
from dotresize.kernels.sinkhorn_sheet import O_ERROR, O_ITERATIONS, O_STATUS, STALLED
from dotresize.kernels.sinkhorn_swept import Swept
from dotresize.kernels.sinkhorn_tables import Tile
from dotresize.ops.constants import MOMENTUM, SinkhornBatch, SinkhornSolution

RESIDENT: Pool[Resident] = Pool()
SWEPT: Pool[Swept] = Pool()
# Devices whose programs did not meet: to find that out takes seconds.
STALLING: set[torch.device] = set()
_STALLED = (
    "programs of one launch waited for each other too long, so that this process solves problems "
    "on this device by many launches from now on; is the GPU shared with a debugger, or emulated?"
)


def sinkhorn(
    batch: SinkhornBatch, storage: str, *, stay: bool = True, keep: bool = True
) -> SinkhornSolution:
    """Solve problems of any shapes together, in the costs' type; numbers are on the CPU.

    Problems are grouped by how the sweep holds a row. storage: "exact" or "u16", see
    ``dotresize.sinkhorn``. stay: whether problems that fit stay on the multiprocessors. keep:
    whether others keep a plan in 16 bits between exact sweeps. Both are for comparison.
    """
    groups: dict[tuple[bool, int, int], list[int]] = {}
    widths = {cost.shape[1] for cost in batch.costs}
    held = {width: Tile(width, batch.costs[0].dtype).key for width in widths}
    for i, cost in enumerate(batch.costs):
        groups.setdefault(held[cost.shape[1]], []).append(i)
    if len(groups) == 1:
        f, g, outcome = _solve(batch, storage, stay, keep)
    else:
        f, g, outcome = _solve_groups(batch, list(groups.values()), storage, stay, keep)
    numbers = torch.from_numpy(outcome)
    return SinkhornSolution(
        f,
        g,
        numbers[:, O_ITERATIONS.value].long(),
        numbers[:, O_ERROR.value],
        numbers[:, O_STATUS.value].long(),
    )


def _solve(
    batch: SinkhornBatch, storage: str, stay: bool, keep: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    first = batch.costs[0]
    device = device_of(first.device)
    shapes = tuple(tuple(cost.shape) for cost in batch.costs)
    momentum = bool((batch.acceleration.numpy() == MOMENTUM).any())
    potentials = torch.empty_like(batch.a), torch.empty_like(batch.b)
    stay = stay and first.device not in STALLING
    division = choose(shapes, first.dtype, storage, device) if stay else None
    if division is not None:
        key = (shapes, first.device, division, momentum)
        resident = functools.partial(Resident, shapes, device, division, momentum=momentum)
        with RESIDENT.borrow(key, resident, device.to_keep) as solver:
            outcome = solver.solve(batch, potentials)
        if outcome is not None and not (outcome[:, O_STATUS.value] == STALLED).any():
            return *potentials, outcome
        if outcome is not None:
            STALLING.add(first.device)
            warnings.warn(_STALLED, RuntimeWarning, stacklevel=2)
    key = (shapes, first.dtype, first.device, storage, keep, momentum)
    swept = functools.partial(
        Swept, shapes, first.dtype, device, storage=storage, keep=keep, momentum=momentum
    )
    with SWEPT.borrow(key, swept, device.to_keep) as sweeps:
        return *potentials, sweeps.solve(batch, potentials)


def _solve_groups(
    batch: SinkhornBatch, groups: Sequence[list[int]], storage: str, stay: bool, keep: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    outcomes: dict[int, np.ndarray] = {}
    for members in groups:
        f, g, outcome = _solve(batch.part(members), storage, stay, keep)
        rows, columns = ([batch.costs[i].shape[axis] for i in members] for axis in (0, 1))
        vectors = zip(f.split(rows), g.split(columns), strict=True)
        parts.update(zip(members, vectors, strict=True))
        outcomes.update(zip(members, outcome, strict=True))
    order = range(len(batch.costs))
    f, g = (torch.cat([parts[i][which] for i in order]) for which in (0, 1))
    return f, g, np.stack([outcomes[i] for i in order])
