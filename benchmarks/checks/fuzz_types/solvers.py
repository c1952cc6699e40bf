"""A valid call of every solver, and what its result must be.

Results are compared with float64: the L1 cost and the assignment with formulas of their own, the
others with the same function, called with plain arguments and nothing odd around it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import dotresize
from dotresize.ops.activation_cost import METRICS

from .call import Call, apart, same_as_plain
from .kinds import Draw, plain_of

FLOATS = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


def plain_of_all(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plain_of(value) for name, value in values.items()}


def l1_cost(draw: Draw) -> Call:
    batch, t, n, m = draw.one_of((), (), (2,)), draw.randint(1, 20), 4, draw.randint(1, 5)
    dtype = draw.one_of(torch.float32, torch.float16, torch.bfloat16)
    x, y = torch.rand(*batch, t, n).to(dtype), torch.rand(*batch, t, m).to(dtype)
    second = draw.one_of("y", "targets", "neither")
    out = draw.chance(0.2)
    columns = n if second == "neither" else m
    arguments = {
        "x": x,
        "y": y if second == "y" else None,
        "targets": torch.randint(0, n, (m,)) if second == "targets" else None,
        "reduction": draw.one_of("mean", "sum"),
        "precision": draw.one_of("fp32", "fp32", "u8"),
        "out": torch.empty(*batch, n, columns) if out else None,
        "statistics": draw.chance(0.3),
        "backend": draw.one_of("auto", "cpp", "torch"),
    }
    return Call(dotresize.l1_cost, arguments, check_cost)


def activation_cost(draw: Draw) -> Call:
    call = l1_cost(draw)
    metric = {"metric": draw.choice(METRICS)}
    if metric["metric"] != "l1":
        metric["precision"] = "fp32"
    if metric["metric"] in ("cosine", "correlation"):
        metric["reduction"] = "mean"
    return Call(dotresize.activation_cost, call.arguments | metric, check_cost)


def distances(metric: str, x: Tensor, y: Tensor) -> Tensor:
    """Return float64 costs of columns, summed over tokens where they are sums."""
    if metric == "l1":
        return torch.cdist(x.mT, y.mT, p=1)
    if metric == "sqeuclidean":
        return (x[..., :, None] - y[..., None, :]).square().sum(-3)
    if metric == "correlation":
        x, y = (value - value.mean(-2, keepdim=True) for value in (x, y))
    x, y = (value / value.norm(dim=-2, keepdim=True) for value in (x, y))
    return 1 - (x.mT @ y).nan_to_num(0.0)  # what is 0 has no direction


def check_cost(plain: dict, given: dict, result: Any) -> str | None:
    cost, figures = result if isinstance(result, tuple) else (result, None)
    if not isinstance(cost, Tensor) or cost.dtype != torch.float32:
        return f"{getattr(cost, 'dtype', type(cost).__name__)}, not float32"
    x, y = plain["x"], plain.get("y")
    if plain.get("targets") is not None:
        targets = plain["targets"]
        index = targets if isinstance(targets, Tensor) else torch.tensor(list(targets))
        index = index.expand(*x.shape[:-2], -1)
        y = x.gather(-1, index[..., None, :].expand(*x.shape[:-1], -1))
    metric = plain.get("metric", "l1")
    truth = distances(metric, x, x if y is None else y)
    mean = plain["reduction"] == "mean" and metric in ("l1", "sqeuclidean")
    truth = truth / (x.shape[-2] if mean else 1)
    wrong = apart(cost, truth, 1e-5 if plain["precision"] == "fp32" else 2e-2)
    if wrong or figures is None or not truth.numel():
        return wrong
    mean = figures.mean.sum() if isinstance(figures.mean, Tensor) else figures.mean
    wanted = truth.mean(dim=(-1, -2)).sum()
    return None if abs(float(mean - wanted)) <= 2e-2 * float(wanted) else "statistics off"


def accumulator_arguments(draw: Draw) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Return arguments of an accumulator, and a chunk for it."""
    chunk = activation_cost(draw).arguments
    x, y = chunk["x"], chunk["y"]
    arguments = {
        "n": x.shape[-1],
        "targets": chunk["targets"],
        "m": None if y is None else y.shape[-1],
        "batch": len(x) if x.dim() == 3 else None,
        "metric": chunk["metric"],
        "reduction": chunk["reduction"],
        "precision": chunk["precision"],
        "device": draw.one_of(None, "cpu", torch.device("cpu")),
        "backend": chunk["backend"],
    }
    return arguments, x, y


