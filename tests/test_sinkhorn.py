"""sinkhorn, every backend against POT and the float64 oracle."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from conftest import device_of

from dotresize import SinkhornResult, sinkhorn

SHAPES = [(1, 1), (1, 7), (13, 1), (31, 29), (65, 17), (9, 129)]
INF = float("inf")


def problem(n: int, m: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = torch.rand(n, dtype=dtype) + 0.1, torch.rand(m, dtype=dtype) + 0.1
    return torch.rand(n, m, dtype=dtype), a / a.sum(), b / b.sum()


def pot_plan(cost, reg, a, b) -> np.ndarray:
    a, b, cost = (v.double().cpu().numpy() for v in (a, b, cost))
    # float32 marginals sum alike to rounding only, which POT would never converge on.
    return ot.sinkhorn(
        a / a.sum(), b / b.sum(), cost, reg, method="sinkhorn_log", numItermax=5000, stopThr=1e-12
    )


def l1(plan: torch.Tensor, truth) -> float:
    return float((plan.double().cpu() - torch.as_tensor(truth).double().cpu()).abs().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_pot(backend, shape):
    cost, a, b = (v.to(device_of(backend)) for v in problem(*shape))
    for reg in (0.05, 1.0):
        result = sinkhorn(cost, reg, a, b, tol=1e-6, backend=backend)
        assert result.converged
        assert result.status == "converged"
        assert l1(result.plan, pot_plan(cost, reg, a, b)) < 1e-5
        assert isinstance(result.n_iter, int)
        assert float((result.plan.sum(1) - a).abs().sum()) < 1e-5


def test_float64_reaches_float64(backend):
    cost, a, b = (v.to(device_of(backend)) for v in problem(23, 19, torch.float64))
    given = cost.clone()
    result = sinkhorn(cost, 0.1, a, b, tol=1e-12, backend=backend)
    assert result.converged
    assert isinstance(result.value, float)
    assert l1(result.plan, pot_plan(cost, 0.1, a, b)) < 1e-11
    assert torch.equal(cost, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_costs_are_solved_in_float32(backend, dtype):
    cost = torch.rand(11, 8, device=device_of(backend)).to(dtype)
    uniform = [torch.full((k,), 1 / k) for k in (11, 8)]
    result = sinkhorn(cost, 0.2, backend=backend)
    assert result.plan.dtype == torch.float32
    assert l1(result.plan, pot_plan(cost, 0.2, *uniform)) < 1e-5


def test_potentials_value_and_gauge(backend):
    """plan = exp(f + g - C / reg), and POT's numbers for the same problem."""
    cost, a, b = (v.to(device_of(backend)) for v in problem(17, 12))
    result = sinkhorn(cost, 0.3, a, b, tol=1e-7, backend=backend, max_iter=50)
    f, g = result.potentials
    assert torch.allclose((f[:, None] + g - cost / 0.3).exp(), result.plan, atol=1e-7)
    assert result.potential_a is f
    assert result.potential_b is g
    arrays = [v.double().cpu()[None] for v in (cost, a, b)]
    theirs = ot.batch.solve_batch(arrays[0], 0.3, arrays[1], arrays[2], tol=1e-9)
    assert result.value == pytest.approx(float(theirs.value[0]), abs=1e-5)
    assert result.value_linear == pytest.approx(float(theirs.value_linear[0]), abs=1e-6)


def test_batch_equals_singles_and_stops_alone(backend):
    device = device_of(backend)
    cost = torch.rand(4, 21, 15, device=device)
    reg = torch.tensor([0.05, 0.2, 1.0, 10.0])
    batch = sinkhorn(cost, reg, tol=1e-5, backend=backend)
    assert batch.plan.shape == cost.shape
    assert batch.n_iter[0] > batch.n_iter[2]
    assert batch.converged.all()
    for i, single in enumerate(batch):
        alone = sinkhorn(cost[i], float(reg[i]), tol=1e-5, backend=backend)
        assert single.n_iter == alone.n_iter
        assert torch.allclose(single.plan, alone.plan, atol=1e-8)
        assert isinstance(single, SinkhornResult)
    assert len(batch) == 4


