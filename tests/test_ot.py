"""dotresize.ot against POT: values, types, logs, warnings, and what it refuses."""

import inspect
import operator
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ot as pot
import pytest
import torch

from dotresize import ot

METHODS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
REG = 0.05


def problem(n: int, m: int, k: int = 0):
    rng = np.random.default_rng(n * 100 + m)
    a, b = rng.random(n) + 0.1, rng.random((m, k) if k else m) + 0.1
    return a / a.sum(), b / b.sum(0), rng.random((n, m))


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2", "batch.solve_batch"])
def test_signatures_are_POTs(name):
    ours = inspect.signature(getattr(ot, name.split(".")[-1]))
    theirs = inspect.signature(operator.attrgetter(name)(pot))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (7, 1), (13, 17), (31, 8)])
@pytest.mark.usefixtures("no_warning")
def test_plan_and_log(method, n, m):
    a, b, cost = problem(n, m)
    plan, log = ot.sinkhorn(a, b, cost, REG, method=method, log=True)
    theirs, their_log = pot.sinkhorn(a, b, cost, REG, method=method, log=True)
    np.testing.assert_allclose(plan, theirs, atol=1e-8)
    np.testing.assert_allclose(plan.sum(1), a, rtol=1e-12)
    assert log.keys() == their_log.keys()
    assert type(log["err"][-1]) is type(their_log["err"][-1])
    u, v = log.get("log_u", log.get("logu")), log.get("log_v", log.get("logv"))
    if u is None:
        u, v = (np.log(log["u"]), np.log(log["v"])) if "u" in log else (log["alpha"], log["beta"])
    if "alpha" in log:
        u, v = log["alpha"] / REG, log["beta"] / REG
    np.testing.assert_allclose(np.exp(u[:, None] + v - cost / REG), plan, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 11])
@pytest.mark.parametrize("method", METHODS[:3])
def test_iterates_are_POTs_also_from_a_warm_start(method, steps):
    a, b, cost = problem(9, 14)
    u, v = np.linspace(-1, 1, 9), np.zeros(14)
    for start in (None, (u, v)):
        options = {"method": method, "numItermax": steps, "warmstart": start, "warn": False}
        options["stopThr"] = 0  # plain iterations
        options["tau"] = 1e100  # POT's plan is off by a factor just after it absorbed potentials
        ours, log = ot.sinkhorn(a, b, cost, REG, log=True, **options)
        theirs, their_log = pot.sinkhorn(a, b, cost, REG, log=True, **options)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        count = "niter" if "niter" in log else "n_iter"
        assert log[count] == their_log[count] == steps - 1