def accumulator(draw: Draw, kind: type = dotresize.ActivationCostAccumulator) -> Call:
    """Make an accumulator of odd arguments, and give it a valid chunk."""
    arguments, x, y = accumulator_arguments(draw)
    if kind is dotresize.L1CostAccumulator and arguments.pop("metric") != "l1":
        arguments["reduction"] = draw.one_of("mean", "sum")

    def made(**arguments: Any) -> Tensor:
        total = kind(**arguments)
        total.update(x, y)
        return total.result()

    def check(plain: dict, given: dict, result: Any) -> str | None:
        return check_cost(plain | plain_of_all({"x": x, "y": y}), {}, result)

    return Call(made, arguments, check)


def update(draw: Draw) -> Call:
    """Update with an odd chunk after a valid one; what is refused must not be counted."""
    arguments, x, y = accumulator_arguments(draw)

    def updated(**chunk: Any) -> Tensor:
        total = dotresize.ActivationCostAccumulator(**arguments)
        total.update(x, y)
        before = total.result()
        try:
            total.update(**chunk)
        except Exception:
            if not torch.equal(total.result(), before):
                raise AssertionError("a refused chunk was counted") from None
            raise
        return total.result()

    def check(plain: dict, given: dict, result: Any) -> str | None:
        both = {"x": torch.cat([x.double(), plain["x"]], -2), "y": None}
        if y is not None:
            both["y"] = torch.cat([y.double(), plain["y"]], -2)
        return check_cost(arguments | both, {}, result)

    return Call(updated, {"x": x.clone(), "y": y}, check)


def result_of_accumulator(draw: Draw) -> Call:
    arguments, x, y = accumulator_arguments(draw)
    total = dotresize.ActivationCostAccumulator(**arguments)
    total.update(x, y)
    plain = arguments | plain_of_all({"x": x, "y": y})
    return Call(total.result, {}, lambda _, given, found: check_cost(plain, given, found))


def assignment(draw: Draw) -> Call:
    n, m, batch = draw.randint(1, 6), draw.randint(1, 6), draw.one_of((), (2,))
    arguments = {
        "score": torch.rand(*batch, n, draw.one_of(n, m)).to(draw.choice(FLOATS)),
        "maximize": draw.chance(0.5),
        "certificate": draw.chance(0.3),
        "backend": draw.one_of("auto", "cpp", "torch"),
    }
    return Call(dotresize.assignment, arguments, check_assignment)


def check_assignment(plain: dict, given: dict, result: Any) -> str | None:
    columns, proof = result if isinstance(result, tuple) else (result, None)
    score = plain["score"]
    if isinstance(score, (list, tuple)):
        proofs = [None] * len(score) if proof is None else proof
        for i, one in enumerate(score):
            own = columns[i] if proof is None else (columns[i], proofs[i])
            wrong = check_assignment(plain | {"score": one}, given, own)
            if wrong:
                return f"score {i}: {wrong}"
        return None
    score = score.double()
    if columns.dtype != torch.int64 or columns.device.type != "cpu":
        return f"{columns.dtype} on {columns.device}"
    if tuple(columns.shape) != tuple(score.shape[:-1]):
        return f"shape {tuple(columns.shape)} for a score of {tuple(score.shape)}"
    n, m = score.shape[-2:]
    scores = score.reshape(-1, n, m) if score.numel() else []
    for one, found in zip(scores, columns.reshape(-1, n) if score.numel() else [], strict=True):
        best = one.numpy()[linear_sum_assignment(one.numpy(), maximize=plain["maximize"])].sum()
        rows = (found >= 0).nonzero()[:, 0]
        if len(rows) != min(n, m) or len(set(found[rows].tolist())) != len(rows):
            return "not a matching"
        if abs(float(one[rows, found[rows]].sum()) - best) > 1e-9 * abs(one).sum():
            return "not the best assignment"
    if proof is not None and proof.u.dtype != torch.float64:
        return f"certificate in {proof.u.dtype}"
    return None