def test_ragged_list_keeps_order(backend):
    device = device_of(backend)
    shapes = [(5, 9), (3, 2), (5, 9), (7, 7)]
    costs = [torch.rand(*shape, device=device) for shape in shapes]
    marginals = [torch.full((shape[0],), 1 / shape[0], device=device) for shape in shapes]
    result = sinkhorn(costs, 0.2, marginals, backend=backend)
    assert [tuple(plan.shape) for plan in result.plan] == shapes
    for i, cost in enumerate(costs):
        assert l1(result.plan[i], sinkhorn(cost, 0.2, backend=backend).plan) < 1e-6
        assert result[i].status == "converged"


def test_tol_zero_runs_exactly_max_iter(backend):
    cost = torch.rand(6, 5, device=device_of(backend))
    for count in (0, 1, 17):
        result = sinkhorn(cost, 0.5, tol=0, max_iter=count, backend=backend)
        assert result.n_iter == count
        assert result.status == "max_iter"
        assert not result.converged


def test_marginal_error_is_that_of_the_plan(backend):
    cost, a, b = (v.to(device_of(backend)) for v in problem(30, 20))
    result = sinkhorn(cost, 0.02, a, b, tol=0, max_iter=3, backend=backend)
    rows = float((result.plan.sum(1) - a).abs().sum())
    columns = float((result.plan.sum(0) - b).abs().sum())
    assert columns > 1e-3  # far from converged, so that the figure means something
    assert result.marginal_error == pytest.approx(columns, rel=1e-3)
    assert rows < 1e-6


def test_warm_start_needs_no_iterations(backend):
    cost = torch.rand(2, 12, 9, device=device_of(backend))
    first = sinkhorn(cost, 0.05, tol=1e-5, backend=backend)
    again = sinkhorn(cost, 0.05, tol=1e-4, init=first.potentials, backend=backend)
    assert again.n_iter.tolist() == [0, 0]


def test_transposed_start_potentials(backend):
    cost = torch.rand(3, 6, 5, device=device_of(backend))
    start = torch.randn(5, 3, device=cost.device).T
    result = sinkhorn(cost, 0.2, init=(None, start), backend=backend)
    assert float((result.plan.sum(1) - 1 / 5).abs().max()) < 1e-4
    assert torch.equal(start, start.clone())  # not written to


def test_huge_quotients(backend):
    """cost / reg of 1e9, then beyond float32 altogether: never NaN."""
    cost = torch.tensor([[1e6, 2e6], [3e6, 1e6]], device=device_of(backend))
    result = sinkhorn(cost, 1e-3, backend=backend)
    assert result.converged
    assert l1(result.plan, torch.eye(2) / 2) < 1e-6
    beyond = sinkhorn(cost * 1e24, 1e-9, backend=backend)
    assert beyond.converged
    assert not beyond.plan.isnan().any()


def test_scaling_cost_and_reg_changes_nothing(backend):
    cost = torch.rand(10, 8, device=device_of(backend))
    plan = sinkhorn(cost, 0.1, tol=1e-6, backend=backend).plan
    assert l1(sinkhorn(cost * 1e5, 1e4, tol=1e-6, backend=backend).plan, plan) < 1e-5
    shifted = cost + torch.arange(10, device=cost.device)[:, None] * 0.5 + 3
    assert l1(sinkhorn(shifted, 0.1, tol=1e-6, backend=backend).plan, plan) < 1e-4


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_reg(backend, ratio):
    """float32 loses (C / reg) * 6e-8 in the exponent; both sides run the same iterations."""
    cost = torch.rand(24, 18, device=device_of(backend))
    settings = {"tol": 0, "max_iter": 50}
    truth = sinkhorn(cost.double().cpu(), ratio, backend="torch", **settings)
    result = sinkhorn(cost, ratio, backend=backend, **settings)
    assert l1(result.plan, truth.plan) < 2e-6 + 5e-7 / ratio


