"""Transport maps, their factors, alignment, and the baselines in the same form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import device_of

from dotresize import factorize, sinkhorn, transport_map
from dotresize.baselines.magnitude import selected
from dotresize.compression import METHODS, make_options
from dotresize.narrow import transport as transporting
from dotresize.narrow.maps import WidthMap, align, largest, level
from dotresize.narrow.principal import pca
from dotresize.narrow.transport import transports
from dotresize.ops.l1_cost import l1_cost


def transport(cost: torch.Tensor, selection: torch.Tensor, **choices) -> WidthMap:
    return transports(cost[None], [selection], **choices)[0]


def orthonormal(q: torch.Tensor) -> bool:
    eye = torch.eye(q.shape[1], dtype=q.dtype)
    return bool(torch.allclose(q.mT @ q, eye, atol=1e-10))


def same_span(p: torch.Tensor, q: torch.Tensor) -> bool:
    return bool(torch.allclose(p @ p.mT, q @ q.mT, atol=1e-8))


def test_transport_map_columns_are_convex():
    plan = sinkhorn(torch.rand(9, 5), 0.2).plan
    T = transport_map(plan)
    assert torch.allclose(T.sum(0), torch.ones(5))
    assert (T >= 0).all()
    plan[:, 2] = 0
    with pytest.raises(ValueError, match="column 2 of the plan"):
        transport_map(plan)


@pytest.mark.parametrize("method", ["polar", "qr"])
def test_factorize_gives_the_same_span(method):
    T = torch.rand(12, 7, dtype=torch.float64)
    factors = factorize(T, method)
    assert orthonormal(factors.q)
    assert torch.allclose(factors.q @ factors.r, T)
    assert same_span(factors.q, torch.linalg.qr(T).Q)
    assert factors.cond == pytest.approx(float(torch.linalg.cond(T)), rel=1e-6)
    if method == "qr":
        assert (factors.r.diagonal() > 0).all()
        assert torch.equal(factors.r, factors.r.triu())
    else:
        assert torch.allclose(factors.r, factors.r.mT)


def test_factorize_keeps_the_healthy_constant_direction():
    """A dominant averaging direction is what transport at large reg looks like, not a collapse."""
    T = torch.eye(10, 6, dtype=torch.float64) * 1e-9 + 1.0 / 10
    factors = factorize(T)
    assert factors.cond > 1e8
    assert factors.cond_deflated < 10


def test_collapsed_span_is_refused_by_name():
    T = torch.rand(10, 4, dtype=torch.float64)
    T[:, 3] = T[:, 1]
    with pytest.raises(ValueError, match=r"the test map: its span has collapsed, 1 of 4"):
        factorize(T, name="the test map")
    with pytest.raises(ValueError, match="must be one of polar, qr"):
        factorize(T, "svd")
    with pytest.raises(ValueError, match="collapsed"):
        factorize(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="collapsed"):  # float32 holds nothing of this span
        factorize(transport_map(sinkhorn(torch.rand(64, 48), 1e7).plan))
    with pytest.raises(ValueError, match="non-finite"):
        factorize(T * torch.nan)


def test_transport_names_the_reg_that_collapses():
    x = torch.randn(200, 12)
    cost = l1_cost(x)
    for steps in (1, 2, math.inf):
        with pytest.raises(ValueError, match=r"reg 1e\+15 x mean cost: its span has collapsed"):
            transport(cost, largest(x.abs().mean(0), 8), reg=1e15, steps=steps)


def test_transport_reports_its_solve():
    x = torch.randn(300, 20)
    found = transport(l1_cost(x), largest(x.abs().mean(0), 15))
    assert orthonormal(found.q)
    assert found.details["status"] == "converged"
    assert set(found.seconds) == {"sinkhorn", "factorisation"}


def test_transports_in_a_row_approach_their_limit():
    """(D P)^q of a selection is a subspace iteration, and its limit the leading eigenvectors."""
    x = torch.randn(300, 20) * torch.linspace(1, 3, 20)
    cost, selection = l1_cost(x), torch.arange(6)
    limit = transport(cost, selection).q
    assert orthonormal(limit)

    def distance(steps: int) -> float:
        q = transport(cost, selection, steps=steps).q
        return float((q - limit @ (limit.mT @ q)).norm())

    assert distance(1000) < 0.1 * distance(10) < 0.1 * distance(1)


@pytest.mark.parametrize(("width", "k"), [(2, 1), (7, 6), (33, 20)])
def test_the_limit_is_that_of_the_float64_oracle(width, k):
    """The plan of the reference, symmetrised, by NumPy; its spectrum is what the report shows."""
    cost = l1_cost(torch.randn(50, width))
    found = transport(cost, torch.arange(k), reg=0.7)
    reg = 0.7 * float(cost.double().mean())
    plan = sinkhorn(cost.double(), reg, tol=1e-12, max_iter=10_000, backend="torch").plan.numpy()
    values, vectors = np.linalg.eigh(width * (plan + plan.T) / 2)
    assert values.min() > 0  # the kernel of an L1 distance is positive definite
    assert same_span(found.q, torch.from_numpy(vectors[:, width - k :].copy()))
    assert found.spectrum.numpy() == pytest.approx(values[::-1], abs=1e-8)
    assert found.spectrum[0] == pytest.approx(1.0)  # the constant direction
    assert found.details["steps"] == "inf"


def test_at_a_large_reg_the_limit_is_classical_scaling():
    x = torch.randn(400, 15).double() * torch.linspace(1, 2, 15)
    cost = l1_cost(x.float()).double()
    centring = torch.eye(15, dtype=torch.float64) - 1 / 15
    scaling = torch.linalg.eigh(-centring @ cost @ centring).eigenvectors[:, -5:]
    constant = torch.full((15, 1), 15**-0.5, dtype=torch.float64)
    found = transport(cost.float(), torch.arange(6), reg=1e4)
    assert torch.allclose(
        found.q.mT @ constant, torch.eye(6, 1).double(), atol=1e-3
    ) or torch.allclose(found.q.mT @ constant, -torch.eye(6, 1).double(), atol=1e-3)
    missed = scaling - found.q @ (found.q.mT @ scaling)
    assert missed.norm() < 2e-3


def test_several_limits_at_once_and_neurons_that_are_equal():
    x = torch.randn(2, 60, 9)
    x[1, :, 4:] = x[1, :, 4:5]  # five neurons that nothing tells apart
    cost = torch.stack([l1_cost(one) for one in x])
    both = transports(cost, [torch.arange(6)] * 2)
    for one, found in zip(cost, both, strict=True):
        assert orthonormal(found.q)
        assert same_span(found.q, transport(one, torch.arange(6)).q)
    signal = x[1].double()
    assert torch.allclose(signal @ both[1].q @ both[1].q.mT, signal, atol=1e-5)


def test_align_keeps_the_span_and_approaches_the_axes():
    q = torch.linalg.qr(torch.randn(14, 6, dtype=torch.float64)).Q
    selection = torch.tensor([0, 2, 3, 7, 8, 13])
    aligned = align(q, selection)
    assert orthonormal(aligned)
    assert same_span(aligned, q)
    plain = torch.zeros(14, 6, dtype=torch.float64)
    plain[selection, torch.arange(6)] = 1
    assert (aligned - plain).norm() < (q - plain).norm()
    full = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert torch.allclose(align(full, torch.arange(6)), torch.eye(6, dtype=torch.float64))


def test_baselines():
    x = torch.randn(500, 10, dtype=torch.float64) * torch.arange(1, 11)
    importance, moment = x.abs().mean(0), x.mT @ x / len(x)
    top = largest(importance, 4)
    chosen = selected(top, 10)
    assert chosen.selection.tolist() == [6, 7, 8, 9]
    assert torch.equal(chosen.q.nonzero()[:, 0], chosen.selection)
    kept = pca(moment, top, importance, kept_axes=2)
    assert orthonormal(kept.q)
    assert kept.q[8, 0] == 1
    assert kept.q[9, 1] == 1
    plain = pca(moment, top, importance, kept_axes=0)
    leading = torch.linalg.eigh(moment).eigenvectors[:, -4:]
    assert same_span(plain.q, leading)
    assert largest(torch.tensor([3.0, 1.0, 2.0]), 2).tolist() == [0, 2]


@pytest.mark.parametrize("k", [1, 2, 7, 24])
@pytest.mark.parametrize("kind", ["rotation", "selection", "mirrored"])
def test_level_keeps_the_mean(k, kind):
    """The channels' mean is the old channels' mean, in an orthonormal basis of nearly q's span."""
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q[:, :k]
    if kind != "rotation":
        q = torch.eye(24, dtype=torch.float64)[:, :k] * (-1 if kind == "mirrored" else 1)
    leveled = level(q)
    assert torch.allclose(leveled.mT @ leveled, torch.eye(k, dtype=torch.float64))
    x = torch.randn(50, 24, dtype=torch.float64)
    scale = (k / 24) ** 0.5
    assert torch.allclose((scale * x @ leveled).mean(1), x.mean(1))
    # One direction of the span was given up for the mean, and no more.
    assert int((torch.linalg.svdvals(q.mT @ leveled) > 1 - 1e-9).sum()) >= k - 1


@pytest.mark.parametrize("steps", [1, math.inf])
def test_a_rehearsal_solves_a_problem_of_the_same_kind(monkeypatch, steps):
    """What is compiled for it is what the maps will use; no random number is drawn for it."""
    solved = []
    solver = transporting.sinkhorn

    def seen(cost, *given, **options):
        solved.append((cost.dtype, cost.shape[1:], options["tol"], options["backend"]))
        return solver(cost, *given, **options)

    monkeypatch.setattr(transporting, "sinkhorn", seen)
    method = METHODS["dot"]
    options = make_options(width=4, steps=steps, backend="triton")
    drawn = torch.get_rng_state()
    method.rehearse(9, 4, device_of("triton"), options)
    assert torch.equal(torch.get_rng_state(), drawn)
    cost = l1_cost(torch.randn(30, 9, device=device_of("triton")))[None]
    transports(cost, [torch.arange(4)], steps=steps, backend="triton")
    assert solved[0] == solved[1]


def test_a_rehearsal_is_for_kernels_that_are_compiled(monkeypatch):
    monkeypatch.setattr(transporting, "sinkhorn", None)
    transporting.rehearse(9, 4, torch.device("cpu"), "cpp")
