"""What only the Triton Sinkhorn has: ways to hold a row, ragged batches, 16-bit costs."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from test_sinkhorn import INF, l1, problem

from dotresize import BackendError, sinkhorn
from dotresize.kernels import sinkhorn as kernel
from dotresize.kernels import sinkhorn_tables as tables
from dotresize.kernels.sinkhorn_sheet import O_EXACT
from dotresize.ops.constants import CONVERGED, MOMENTUM, SinkhornBatch

DEVICE = device_of("triton")


@pytest.fixture(autouse=True)
def no_waiting_solvers():
    """What one test changed of how rows are held is not what another one expects."""
    kernel.SWEPT.clear()
    yield
    kernel.SWEPT.clear()


@pytest.fixture(params=["exact", "kept"])
def launched(request, monkeypatch) -> float:
    """Every iteration a launch, however small the problem; how far a plan may be off then."""
    ways = {"stay": False, "keep": request.param == "kept"}
    monkeypatch.setattr(kernel.sinkhorn, "__kwdefaults__", ways)
    return 1e-4 if request.param == "kept" else 1e-6


def truth_of(cost, reg, a=None, b=None, **settings):
    vectors = [None if v is None else v.double().cpu() for v in (a, b)]
    return sinkhorn(cost.double().cpu(), reg, *vectors, backend="torch", **settings)


def test_long_rows_are_streamed(launched, monkeypatch):
    """Rows that do not fit in registers, at a size the interpreter can do."""
    monkeypatch.setattr(tables, "MAX_WARPS", {torch.float32: 0})
    monkeypatch.setattr(tables, "STREAMED_COLUMNS", 16)
    cost, a, b = (v.to(DEVICE) for v in problem(19, 53))
    cost[3, 5:30] = INF
    result = sinkhorn(cost, 0.1, a, b, tol=1e-6, backend="triton")
    assert result.converged
    assert l1(result.plan, truth_of(cost, 0.1, a, b, tol=1e-10).plan) < 1e-5


@pytest.mark.parametrize("columns", [96, 97, 128, 129, 190, 193])
def test_rows_of_one_and_of_three_parts(launched, columns):
    tile = tables.Tile(columns, torch.float32)
    assert tile.block * tile.parts >= columns > tile.block * (tile.parts - 1)
    cost = torch.rand(5, columns, device=DEVICE)
    settings = {"tol": 0, "max_iter": 3}
    result = sinkhorn(cost, 0.1, backend="triton", **settings)
    assert l1(result.plan, truth_of(cost, 0.1, **settings).plan) < launched


def test_every_width_has_a_tile():
    for dtype in (torch.float32, torch.float64):
        for columns in range(1, 20_000, 7):
            tile = tables.Tile(columns, dtype)
            # Nothing that fits is read twice: one part of the next power of two at worst.
            assert tile.held or columns > (12288 if dtype == torch.float32 else 2048)
            if tile.held:
                assert tile.block * tile.parts >= columns > tile.block * (tile.parts - 1)
                assert tile.block & (tile.block - 1) == 0
                entries = tile.rows * tile.block * tile.parts / (32 * tile.warps)
                assert entries <= tables.THREAD_ENTRIES[dtype]
            assert 1 <= tile.num_warps(64) <= tile.num_warps(32) <= 16
    assert tables.Tile(11469, torch.float32).held


def test_programs_fill_the_device():
    slots = 528
    for rows in ([14336], [4096] * 32, [576] * 64, [1, 5000, 20], [7] * 3000):
        count = tables.rows_per_program(rows, slots, 4)
        programs = sum(-(-n // count) for n in rows)
        waves = -(-programs // slots)
        assert count >= 1
        # At most 30 % longer than if the rows could be divided at will.
        assert waves * count <= max(1.3 * sum(rows) / slots, max(min(rows), 8))


def test_mixed_shapes_and_memory_in_one_call(launched):
    """Views with row strides, other allocations, rows of every kind; each its own reg and tol."""
    wide = torch.rand(40, 300, device=DEVICE)
    costs = [wide[:9, :130], torch.rand(12, 7, device=DEVICE), wide[9:30, 2:31], wide.T[:5, ::2]]
    reg = torch.tensor([0.1, 0.05, 0.3, 0.2])
    tol = torch.tensor([1e-3, 1e-6, 0.0, 1e-5])
    result = sinkhorn(costs, reg, tol=tol, max_iter=60, backend="triton")
    assert result.n_iter[2] == 60
    for i, cost in enumerate(costs):
        truth = truth_of(cost, float(reg[i]), tol=float(tol[i]), max_iter=60)
        # Near the tolerance a kept plan asks for an exact sweep, and goes on until then.
        assert abs(int(result.n_iter[i]) - truth.n_iter) <= (1 if launched < 1e-5 else 3)
        assert l1(result.plan[i], truth.plan) < max(2e-5, 2 * float(tol[i]))


def test_tol_of_each_problem(backend):
    cost = torch.rand(3, 14, 11, device=device_of(backend))
    result = sinkhorn(cost, 0.02, tol=torch.tensor([1e-2, 1e-4, 0.0]), max_iter=90, backend=backend)
    assert result.n_iter[0] < result.n_iter[1] <= result.n_iter[2]
    assert result.n_iter[2] == 90
    assert result.status[2] == "max_iter"
    with pytest.raises(ValueError, match="tol has shape"):
        sinkhorn(cost, 0.02, tol=torch.ones(2), backend=backend)
    with pytest.raises(ValueError, match="tol is"):
        sinkhorn(cost, 0.02, tol=torch.tensor([1.0, -1.0, 1.0]), backend=backend)


def test_rows_are_copied_only_where_they_do_not_lie_at_16_bytes():
    wide = torch.rand(6, 40, device=DEVICE)
    costs = [wide[:, :32], wide[:, :30], wide[:, 1:33], torch.rand(3, 7, device=DEVICE)]
    found = tables.aligned(costs)
    assert found[0] is costs[0]
    for cost, copy in zip(costs, found, strict=True):
        assert torch.equal(cost, copy)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride(0) % 4 == 0
    # What is read past the end of a row is forbidden, not some number.
    assert (found[3].as_strided((3, 1), (8, 1), found[3].storage_offset() + 7) == INF).all()


@pytest.mark.parametrize("far", [-3000.0, 90.0, 3000.0])
def test_rows_far_from_their_last_potential_are_done_again(launched, far):
    """A start that lets every exponential overflow, or underflow, unless the maximum is out."""
    cost, a, b = (v.to(DEVICE) for v in problem(9, 33))
    a[4], a[5] = 0.0, 1e-36
    a /= a.sum()
    start = torch.full((33,), far, device=DEVICE, dtype=torch.float64)
    start[::2] -= far / 2
    settings = {"tol": 0, "max_iter": 4}
    result = sinkhorn(cost, 0.1, a, b, init=(None, start), backend="triton", **settings)
    truth = truth_of(cost, 0.1, a, b, init=(None, start.cpu()), **settings)
    assert l1(result.plan, truth.plan) < 1e-3


def test_far_columns_keep_their_digits(launched):
    """Column minima of hundreds of reg: taken out entry by entry, in a tile of its own."""
    cost = torch.rand(30, 97, device=DEVICE)
    cost[:, 20:23] += 40.0
    result = sinkhorn(cost, 0.1, tol=1e-5, max_iter=3000, backend="triton")
    assert result.converged
    assert l1(result.plan, truth_of(cost, 0.1, tol=1e-9, max_iter=5000).plan) < 2e-3


def solved(cost, b=None, **settings):
    """Returns the solution of the kernels, and how many of its sweeps read the cost."""
    n, m = cost.shape
    uniform = torch.full((n,), 1 / n, dtype=torch.float64, device=DEVICE)
    settings = {"reg": 0.05, "tol": 1e-6, "max_iter": 300} | settings
    numbers = {k: torch.tensor([settings[k]], dtype=torch.float64) for k in ("reg", "tol")}
    b = torch.full((m,), 1 / m, dtype=torch.float64, device=DEVICE) if b is None else b
    found = []
    make = kernel.Swept.solve

    def solve(self, batch, potentials):
        found.append(make(self, batch, potentials))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.Swept, "solve", solve)
        batch = SinkhornBatch(
            labels=range(1),
            costs=[cost],
            a=uniform,
            b=b,
            g=torch.zeros_like(b),
            acceleration=torch.tensor([MOMENTUM]),
            max_iter=settings["max_iter"],
            **numbers,
        )
        solution = kernel.sinkhorn(batch, "exact")
    return solution, int(found[0][0, O_EXACT.value])


def test_a_problem_that_has_stopped_is_not_swept_again(launched):
    solution, exact = solved(torch.rand(12, 20, device=DEVICE), reg=0.5)
    assert solution.status[0] == CONVERGED
    assert solution.n_iter[0] < 10  # long before the host looks
    if launched < 1e-5:
        assert exact == solution.n_iter[0] + 1
    else:
        assert exact <= solution.n_iter[0] + 1


def test_most_sweeps_read_the_kept_plan(monkeypatch):
    monkeypatch.setattr(kernel.sinkhorn, "__kwdefaults__", {"stay": False, "keep": True})
    cost = torch.rand(24, 33, device=DEVICE)
    solution, exact = solved(cost)
    assert solution.status[0] == CONVERGED
    assert exact < 0.5 * float(solution.n_iter[0])
    # A column that 16 bits do not represent keeps its problem with the cost, and costs no stores.
    b = torch.full((33,), 1 / 32, dtype=torch.float64, device=DEVICE)
    b[7] = 1e-13
    b /= b.sum()
    faint, all_exact = solved(cost, b)
    assert faint.status[0] == CONVERGED
    assert all_exact == faint.n_iter[0] + 1


def test_16_bit_costs():
    shapes = [(23, 17), (40, 130), (6, 301)]
    costs = [torch.rand(shape, device=DEVICE) + 5 for shape in shapes]
    costs[0] *= 100  # each problem has its own step
    reg = torch.tensor([20.0, 0.2, 0.3])
    result = sinkhorn(costs, reg, storage="u16", backend="triton")
    assert result.converged.all()
    for i, cost in enumerate(costs):
        assert l1(result.plan[i], truth_of(cost, float(reg[i])).plan) < 1e-3


def test_16_bit_costs_refuse_what_is_too_coarse():
    costs = [torch.rand(8, 9, device=DEVICE), torch.rand(8, 9, device=DEVICE) * 1e4]
    with pytest.raises(ValueError, match=r"problem 1 by up to .* a reg of at least 3\.\d+"):
        sinkhorn(costs, 0.1, storage="u16", backend="triton")
    costs[1][2, 3] = INF
    with pytest.raises(ValueError, match="problem 1 by up to inf"):
        sinkhorn(costs, 0.1, storage="u16", backend="triton")
    with pytest.raises(ValueError, match="float64"):
        sinkhorn(costs[0].double(), 0.1, storage="u16", backend="triton")
    with pytest.raises(BackendError, match="built for triton, not for torch"):
        sinkhorn(costs[0], 0.1, storage="u16", backend="torch")
    with pytest.raises(ValueError, match="must be one of exact, u16"):
        sinkhorn(costs[0], 0.1, storage="u8", backend="triton")