def test_underflowing_columns_are_redone(backend):
    """Start potentials under which float32's unshifted column sums are exactly 0, then huge."""
    cost = torch.rand(20, 15, device=device_of(backend))
    cost[:, 3] += 4.0
    truth = sinkhorn(cost.double().cpu(), 0.2, tol=1e-9, backend="torch")
    start = torch.zeros(15, device=cost.device)
    start[3], start[8] = -700.0, 300.0
    result = sinkhorn(cost, 0.2, init=(None, start), backend=backend)
    assert result.converged
    assert l1(result.plan, truth.plan) < 1e-4
    once = sinkhorn(cost, 0.2, init=(None, start), tol=0, max_iter=1, backend=backend)
    assert torch.isfinite(once.plan).all()
    assert once.plan[:, 3].sum() > 1e-3  # one column update is enough to bring the column back


def test_far_column(backend):
    cost = torch.rand(20, 15, device=device_of(backend))
    cost[7, 3:] += 30.0
    cost[:, 3] += torch.linspace(300, 301, 20, device=cost.device)
    settings = {"tol": 0, "max_iter": 60}
    truth = sinkhorn(cost.double().cpu(), 0.05, backend="torch", **settings)
    result = sinkhorn(cost, 0.05, backend=backend, **settings)
    assert torch.isfinite(result.plan).all()
    assert l1(result.plan, truth.plan) < 1e-2  # float32 holds a cost of 300 to 3e-5


def test_zero_marginals(backend):
    cost = torch.rand(5, 4, device=device_of(backend))
    a = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0], device=cost.device)
    b = torch.tensor([0.0, 0.6, 0.0, 0.4], device=cost.device)
    result = sinkhorn(cost, 0.1, a, b, backend=backend)
    assert result.converged
    assert (result.plan[a == 0] == 0).all()
    assert (result.plan[:, b == 0] == 0).all()
    kept = result.plan[a > 0][:, b > 0]
    truth = pot_plan(cost[a > 0][:, b > 0], 0.1, a[a > 0], b[b > 0])
    assert l1(kept, truth) < 1e-5
    assert not np.isnan(result.value)


def test_forbidden_pairs(backend):
    cost = torch.rand(6, 6, device=device_of(backend))
    cost[2, :4] = INF
    result = sinkhorn(cost, 0.2, backend=backend, max_iter=5000)
    assert result.converged
    assert (result.plan[2, :4] == 0).all()
    truth = sinkhorn(cost.double().cpu(), 0.2, backend="torch", max_iter=5000)
    assert l1(result.plan, truth.plan) < 1e-4
    assert np.isfinite(result.value)


def test_bad_problems_do_not_touch_the_others(backend):
    cost = torch.rand(5, 7, 6, device=device_of(backend))
    good = sinkhorn(cost, 0.3, backend=backend)
    bad = cost.clone()
    bad[0, 3, 2] = torch.nan
    bad[1, 0, 0] = -INF
    bad[2, 4] = INF
    bad[3, :, 5] = INF
    result = sinkhorn(bad, 0.3, backend=backend)
    assert result.status == ("invalid", "invalid", "infeasible", "infeasible", "converged")
    assert result.converged.tolist() == [False] * 4 + [True]
    assert torch.equal(result.plan[4], good.plan[4])
    assert result.plan[0].isnan().all()
    assert (result.plan[2] == 0).all()
    assert result.marginal_error[2] == pytest.approx(1.0)
    assert result.reason == (
        "cost is nan at row 3, column 2: must be finite, or inf",
        "cost is -inf at row 0, column 0: must be finite, or inf",
        "row 4 has mass, and every pair of it is forbidden (inf)",
        "column 5 has mass, and every pair of it is forbidden (inf)",
        "",
    )
    short = sinkhorn(cost[4], 0.01, max_iter=2, backend=backend)
    assert short.reason == f"marginal error {short.marginal_error:.3g} after 2 iterations"
    single = sinkhorn(bad[2], 0.3, backend=backend)
    assert single.status == "infeasible"
    assert single.converged is False