def test_greenkhorn():
    a, b, cost = problem(6, 5)
    plan, log = ot.sinkhorn(a, b, cost, 0.3, method="greenkhorn", log=True)
    theirs, their_log = pot.sinkhorn(a, b, cost, 0.3, method="greenkhorn", log=True)
    np.testing.assert_allclose(plan, theirs, atol=1e-8)
    assert log.keys() == their_log.keys()


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn2"])
def test_several_histograms(method, solver, monkeypatch):
    monkeypatch.setattr("dotresize.ot._problem._ENTRIES", 2 * 11 * 6)  # two at a time
    a, b, cost = problem(11, 6, 5)
    ours, log = getattr(ot, solver)(a, b, cost, REG, method=method, log=True)
    theirs, their_log = getattr(pot, solver)(a, b, cost, REG, method=method, log=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert log.keys() == their_log.keys()
    for name in log.keys() - {"err", "warmstart", "niter", "n_iter"}:
        assert log[name].shape == their_log[name].shape


def test_log_restarts_where_it_ended():
    a, b, cost = problem(12, 10, 2)
    for method in METHODS[:3]:
        _, log = ot.sinkhorn(a, b[:, 0], cost, REG, method=method, log=True)
        start = log.get("warmstart", (log.get("log_u"), log.get("log_v")))
        if method == "sinkhorn":
            start = np.log(log["u"]), np.log(log["v"])
        _, again = ot.sinkhorn(a, b[:, 0], cost, REG, method=method, log=True, warmstart=start)
        assert again.get("niter", again.get("n_iter")) <= 1
    starts = [None, (log["logu"], log["logv"])]
    losses = ot.sinkhorn(a, b, cost, REG, method="sinkhorn_log", warmstart=starts)
    np.testing.assert_allclose(losses, ot.sinkhorn2(a, b, cost, REG), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.usefixtures("no_warning")
def test_types_come_back(dtype):
    cost = torch.arange(12).reshape(3, 4).to(dtype)
    expected = dtype if dtype.is_floating_point else torch.float32
    assert ot.sinkhorn([], [], cost, 4.0).dtype == expected
    loss, log = ot.sinkhorn2([], [], cost, 4.0, log=True)
    assert loss.shape == ()
    assert loss.dtype == log["u"].dtype == log["err"][0].dtype == expected
    assert ot.solve_batch(cost[None], 4.0).value.dtype == expected
    array = cost.numpy()
    plan = ot.sinkhorn([], [], array[:, ::-1], 4.0)
    assert plan.dtype == (array.dtype if array.dtype.kind == "f" else np.float64)
    reversed_plan = ot.sinkhorn([], [], torch.tensor(array[:, ::-1].copy()), 4.0)
    np.testing.assert_allclose(plan, reversed_plan.numpy(), rtol=2e-3)


def test_lists_and_read_only_arrays():
    cost = np.array([[0.0, 1.0], [1.0, 0.0]])
    cost.setflags(write=False)
    expected = pot.sinkhorn([0.3, 0.7], [0.5, 0.5], cost.tolist(), 1)
    for given in (cost, cost.tolist()):
        plan = ot.sinkhorn([0.3, 0.7], [0.5, 0.5], given, 1)
        assert isinstance(plan, np.ndarray)
        np.testing.assert_allclose(plan, expected, atol=1e-9)
    loss = ot.sinkhorn2([], [], torch.tensor(cost.copy()), 1)
    np.testing.assert_allclose(loss, pot.sinkhorn2([], [], cost, 1), atol=1e-9)


@pytest.mark.usefixtures("no_warning")
def test_float32_converges_below_its_own_resolution():
    a, b, cost = problem(60, 40)
    single = [x.astype(np.float32) for x in (a, b, cost)]
    plan, log = ot.sinkhorn(*single, REG, log=True)
    assert plan.dtype == np.float32
    assert log["err"][-1] < 1e-9
    assert log["niter"] < 100
    np.testing.assert_allclose(plan, pot.sinkhorn(a, b, cost, REG), rtol=1e-4, atol=1e-9)


def test_warnings():
    a, b, cost = problem(8, 9)
    for method in (*METHODS, "greenkhorn"):
        with pytest.warns(UserWarning, match="did not converge"):
            ot.sinkhorn(a, b, cost, REG, method=method, stopThr=0, numItermax=1)
    with pytest.warns(UserWarning, match="a sums to 1, b to 1.5") as caught:
        plan = ot.sinkhorn(a, 1.5 * b, cost, REG)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(plan, pot.sinkhorn(a, 1.5 * b, cost, REG, warn=False), atol=1e-8)
    with pytest.warns(UserWarning, match="1 of 2 problems; problem 0 ended as 'max_iter'"):
        found = ot.solve_batch(np.stack([cost, 0 * cost]), REG, max_iter=2, tol=1e-9)
    assert found.status == ("max_iter", "converged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ot.sinkhorn(a, b, cost, REG, numItermax=2, warn=False)
        ot.sinkhorn2(a, b, cost, REG, numItermax=2)


def test_forbidden_pairs_zero_masses_and_bad_numbers():
    a, b, cost = problem(5, 6)
    a[2], cost[0, :3] = 0, np.inf
    a /= a.sum()
    plan, log = ot.sinkhorn(a, b, cost, 0.5, method="sinkhorn_log", log=True)
    assert (plan[2] == 0).all()
    assert (plan[0, :3] == 0).all()
    assert log["log_u"][2] == -np.inf
    assert np.isfinite(ot.sinkhorn2(a, b, cost, 0.5))
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-8)
    cost[0] = np.inf
    with pytest.warns(UserWarning, match="only infinite costs"):
        assert (ot.sinkhorn(a, b, cost, 0.5, warn=False) == 0).all()
    cost[0, 0] = np.nan
    with pytest.warns(UserWarning, match="NaN"):
        assert np.isnan(ot.sinkhorn(a, b, cost, 0.5, warn=False)).all()


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("method", ["auto", "sinkhorn"])
@pytest.mark.usefixtures("no_warning")
def test_solve_batch(reg_type, method):
    a, b, _ = zip(*(problem(7, 10) for _ in range(3)), strict=True)
    cost = np.random.default_rng(0).random((3, 7, 10))
    arguments = (0.1, np.stack(a), np.stack(b))
    options = {"tol": 1e-10, "method": method, "reg_type": reg_type}
    ours = ot.solve_batch(cost, *arguments, **options)
    theirs = pot.batch.solve_batch(cost, *arguments, **options)
    for name in ("plan", "value", "value_linear"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-9)
    f, g = ours.potential_a, ours.potential_b
    their_f, their_g = theirs.potentials
    if method == "sinkhorn":
        f, g, their_f, their_g = map(np.log, (f, g, their_f, their_g))
    gauge = (f - their_f)[:, :1]
    np.testing.assert_allclose(f - gauge, their_f, atol=1e-8)
    np.testing.assert_allclose(g + gauge, their_g, atol=1e-8)
    np.testing.assert_allclose(ours.marginal_a, arguments[1], rtol=1e-12)
    assert ours.converged.all()
    assert ours.log == {"n_iter": ours.n_iter.max()}


def gradients(solver, cost, a, b, weight, **options):
    leaves = [x.clone().requires_grad_() for x in (a, b, cost)]
    out = solver(*leaves, 0.2, **options)
    (out * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


def test_gradients_by_marginals_are_unrolled_POTs():
    a, b, cost = map(torch.from_numpy, problem(6, 5))
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 5)))
    options = {"stopThr": 1e-14, "numItermax": 3000}
    ours = gradients(ot.sinkhorn, cost, a, b, weight, **options)
    theirs = gradients(pot.sinkhorn, cost, a, b, weight, **options)
    for i in range(2):
        torch.testing.assert_close(ours[i], theirs[i], rtol=1e-9, atol=1e-9)


