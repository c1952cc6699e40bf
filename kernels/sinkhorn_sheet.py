"""What the host tells a Sinkhorn solve and hears of it: one block of memory, copied in and out.

Every copy between host and device, every launch and every wait costs a small problem more than
an iteration of it. So all numbers of a solve lie in one block: problem lines and settings go in
together with the zeros that counters begin with, and what became of each problem comes back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from dotresize.kernels.sinkhorn_tables import AT_OFFSET, AT_STRIDE, LINE
from dotresize.ops.constants import LOG2E, MOMENTUM, SinkhornBatch

# Stands for "not stopped yet" in a status; the other codes are in ops/constants.py.
RUNNING = -1
# Of a problem that a launch left unsolved, and of one whose cost is too coarse in 16 bits.
STALLED, TOO_COARSE = -2, 4
# What is asked of a problem: a line of float64.
N_REG = tl.constexpr(0)
N_PER_REG = tl.constexpr(1)  # log2(e) / reg
N_TOL = tl.constexpr(2)
N_MOMENTUM = tl.constexpr(3)  # 1 or 0
N_MAX_ITER = tl.constexpr(4)
NUMBERS = tl.constexpr(8)
# What became of it: another.
O_ITERATIONS = tl.constexpr(0)
O_ERROR = tl.constexpr(1)
O_SPAN = tl.constexpr(2)  # the largest cost above its row's minimum
O_EXACT = tl.constexpr(3)  # sweeps that read the cost
O_STATUS = tl.constexpr(4)  # how it ended
OUTCOME = tl.constexpr(8)
# The largest 16-bit cost, and by how much an exponent may be off for them to be accepted.
LARGEST_LEVEL, COARSEST = 65535, 0.02


class Sheet:
    """Holds the block, on the host (pinned, beside a GPU) and on the device; views of both.

    ``lines`` int64 (B, LINE), ``numbers`` float64 (B, NUMBERS), ``outcome`` float64 (B, OUTCOME),
    ``status`` int32 (B,): RUNNING, or what ended it early; ``counters`` int32. Those of the host
    are numpy, with ``host_`` in front.
    """

    def __init__(self, problems: int, counters: int, device: torch.device) -> None:
        ends = np.cumsum(
            [problems * LINE.value, problems * NUMBERS.value, problems * OUTCOME.value]
        )
        words = int(ends[-1]) + (problems + 1) // 2 + (counters + 1) // 2
        pinned = device.type == "cuda"
        self._host = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._device = self._host.to(device, copy=True)
        self.lines, self.numbers, self.outcome, self.status, self.counters = _views(
            self._device, ends, problems
        )
        on_host = [view.numpy() for view in _views(self._host, ends, problems)]
        self.host_lines, self.host_numbers, self.host_outcome, self.host_status = on_host[:4]
        self.host_counters = on_host[4]

    def send(self, batch: SinkhornBatch, costs: Sequence[Tensor], base: Tensor) -> None:
        """Fill the host's block, but for the lines' static columns, and copy it to the device.

        Costs are found by their distance from the first entry of ``base``, which a captured graph
        may keep.
        """
        size, origin = costs[0].element_size(), base.data_ptr()
        self.host_lines[:, AT_OFFSET.value] = [(c.data_ptr() - origin) // size for c in costs]
        self.host_lines[:, AT_STRIDE.value] = [cost.stride(0) for cost in costs]
        reg = batch.reg.numpy()
        self.host_numbers[:, N_REG.value] = reg
        self.host_numbers[:, N_PER_REG.value] = LOG2E / reg
        self.host_numbers[:, N_TOL.value] = batch.tol.numpy()
        self.host_numbers[:, N_MOMENTUM.value] = batch.acceleration.numpy() == MOMENTUM
        self.host_numbers[:, N_MAX_ITER.value] = batch.max_iter
        self.host_outcome[:] = 0
        self.host_outcome[:, O_ERROR.value] = np.nan
        self.host_outcome[:, O_STATUS.value] = STALLED
        self.host_status[:] = RUNNING
        self.host_counters[:] = 0
        self._device.copy_(self._host, non_blocking=True)

    def receive(self) -> None:
        """Copy the block back to the host, and wait until all before it is done."""
        self._host.copy_(self._device, non_blocking=True)
        if self._device.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()


def exponent_errors(outcome: np.ndarray, batch: SinkhornBatch) -> np.ndarray:
    """Return by how much 16 bits would change each problem's cost / reg, at most."""
    return outcome[:, O_SPAN.value] / (2 * LARGEST_LEVEL * batch.reg.numpy())


def refuse(coarse: np.ndarray, outcome: np.ndarray, batch: SinkhornBatch) -> None:
    """Raise ValueError with the worst of those problems, if there are any."""
    if coarse.any():
        error = exponent_errors(outcome, batch)
        worst = int(np.where(coarse, error, -np.inf).argmax())
        raise ValueError(
            f"storage 'u16' would change cost / reg of problem {batch.labels[worst]} by up to "
            f"{error[worst]:.2g}: accepted is {COARSEST}; use storage 'exact', or a reg of at "
            f"least {outcome[worst, O_SPAN.value] / (2 * LARGEST_LEVEL * COARSEST):.3g}"
        )


def _views(block: Tensor, ends: np.ndarray, problems: int) -> tuple[Tensor, ...]:
    first, second, third = (int(end) for end in ends)
    small = block[third:].view(torch.int32)
    return (
        block[:first].view(problems, -1),
        block[first:second].view(torch.float64).view(problems, -1),
        block[second:third].view(torch.float64).view(problems, -1),
        small[:problems],
        small[(problems + 1) // 2 * 2 :],
    )