def test_equal_neurons_get_equal_rows(backend):
    cost = torch.rand(8, 6, device=device_of(backend))
    cost[5] = cost[1]
    plan = sinkhorn(cost, 0.1, backend=backend).plan
    assert torch.equal(plan[5], plan[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": torch.zeros(3)}, r"\(n, m\) or \(B, n, m\)"),
        ({"cost": torch.zeros(2, 3, dtype=torch.int64)}, "floating-point"),
        ({"cost": torch.zeros(0, 3)}, "problems with entries"),
        ({"cost": torch.zeros(2, 3), "reg": 0.0}, "positive and finite"),
        ({"cost": torch.zeros(2, 3), "reg": torch.ones(2)}, "a number or"),
        ({"cost": torch.zeros(2, 3), "a": torch.ones(3)}, r"a has shape \(3,\)"),
        ({"cost": torch.zeros(2, 3), "a": torch.tensor([2.0, -1.0])}, "negative"),
        ({"cost": torch.zeros(2, 3), "a": torch.ones(2)}, r"sum to 2 \(a\) and 1 \(b\)"),
        ({"cost": torch.zeros(2, 3), "tol": -1.0}, "tol"),
        ({"cost": torch.zeros(2, 3), "tol": None}, "tol is None: must be a number"),
        ({"cost": torch.zeros(2, 3), "reg": "small"}, "reg is 'small': must be a number"),
        ({"cost": torch.zeros(2, 3), "max_iter": 1.5}, "max_iter"),
        ({"cost": torch.zeros(2, 3), "backend": "gpu"}, "must be one of"),
        ({"cost": [torch.zeros(2, 3)], "a": [torch.ones(2)] * 2}, "list as long"),
        ({"cost": []}, "empty list"),
        ({"cost": torch.zeros(0, 2, 3)}, "problems with entries"),
        ({"cost": np.zeros((2, 3))}, "cost is a ndarray: must be a torch tensor"),
        ({"cost": torch.zeros(2, 3).to_sparse()}, "cost is torch.sparse_coo: must be a dense"),
        ({"cost": torch.zeros(2, 3), "a": [0.5, 0.5]}, "a is a list: must be a tensor"),
        ({"cost": [torch.zeros(2, 3)], "a": 3.0}, "list as long"),
        ({"cost": torch.zeros(2, 3), "init": 3}, "init: g"),
        ({"cost": torch.zeros(2, 3), "acceleration": ["none"]}, "must be auto or one of"),
        ({"cost": torch.zeros(2, 3), "max_iter": 10**30}, "max_iter"),
        ({"cost": [torch.zeros(2, 3)] * 2, "a": [torch.ones(2), torch.ones(3)]}, "a of problem 1"),
        ({"cost": torch.zeros(2, 3), "init": (torch.zeros(2), None)}, "init: g"),
        (
            {
                "cost": [torch.zeros(3, 3), torch.zeros(2, 2)],
                "a": [torch.full((3,), 1 / 3), torch.tensor([0.7, 0.7])],
            },
            "marginals of problem 1 sum to 1.39",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**({"reg": 0.1} | arguments))


def test_a_picture_of_a_problem():
    cost = torch.rand(3, 30, 20)
    result = sinkhorn(cost, 0.05, backend="cpp")
    plan, marginals, convergence, _ = result[1].plot().axes
    assert torch.equal(torch.tensor(plan.images[0].get_array()), result.plan[1].double())
    found = sum(float(line.get_ydata().sum()) for line in marginals.lines)
    assert found == pytest.approx(float(result.marginal_error[1]), rel=0.1)
    accelerated, plain = ([*line.get_ydata()] for line in convergence.lines)
    assert accelerated[-1] == pytest.approx(float(result.marginal_error[1]), rel=1e-2)
    assert accelerated[-1] < plain[-1] < plain[0]
    with pytest.raises(ValueError, match=r"a result of 3 problems: result\[i\].plot\(\) draws one"):
        result.plot()
    cost[0, 0] = torch.inf
    with pytest.raises(ValueError, match="no plan to draw: row 0 has mass, and every pair"):
        sinkhorn(cost[0], 0.05).plot()
