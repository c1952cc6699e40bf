"""Linear assignment: backends, duals, random problems, threads and SIMD levels."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from conftest import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from test_assignment import INF, _quick_duals, optimum, sinkhorn_by_cpp, value  # noqa: F401
from torch import Tensor

from dotresize import BackendError, assignment, sinkhorn
from dotresize.ops import assignment_launch


def test_backends_by_name(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, triton"):
        assignment(torch.ones(2, 2), backend="scipy")
    with pytest.raises(BackendError, match="tensors, not meta"):
        assignment(torch.ones(2, 2, device="meta"), backend="cpp")
    from dotresize.ops import backends

    monkeypatch.setattr(backends, "_why_no_cpp", lambda: "it is not built")
    score = torch.randn(12, 12)
    assert abs(value(score, assignment(score)) - optimum(score, True)) < 1e-10
    with pytest.raises(BackendError, match="cannot run here: it is not built"):
        assignment(score, backend="cpp")


def test_small_scores_on_a_gpu_are_solved_on_the_host(monkeypatch):
    from dotresize.ops import backends

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    backend_for, limit = assignment_launch.backend_for, assignment_launch.ROWS_ON_GPU
    assert limit == 4096
    for rows, chosen in ((1, "cpp"), (limit - 1, "cpp"), (limit, "triton"), (10 * limit, "triton")):
        assert backend_for("auto", cuda, rows) == chosen
        assert backend_for("triton", cuda, rows) == "triton"
        assert backend_for("auto", cpu, rows) == backend_for("cpp", cpu, rows) == "cpp"
        with pytest.raises(BackendError, match="CPU tensors, not cuda"):
            backend_for("cpp", cuda, rows)
    monkeypatch.setattr(backends, "_why_no_cpp", lambda: "it is not built")
    for rows in (1, limit):
        assert backend_for("auto", cuda, rows) == "torch"
        with pytest.raises(BackendError, match=r"finished by cpp: .* it is not built"):
            backend_for("triton", cuda, rows)


def test_the_finish_needs_no_good_duals():
    """Exact from duals that are right, rough, wrong, enormous, and of another problem."""
    score = torch.randint(0, 50, (2, 45, 45)).float()
    score[:, 3, 5:20] = INF
    ((_, right),), _ = assignment_launch.finish([score], 1.0, [None])
    rough = torch.randn(2, 45, dtype=torch.float64)
    starts = [right, right + rough, 40 * rough, 1e30 * rough, right.flip(0), right * 0 - 7.5]
    for start in starts:
        ((columns, v),), status = assignment_launch.finish([score], 1.0, [start])
        assert status.tolist() == [0, 0]
        for problem, found, duals in zip(score, columns, v, strict=True):
            best = optimum(problem, False)
            assert value(problem, found) == best
            assert float((problem - duals).amin(1).sum() + duals.sum()) == best


def test_triton_kernels_give_the_duals(monkeypatch):
    """As a GPU runs it, in the interpreter where there is none."""
    monkeypatch.setattr(assignment_launch, "sinkhorn", sinkhorn)
    monkeypatch.setattr(assignment_launch, "SINKHORN_ITERATIONS", 5)
    score = torch.randn(3, 23, 23, device=device_of("triton"))
    score[1, 2, 4:] = -INF
    columns, proof = assignment(score, certificate=True, backend="triton")
    for i in range(3):
        assert abs(value(score[i], columns[i]) - optimum(score[i], True)) < 1e-10
    assert float(proof.gap.abs().max()) < 1e-10


def test_duals_of_entropic_transport_are_near(monkeypatch):
    """What the Triton backend starts from, by another Sinkhorn."""
    monkeypatch.setattr(assignment_launch, "SINKHORN_ITERATIONS", 200)
    monkeypatch.setattr(assignment_launch, "sinkhorn", sinkhorn_by_cpp)
    scores = [torch.randn(3, 80, 80), torch.randn(3, 80, 80, dtype=torch.float64) * 1e300]
    for score in scores:
        v = assignment_launch.sinkhorn_duals(score, -1.0)
        bound = (-score.double() - v[:, None]).amin(2).sum(1) + v.sum(1)
        for problem, lower in zip(score, bound.tolist(), strict=True):
            best = optimum(problem, True)
            assert -lower >= best
            assert -lower - best < 0.05 * best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    levels=st.sampled_from([2, 3, 30, 10**6]),
    forbidden=st.sampled_from([0.0, 0.2, 0.8]),
    rank=st.sampled_from([0, 1, 3]),
    double=st.booleans(),
)
def test_random_problems(seed, n, levels, forbidden, rank, double):
    generator = np.random.default_rng(seed)
    score = generator.integers(-levels, levels + 1, (n, n)).astype(float)
    if rank:
        sides = generator.integers(-9, 10, (2, n, rank)).astype(float)
        score = sides[0] @ sides[1].T
    score[generator.random((n, n)) < forbidden] = -INF
    given_score = torch.from_numpy(score).to(torch.float64 if double else torch.float32)
    try:
        best = score[linear_sum_assignment(score, maximize=True)].sum()
    except ValueError:
        with pytest.raises(ValueError, match="leave no assignment"):
            assignment(given_score, backend="cpp")
        return
    for backend in ("cpp", "torch"):
        columns, proof = assignment(given_score, certificate=True, backend=backend)
        assert value(given_score, columns) == best
        assert proof.gap == proof.violation == 0


def test_python_threads_and_torch_threads():
    score = torch.randn(5, 150, 150)
    truth = assignment(score, backend="cpp")
    found: list[Tensor] = []
    workers = [
        threading.Thread(target=lambda: found.append(assignment(score, backend="cpp")))
        for _ in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    before = torch.get_num_threads()
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        found.append(assignment(score, backend="cpp"))
    torch.set_num_threads(before)
    assert len(found) == 9
    assert all(torch.equal(columns, truth) for columns in found)


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_every_simd_level(level, run_at_simd_level):
    code = """
import sys, torch
sys.path.insert(0, "tests")
from dotresize import backends
from test_assignment import check
for n in (1, 15, 16, 33, 130):
    check(torch.randn(n, n), "cpp")
    check(torch.randn(n, n, dtype=torch.float64), "cpp")
    check(torch.randint(0, 9, (n, n)), "cpp", exact=True)
"""
    run_at_simd_level(code, level)


def test_inputs_are_left_alone(backend):
    score = torch.randn(20, 20, device=device_of(backend), requires_grad=True)
    before = score.detach().clone()
    columns, proof = assignment(score, certificate=True, backend=backend)
    assert torch.equal(score.detach(), before)
    assert not proof.u.requires_grad
    assert columns.tolist() == assignment(before, backend=backend).tolist()