def test_gradients_by_the_cost_are_unrolled_POTs():
    a, b, cost = map(torch.from_numpy, problem(6, 5))
    options = {"stopThr": 1e-14, "numItermax": 3000}
    ours = gradients(ot.sinkhorn2, cost, a, b, 1.0, **options)
    theirs = gradients(pot.sinkhorn2, cost, a, b, 1.0, **options)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    batch = ot.solve_batch(cost[None].requires_grad_(), 0.2, grad="autodiff")
    assert batch.plan.requires_grad


def test_envelope_and_detach():
    cost = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    result = ot.solve_batch(cost, 0.3)
    result.value.sum().backward()
    torch.testing.assert_close(cost.grad, result.plan)
    assert not result.plan.requires_grad
    assert not ot.solve_batch(cost, 0.3, grad="detach").value.requires_grad


def test_what_is_not_here_names_POTs_call():
    a, b, cost = problem(3, 4)
    for call, name in (
        (lambda: ot.emd, r"ot\.emd "),
        (lambda: ot.solve_gromov, r"ot\.solve_gromov "),
        (lambda: ot.sinkhorn_unbalanced, r"ot\.unbalanced\.sinkhorn_unbalanced "),
        (lambda: ot.sinkhorn(a, b, cost, 0), r"ot\.emd"),
        (lambda: ot.solve_batch(cost[None]), r"ot\.batch\.solve_batch"),
    ):
        with pytest.raises(NotImplementedError, match=name):
            call()
    assert not hasattr(ot, "emd")
    assert not hasattr(ot, "nonsense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "foo"}, "unknown method 'foo'"),
        ({"reg": -1.0}, "reg is -1.0"),
        ({"reg": [1.0, 2.0]}, "reg is .*one positive number"),
        ({"a": np.ones(3)}, r"a has shape \(3,\): must be \(4,\)"),
        ({"b": np.ones((5, 0))}, r"b has shape \(5, 0\)"),
        ({"b": -np.ones(5)}, "b: entries must be"),
        ({"M": np.ones(5)}, r"M has shape \(5,\)"),
        ({"M": np.ones((4, 5), complex)}, "M has dtype complex128"),
        ({"M": torch.ones(4, 5)}, "all NumPy arrays or all torch"),
        ({"a": "abcd"}, "a is a str"),
        ({"numItermax": 0}, "numItermax is 0"),
        ({"stopThr": -1.0}, "stopThr is -1.0"),
        ({"warmstart": (np.ones(5), np.ones(4))}, "warmstart"),
        ({"method": "greenkhorn", "b": np.ones((5, 2))}, "greenkhorn takes one"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    arguments = {"a": np.ones(4) / 4, "b": np.ones(5) / 5, "M": np.ones((4, 5)), "reg": 1.0}
    with pytest.raises(ValueError, match=message):
        ot.sinkhorn(**(arguments | changes))


def test_threads_do_not_meet():
    problems = [problem(10 + i, 20 - i) for i in range(8)]
    alone = [ot.sinkhorn(*p, REG) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: ot.sinkhorn(*p, REG), problems))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
