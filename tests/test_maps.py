"""Transport maps, their factors, alignment, and the baselines in the same form."""

from __future__ import annotations

import pytest
import torch

from dotresize import factorize, sinkhorn, transport_map
from dotresize.baselines.magnitude import selected
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
    with pytest.raises(ValueError, match=r"reg 1e\+15 x mean cost: its span has collapsed"):
        transport(cost, largest(x.abs().mean(0), 8), reg=1e15)


def test_transport_reports_its_solve():
    x = torch.randn(300, 20)
    found = transport(l1_cost(x), largest(x.abs().mean(0), 15))
    assert orthonormal(found.q)
    assert found.details["status"] == "converged"
    assert set(found.seconds) == {"sinkhorn", "factorisation"}


def test_transports_in_a_row_approach_the_dominant_subspace():
    """(D P)^q of a selection is a subspace iteration; more steps come nearer to its limit."""
    x = torch.randn(300, 20)
    cost, selection = l1_cost(x), torch.arange(6)
    limit = transport(cost, selection, steps=400).q

    def distance(steps: int) -> float:
        q = transport(cost, selection, steps=steps).q
        return float((q - limit @ (limit.mT @ q)).norm())

    assert distance(100) < 0.7 * distance(10) < 0.7 * distance(2)


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