def transport_map(draw: Draw) -> Call:
    plan = torch.rand(*draw.one_of((4, 3), (2, 4, 3))).to(draw.choice(FLOATS))

    def check(plain: dict, given: dict, result: Any) -> str | None:
        dtype = getattr(given["plan"], "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and result.dtype != dtype:
            return f"{result.dtype} for a plan of {dtype}"
        # Scaled first: a sum of float64's largest would be infinite.
        scaled = plain["plan"] / plain["plan"].amax(-2, keepdim=True)
        return apart(result, scaled / scaled.sum(-2, keepdim=True), 2e-2)

    return Call(dotresize.transport_map, {"plan": plan}, check)


def factorize(draw: Draw) -> Call:
    T = torch.eye(5)[:, :3].add(torch.rand(5, 3) / 9).to(draw.choice(FLOATS))
    arguments = {"T": T, "method": draw.one_of("polar", "qr"), "name": "T", "max_cond": 1e8}
    check = same_as_plain(dotresize.factorize, 1e-9)
    return Call(dotresize.factorize, arguments, check, fixed=("name",))


def sinkhorn_arguments(draw: Draw) -> dict[str, Any]:
    n, m, layout = draw.randint(1, 5), draw.randint(1, 5), draw.one_of("single", "batch", "list")
    cost: Any = torch.rand(*((2,) if layout == "batch" else ()), n, m).to(draw.choice(FLOATS))
    a, b = (torch.full((k,), 1 / k) if draw.chance(0.5) else None for k in (n, m))
    arguments = {
        "cost": cost,
        "reg": draw.one_of(0.1, 0.5, 1),
        "a": a,
        "b": b,
        "max_iter": draw.one_of(3, 100),
        "tol": draw.one_of(1e-5, 1e-3, 0),
        "init": (None, torch.zeros(m)) if draw.chance(0.2) else None,
        "schedule": (4.0, 2.0) if draw.chance(0.2) else None,
        "acceleration": draw.one_of("auto", "none", "momentum"),
        "storage": "exact",
        "backend": draw.one_of("auto", "cpp", "torch"),
    }
    if layout == "list":
        arguments |= {"cost": [cost, cost.mT], "init": None}
        arguments |= {"a": None if a is None else [a, torch.full((m,), 1 / m)], "b": None}
    return arguments


def sinkhorn(draw: Draw) -> Call:
    return Call(dotresize.sinkhorn, sinkhorn_arguments(draw), check_sinkhorn)


def check_sinkhorn(plain: dict, given: dict, result: Any) -> str | None:
    clean = dotresize.sinkhorn(**{**plain, "backend": "auto"})
    if len(clean) != len(result):
        return f"{len(result)} problems, not {len(clean)}"
    costs = given["cost"] if result._layout == "ragged" else [given["cost"]] * len(result)
    for found, wanted, cost in zip(result, clean, costs, strict=True):
        dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
        if found.plan.dtype != dtype or found.potentials[0].dtype != dtype:
            return f"{found.plan.dtype}, potentials {found.potentials[0].dtype}, not {dtype}"
        bad = {"invalid", "infeasible"}
        if (found.status in bad or wanted.status in bad) and found.status != wanted.status:
            return f"status {found.status}, not {wanted.status}"
        steep = float(wanted._problems[0].cost.abs().nan_to_num(0, 0, 0).max())
        if steep / wanted._problems[0].reg > 1e4:
            continue  # float32 does not resolve this plan (README, Limits)
        # Both stop at tol, and not after the same number of iterations.
        if wrong := apart(found.plan, wanted.plan, 0.05):
            return f"plan {wrong}"
        for name in ("value", "value_linear"):
            pair = [torch.as_tensor(getattr(v, name)) for v in (found, wanted)]
            if not math.isfinite(pair[1]) or abs(pair[1]) < 0.1:
                continue
            if wrong := apart(pair[0], pair[1], 0.05):
                return f"{name} {wrong}"
    return None


def of_result(name: str) -> Callable[[Draw], Call]:
    """Return the maker of a call that reads something of a SinkhornResult."""

    def make(draw: Draw) -> Call:
        arguments = sinkhorn_arguments(draw)
        result, same = dotresize.sinkhorn(**arguments), dotresize.sinkhorn(**arguments)
        check = same_as_plain(lambda index=None: read(same, index), 1e-6)
        if name == "__getitem__":
            where = draw.randrange(-len(result), len(result))
            return Call(lambda index: result[index], {"index": where}, check)
        return Call(lambda: read(result), {}, check)

    def read(result: Any, index: Any = None) -> Any:
        if index is not None:
            return result[index]
        if name == "__len__":
            return torch.tensor([float(len(result))], device="cpu")
        return list(result) if name == "__iter__" else getattr(result, name)

    return make


def backends(draw: Draw) -> Call:
    wanted = dotresize.backends()
    return Call(dotresize.backends, {}, lambda p, g, found: None if found == wanted else f"{found}")


READ = ("plan", "value", "value_linear", "potential_a", "potential_b", "reason")
# Each public name has the maker of its calls, and how often it is drawn.
SOLVERS: dict[str, tuple[Callable[[Draw], Call], float]] = {
    "l1_cost": (l1_cost, 8),
    "activation_cost": (activation_cost, 5),
    "ActivationCostAccumulator": (accumulator, 5),
    "L1CostAccumulator": (functools.partial(accumulator, kind=dotresize.L1CostAccumulator), 2),
    "ActivationCostAccumulator.update": (update, 4),
    "ActivationCostAccumulator.result": (result_of_accumulator, 1),
    "assignment": (assignment, 6),
    "transport_map": (transport_map, 4),
    "factorize": (factorize, 4),
    "sinkhorn": (sinkhorn, 12),
    **{f"SinkhornResult.{name}": (of_result(name), 0.5) for name in READ},
    **{f"SinkhornResult.{name}": (of_result(name), 0.2) for name in ("__len__", "__iter__")},
    "SinkhornResult.__getitem__": (of_result("__getitem__"), 2),
    "backends": (backends, 0.5),
}
