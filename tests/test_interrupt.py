"""Ctrl-C in the middle of a C++ kernel: it stops, nothing is leaked, the next call is right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dotresize import L1CostAccumulator
from dotresize.ops import l1_sums

# Each is one call of minutes, which ends in time only if it listens. The signal comes from a thread
# of its own, as from a terminal; of the activations one token stands for millions.
CALLS = {
    "sinkhorn, a team": "sinkhorn(torch.rand(1500, 1500), 1e-3, tol=0, max_iter=10**6)",
    "sinkhorn, many": "sinkhorn(torch.rand(40, 300, 300).double(), 1e-3, tol=0, max_iter=10**6)",
    "l1_cost": "l1_cost(torch.randn(1, 2000).expand(8_000_000, -1))",
    "assignment": "assignment(torch.arange(7e3)[:, None] * torch.arange(7e3))",
    "gradient": "with_gradient(torch.zeros(n, n), x, None, None, 1.0, 'cpp').sum().backward()",
}
CODE = """
import os, signal, threading, time
import torch
from dotresize import assignment, l1_cost, sinkhorn
from dotresize.ops.l1_gradient import with_gradient
n = 8000
x = torch.zeros(60000 if 'gradient' in NAME else 1, n, requires_grad=True)
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


def run(code: str, patience: float) -> subprocess.CompletedProcess:
    """Run code in an interpreter of its own, for so many seconds at most."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience, check=False
    )


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_stops(name, threads):
    code = (
        CODE.replace("CALL", CALLS[name])
        .replace("NAME", repr(name))
        .replace("import torch\n", f"import torch\ntorch.set_num_threads({threads})\n")
    )
    # None of the calls ends by itself within this limit.
    done = run(code, 45)
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
    done = run(code, 120)
    assert done.stdout.split() == ["enough", "2"], done.stderr


def test_an_accumulator_that_was_interrupted_says_so(monkeypatch):
    """When the signal comes decides what it hits; here it comes at the end of the kernel."""
    total = L1CostAccumulator(5)
    total.update(torch.randn(256, 5))
    launch = l1_sums.launch

    def interrupted(*args, **kwargs) -> None:
        launch(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(l1_sums, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            total.update(torch.randn(300, 5))
    for call in (total.result, lambda: total.update(torch.randn(3, 5))):
        with pytest.raises(ValueError, match="an update was interrupted, and half of it counted"):
            call()


def test_a_thread_that_solves_while_the_process_ends():
    """Only Python's main thread hears of signals; others must not ask an interpreter that ends."""
    code = (
        "import threading, time, torch; from dotresize import sinkhorn\n"
        "cost = torch.rand(500, 500)\n"
        "solve = lambda: sinkhorn(cost, 1e-3, tol=0, max_iter=10**7)\n"
        "threading.Thread(target=solve, daemon=True).start()\n"
        "time.sleep(0.7)\n"
    )
    done = run(code, 60)
    assert done.returncode == 0, done.stderr
