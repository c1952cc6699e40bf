"""``python -m benchmarks.checks.interrupts``: how soon Ctrl-C ends every C++ kernel.

Each kernel is started on work of minutes, a signal is sent after some time, and the time from the
signal to the exception is taken. Fails where one takes longer than ACCEPTED. With ``--out FILE`` a
JSON line is appended.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dotresize import assignment, l1_cost, sinkhorn

from ..rows import append, where

ACCEPTED = 0.3
AFTER = (0.3, 0.7, 1.1)


def calls() -> dict[str, Callable[[], object]]:
    """Return work that takes far longer than any signal waits."""
    cost, many = torch.rand(3000, 3000), torch.rand(40, 300, 300, dtype=torch.float64)
    large, x = torch.rand(12000, 12000), torch.randn(100000, 2000)
    hard = torch.arange(7e3)[:, None] * torch.arange(7e3)
    leaf = torch.randn(40000, 1500, requires_grad=True)
    loss = l1_cost(leaf).sum()
    endless = {"tol": 0.0, "max_iter": 10**6}
    return {
        "sinkhorn": lambda: sinkhorn(cost, 1e-3, **endless),
        "sinkhorn, 12000 x 12000": lambda: sinkhorn(large, 1e-3, **endless),
        "sinkhorn, a batch in float64": lambda: sinkhorn(many, 1e-3, **endless),
        "l1_cost": lambda: [l1_cost(x) for _ in range(99)],
        "l1_cost, u8": lambda: [l1_cost(x, precision="u8") for _ in range(99)],
        "l1_cost, gradient": lambda: [loss.backward(retain_graph=True) for _ in range(99)],
        "assignment": lambda: assignment(hard),
        "assignment, a batch": lambda: assignment(hard.expand(4, -1, -1)),
    }


def latency(call: Callable[[], object], after: float) -> float:
    """Return the seconds from a signal to the exception that it raises."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0]
    timer.cancel()
    raise SystemExit("a call ended before its signal: it is too small for this machine")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON line is appended to this file")
    arguments = parser.parse_args()
    found = {}
    for name, call in calls().items():
        found[name] = max(latency(call, after) for after in AFTER)
        late = "" if found[name] <= ACCEPTED else f"  LATER than {ACCEPTED} s"
        print(f"{name:30} {found[name]:6.3f} s after the signal{late}", flush=True)
    if arguments.out is not None:
        seconds = {name: round(value, 4) for name, value in found.items()}
        row = where(threads=torch.get_num_threads()) | {"interrupts": seconds}
        append(arguments.out, [row | {"accepted_s": ACCEPTED}])
    return 0 if max(found.values()) <= ACCEPTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
