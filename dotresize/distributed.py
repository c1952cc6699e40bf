"""Several processes on one compression: ``torchrun --nproc-per-node 2 -m dotresize compress ...``.

Every process has the whole model, or its offloaded weights, and a share of the windows; sums over
tokens are added up over the processes, which then solve the same problems (of many maps, a share
each) and take the same decisions. The first process alone writes and speaks. In a single process
nothing here does anything.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def begin() -> None:
    """Join the group that torchrun describes, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The first process writes a large model while the others wait.
    dist.init_process_group(backend, timeout=timedelta(hours=6))


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_device() -> torch.device:
    """Return the device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def share(windows: Tensor) -> Tensor:
    """Return this process's windows; none where there are fewer than processes."""
    return windows[rank() :: size()]


def total(*sums: Tensor | None) -> None:
    """Replace tensors by their sums over all processes."""
    for value in sums:
        if value is not None and dist.is_initialized():
            dist.all_reduce(value)


def from_first(value: Any, owner: int = 0) -> Any:
    """Return an object as one process has it, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=owner, device=torch.device("cpu"))
    return box[0]


def wait() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
