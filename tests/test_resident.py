"""Problems that stay on the device's multiprocessors: groups of programs that meet, and a queue."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ON_GPU
from take_turns import Turns
from test_sinkhorn import INF, l1, problem
from test_sinkhorn_triton import truth_of
from triton.runtime.errors import OutOfResources

from dotresize import sinkhorn
from dotresize.kernels import resident, resident_kernel
from dotresize.kernels import sinkhorn as kernel
from dotresize.kernels.resident_phases import EXACT_COST, KEPT_PLAN, LEVELS
from dotresize.kernels.sinkhorn_device import Device

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter takes turns; benchmarks.gpu checks")
STORES = {"exact": EXACT_COST.value, "levels": LEVELS.value, "kept": KEPT_PLAN.value}
# Several programs a problem, several problems at once, for problems of some dozens of rows.
DEVICE = Device(torch.device("cpu"), processors=7)


@pytest.fixture(params=STORES)
def store(request) -> str:
    return request.param


@pytest.fixture
def launch(monkeypatch):
    """Solves on a device of seven multiprocessors, programs of 8 rows taking turns."""
    monkeypatch.setattr(resident, "_THREAD_ENTRIES", 1)
    monkeypatch.setattr(resident, "_ENTRIES", dict.fromkeys(resident._ENTRIES, 1))
    monkeypatch.setattr(kernel, "device_of", lambda place: DEVICE)
    found: list[resident.Division] = []

    def solve(cost, reg, *args, store="exact", seed=0, absent=(), **settings):
        def choose(shapes, dtype, storage, device):
            division = resident.divide(shapes, STORES[store], device)
            found.append(division)
            return division

        turns = Turns(resident_kernel.resident_kernel, seed, absent)
        monkeypatch.setattr(kernel, "choose", choose)
        monkeypatch.setattr(resident, "resident_kernel", turns)
        storage = "u16" if store == "levels" else "exact"
        result = sinkhorn(cost, reg, *args, storage=storage, backend="triton", **settings)
        assert turns.grid == found[-1].programs * found[-1].groups
        return result

    solve.divisions = found
    return solve


@pytest.mark.parametrize("shape", [(30, 45), (41, 97), (17, 33)])
def test_groups_agree_with_the_oracle(launch, store, shape):
    cost, a, b = problem(*shape)
    result = launch(cost, 0.1, a, b, tol=1e-6, store=store)
    assert launch.divisions[-1].programs > 2
    assert result.converged
    assert l1(result.plan, truth_of(cost, 0.1, a, b, tol=1e-9).plan) < 2e-5
    # Levels change the cost, whose plan this is.
    error = float((result.plan.double().sum(0) - b).abs().sum())
    assert error < (1e-4 if store == "levels" else 2e-6)


def test_the_order_of_programs_does_not_matter(launch, store):
    cost, a, b = problem(30, 45)
    results = [launch(cost, 0.05, a, b, tol=1e-6, store=store, seed=seed) for seed in range(3)]
    for other in results[1:]:
        for one, two in zip(results[0].potentials, other.potentials, strict=True):
            assert torch.equal(one, two)


def test_more_problems_than_groups_wait_in_a_queue(launch, store):
    """Of several shapes and settings; some cannot be solved, and do not hold up the others."""
    shapes = [(20, 33), (9, 40), (25, 12), (1, 1), (20, 33), (16, 64), (8, 5)]
    costs = [torch.rand(shape) for shape in shapes]
    costs[1][2, 3] = torch.nan
    if store != "levels":
        costs[4][5] = INF
    reg = torch.linspace(0.1, 0.4, len(costs))
    tol = torch.tensor([1e-5, 1e-5, 1e-6, 1e-5, 1e-5, 0.0, 1e-4])
    result = launch(costs, reg, tol=tol, max_iter=40, store=store)
    assert launch.divisions[-1].groups < len(costs)
    wanted = ["converged"] * len(costs)
    wanted[1], wanted[5] = "invalid", "max_iter"
    if store != "levels":
        wanted[4] = "infeasible"
        assert result.marginal_error[4] == pytest.approx(1.0)
        assert (result[4].potentials[0] == -INF).all()
    assert list(result.status) == wanted
    assert result[1].potentials[1].isnan().all()
    assert result.n_iter[5] == 40
    for i in (0, 2, 3, 5, 6):
        truth = truth_of(costs[i], float(reg[i]), tol=float(tol[i]), max_iter=40)
        assert l1(result[i].plan, truth.plan) < 4 * max(2e-5, float(tol[i]))


def test_hard_costs(launch, store):
    """Far columns, forbidden pairs, rows with hardly any mass or none, a start that underflows."""
    cost, a, b = problem(26, 39)
    if store != "levels":
        cost[:, 3] += 60.0
        cost[2, :9] = INF
    a[5:9] = 0
    b[10] = 0
    a[11], a[12] = 1e-36, 1e-44
    a, b = a / a.sum(), b / b.sum()
    start = torch.linspace(-400, 400, 39, dtype=torch.float64)
    settings = {"tol": 1e-6, "max_iter": 2000}
    result = launch(cost, 0.1, a, b, init=(None, start), store=store, **settings)
    assert result.converged
    assert (result.plan[5:9] == 0).all()
    assert (result.plan[:, 10] == 0).all()
    assert l1(result.plan, truth_of(cost, 0.1, a, b, tol=1e-9, max_iter=5000).plan) < 2e-3


def test_levels_that_are_too_coarse_are_refused(launch):
    costs = [torch.rand(8, 9), torch.rand(8, 9) * 1e4]
    with pytest.raises(ValueError, match=r"problem 1 by up to .* a reg of at least 3\.\d+"):
        launch(costs, 0.1, store="levels")


def test_a_program_that_does_not_come_ends_the_launch(launch, monkeypatch):
    """As when a GPU does not run all of them at once: the problem is then solved otherwise."""
    monkeypatch.setattr(resident_kernel, "PATIENCE", 40)
    monkeypatch.setattr(kernel, "STALLING", set())
    cost, a, b = problem(30, 45)
    with pytest.warns(RuntimeWarning, match="waited for each other too long"):
        result = launch(cost, 0.1, a, b, tol=1e-6, absent=(1,))
    assert result.converged
    assert l1(result.plan, truth_of(cost, 0.1, a, b, tol=1e-9).plan) < 2e-5
    again = sinkhorn(cost, 0.1, a, b, tol=1e-6, backend="triton")  # without another wait
    assert torch.equal(again.plan, result.plan)


def test_a_device_that_refuses_the_launch_is_asked_otherwise(monkeypatch):
    """As a process that was given a part of the multiprocessors only."""

    class Refusing:
        def __getitem__(self, grid):
            def launch(**arguments):
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

            return launch

    monkeypatch.setattr(resident, "resident_kernel", Refusing())
    cost, a, b = problem(13, 22)
    result = sinkhorn(cost, 0.1, a, b, tol=1e-6, backend="triton")
    assert result.converged
    kernel.RESIDENT.clear()


def test_what_one_device_holds():
    h200 = Device(torch.device("cuda"), processors=132)
    a100 = replace(h200, processors=108, shared=164 << 10, shared_program=163 << 10)
    shapes = [(1, 1, 1), (1, 576, 464), (64, 576, 464), (1, 4096, 3072), (32, 4096, 3072)]
    shapes += [(1, 14336, 11469), (3, 50, 12288), (1, 40, 12289), (5000, 7, 9), (1, 20000, 64)]
    for device in (h200, a100, DEVICE):
        for count, n, m in shapes:
            for store in STORES.values():
                division = resident.divide([(n, m)] * count, store, device)
                if division is None:
                    continue
                constants = division.constants()
                held = division.rows * division.blocks * division.width * resident._SIZES[store]
                assert held <= device.shared_program
                assert division.together * held <= device.shared
                running = division.groups * division.programs
                assert running <= device.processors * division.together
                assert division.groups <= count
                assert division.programs * division.blocks * division.rows >= n
                assert division.programs * constants["OWN"] >= m
                warps = constants["WARPS_ROWS"] * constants["WARPS_COLUMNS"]
                assert warps == division.options()["num_warps"]
    assert resident.choose([(576, 464)], torch.float32, "exact", h200).store == STORES["exact"]
    assert resident.choose([(4096, 3072)], torch.float32, "exact", h200).store == STORES["kept"]
    assert resident.choose([(4096, 3072)], torch.float32, "u16", h200).store == STORES["levels"]
    assert resident.choose([(4096, 3072)], torch.float32, "exact", a100) is None
    assert resident.choose([(14336, 11469)], torch.float32, "exact", h200) is None
    assert resident.choose([(64, 64)], torch.float64, "exact", h200) is None
    other = replace(h200, cooperative=False)
    assert resident.choose([(64, 64)], torch.float32, "exact", other) is None


def test_programs_of_a_multiprocessor():
    h200 = Device(torch.device("cuda"), processors=132)
    assert h200.together(8, 255, 200_704) == 1
    assert h200.together(4, 168, 67_584) == 3
    assert h200.together(4, 255, 67_584) == 2
    assert h200.together(4, 32, 1_000) == 16
    assert h200.together(8, 64, 240_000) == 0


def test_a_launch_has_no_more_groups_than_run_at_once(monkeypatch):
    """By what the compiled kernel takes, which may be more than was planned for."""
    h200 = Device(torch.device("cuda"), processors=132)
    shapes = [(576, 464)] * 64
    division = resident.choose(shapes, torch.float32, "exact", h200)
    solver = resident.Resident(shapes, Device(torch.device("cpu")), division, momentum=True)
    compiled = SimpleNamespace(
        _init_handles=lambda: None, n_regs=168, metadata=SimpleNamespace(shared=67_584)
    )
    asked = []
    warmup = SimpleNamespace(warmup=lambda grid, **given: asked.append(given) or compiled)
    monkeypatch.setattr(resident, "resident_kernel", warmup)
    solver.device = h200
    assert solver._fitting({"problems": 64}) == division.groups == 44
    assert asked == [{"problems": 64}]
    compiled.n_regs = 255  # two programs on a multiprocessor
    assert solver._fitting({}) == 132 * 2 // 9
    compiled.metadata.shared = 229 << 10
    assert solver._fitting({}) == 0

    def too_much():
        raise OutOfResources(300_000, 232_448, "shared memory")

    compiled._init_handles = too_much
    assert solver._fitting({}) == 0
