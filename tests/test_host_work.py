"""What the host does for a small solve on a GPU: tensor operations, launches and waits, counted.

In the interpreter, where a tensor on the device is one on the CPU: every read of a tensor's values
counts as a wait, those of numbers that are on the host anyway included.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import ON_GPU
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from dotresize import sinkhorn
from dotresize.kernels import sinkhorn as kernel
from dotresize.kernels.sinkhorn_pool import Pool
from dotresize.kernels.sinkhorn_sheet import Sheet

pytestmark = pytest.mark.skipif(ON_GPU, reason="counts in the interpreter")

VIEWS = ("view", "expand", "split", "unbind", "detach", "slice", "select", "as_strided", "alias")
VIEWS += ("unsqueeze", "_unsafe_view", "permute", "t.", "transpose", "_reshape_alias", "narrow")
WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu")


class Operations(TorchDispatchMode):
    """Counts operations that are not views, outside of what the interpreter does in a launch."""

    def __init__(self, inside: list) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.inside = inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if not name.startswith(VIEWS) and not self.inside:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts looks at values of tensors of the device: float64 vectors, costs, the sheet's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS and isinstance(args[0], torch.Tensor):
            self.names[f"{name} of {tuple(args[0].shape)}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch):
    launches, copies, inside = [], [], []
    run, receive, send = GridExecutor.__call__, Sheet.receive, Sheet.send

    def launch(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        inside.append(1)
        run(self, *args, **kwargs)
        inside.clear()

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(Sheet, "receive", lambda s: (copies.append("out"), receive(s))[1])
    monkeypatch.setattr(Sheet, "send", lambda s, *a: (copies.append("in"), send(s, *a))[1])

    def solve(cost, **settings):
        launches.clear()
        copies.clear()
        with Operations(inside) as operations, Waits() as waits:
            result = sinkhorn(cost, 0.1, backend="triton", **settings)
        assert result.status
        return operations.names, waits.names, list(launches), list(copies)

    return solve


@pytest.mark.parametrize("shape", [(12, 20), (5, 12, 20)])
def test_a_problem_that_stays_on_the_device_is_one_launch(count, shape):
    cost = torch.rand(shape)
    count(cost)  # what is made once
    operations, waits, launches, copies = count(cost)
    assert launches == ["resident_kernel"]
    assert copies == ["in", "out"]
    assert sum(operations.values()) < 25, operations
    device = {name: n for name, n in waits.items() if "20" in name or "12" in name}
    assert device == {}


def test_a_launched_problem_waits_twice(count, monkeypatch):
    """For whether column minima are large, and for the end; a short one captures no graph."""
    monkeypatch.setattr(kernel.sinkhorn, "__kwdefaults__", {"stay": False, "keep": True})
    cost = torch.rand(12, 20)
    settings = {"tol": 0, "max_iter": 3}
    count(cost, **settings)
    operations, _, launches, copies = count(cost, **settings)
    before, after = ["minima_kernel", "begin_kernel", "start_kernel"], ["finish_kernel"]
    each = ["sinkhorn_sweep_kernel", "sinkhorn_column_kernel"]
    assert launches == before + 4 * each + after
    assert copies == ["in", "out", "out"]
    assert sum(operations.values()) < 30, operations


def test_solvers_of_the_same_shapes_are_used_again(monkeypatch):
    kernel.RESIDENT.clear()
    made = []
    make = kernel.Resident.__init__
    monkeypatch.setattr(
        kernel.Resident, "__init__", lambda s, *a, **k: (made.append(1), make(s, *a, **k))[1]
    )
    first = sinkhorn(torch.rand(12, 20), 0.1, backend="triton")
    plan = first.plan.clone()
    sinkhorn(torch.rand(12, 20), 0.2, tol=1e-3, backend="triton")
    assert len(made) == 1
    assert torch.equal(first.plan, plan)  # its potentials are its own
    sinkhorn(torch.rand(12, 21), 0.1, backend="triton")
    assert len(made) == 2
    with pytest.raises(ValueError, match="problem 0 by up to"):
        sinkhorn(torch.rand(12, 20) * 1e6, 0.1, storage="u16", backend="triton")
    result = sinkhorn(torch.rand(12, 20), 0.1, backend="triton")
    assert result.converged


def test_solvers_that_wait_hold_little_memory():
    class Solver:
        def __init__(self, size):
            self.bytes = size

    pool = Pool()
    for key, size in (("small", 10), ("large", 80), ("middle", 30)):
        with pool.borrow(key, lambda s=size: Solver(s), 100):
            pass
    found = {}
    for key in ("small", "large", "middle"):
        with pool.borrow(key, lambda: Solver(0), 100) as solver:
            found[key] = solver.bytes
    # The oldest two had to leave for the third.
    assert found == {"small": 0, "large": 0, "middle": 30}
    with pytest.raises(RuntimeError), pool.borrow("middle", lambda: Solver(5), 100):
        raise RuntimeError
    with pool.borrow("middle", lambda: Solver(5), 100) as solver:
        assert solver.bytes == 5
