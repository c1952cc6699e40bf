"""Ctrl-C in the middle of a C++ kernel: it stops, nothing is leaked, the next call is right."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A solve of minutes. The signal comes from a thread of its own, as from a terminal.
CALLS = {
    "sinkhorn, a team": "sinkhorn(torch.rand(1500, 1500), 1e-3, tol=0, max_iter=10**6)",
    "sinkhorn, many": "sinkhorn(torch.rand(40, 300, 300).double(), 1e-3, tol=0, max_iter=10**6)",
    "l1_cost": "[l1_cost(torch.randn(60000, 1500)) for _ in range(99)]",
    "l1_cost, bytes": "[l1_cost(torch.randn(60000, 1500), precision='u8') for _ in range(99)]",
    "assignment": "assignment(torch.arange(7e3)[:, None] * torch.arange(7e3))",
    "gradient": "[l1_cost(x).sum().backward() for _ in range(999)]",
}
CODE = """
import os, signal, threading, time
import torch
from dotresize import assignment, l1_cost, sinkhorn
x = torch.randn(20000, 500, requires_grad=True)
l1_cost(torch.randn(9, 9))
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
begun = time.perf_counter()
try:
    CALL
except KeyboardInterrupt:
    print('stopped')
# The next call, on all threads, is right.
cost = torch.rand(300, 200)
result = sinkhorn(cost, 0.1)
assert result.converged and abs(float(result.plan.sum()) - 1) < 1e-5
assert torch.allclose(l1_cost(cost), torch.cdist(cost.T, cost.T, p=1) / 300, atol=1e-5)
assert sorted(assignment(cost[:200]).tolist()) == list(range(200))
print('right')
"""


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_stops(name, threads):
    code = CODE.replace("CALL", CALLS[name]).replace(
        "import torch\n", f"import torch\ntorch.set_num_threads({threads})\n"
    )
    # None of the calls ends by itself within this limit.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["stopped", "right"]


def test_a_handler_of_the_callers_own_decides():
    """What it raises is what the call raises; a handler that raises nothing stops nothing."""
    code = (
        "import os, signal, threading, torch; from dotresize import sinkhorn\n"
        "torch.set_num_threads(1)\n"
        "seen = []\n"
        "def handler(*_):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 2: raise LookupError('enough')\n"
        "signal.signal(signal.SIGUSR1, handler)\n"
        "for wait in (0.3, 0.6):\n"
        "    threading.Timer(wait, os.kill, (os.getpid(), signal.SIGUSR1)).start()\n"
        "try: sinkhorn(torch.rand(900, 900), 1e-3, tol=0, max_iter=10**6)\n"
        "except LookupError as error: print(error, len(seen))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["enough", "2"], done.stderr
