"""Valid calls of ``dotresize.ot``, of NumPy arrays and of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dotresize

from .call import Call, same_as_plain
from .kinds import Draw


def ot_call(name: str) -> Callable[[Draw], Call]:
    """Return the maker of a call of dotresize.ot.sinkhorn or sinkhorn2."""

    def make(draw: Draw) -> Call:
        n, m, k = draw.randint(1, 5), draw.randint(1, 5), draw.one_of((), (), (2,))
        dtype = draw.one_of(torch.float32, torch.float64)
        M, a = torch.rand(n, m).to(dtype), torch.full((n,), 1 / n).to(dtype)
        b = torch.full((m, *k), 1 / m).to(dtype)
        arguments = {
            "a": a if draw.chance(0.5) else [],
            "b": b if k or draw.chance(0.5) else [],
            "M": M,
            "reg": draw.one_of(0.1, 0.5, 1),
            "method": draw.one_of("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"),
            "numItermax": draw.one_of(20, 100),
            "stopThr": draw.one_of(1e-9, 1e-5, 0),
            "verbose": False,
            "log": draw.chance(0.2),
            "warn": False,
            "warmstart": (torch.zeros(n), torch.zeros(m)) if not k and draw.chance(0.2) else None,
            "numInnerItermax": 10,
        }
        if draw.chance(0.5):
            arguments = {k: to_numpy(v) for k, v in arguments.items()}
        return Call(function, arguments, check)

    function = getattr(dotresize.ot, name)
    values = same_as_plain(function, 0.05)

    def check(plain: dict, given: dict, result: Any) -> str | None:
        result = result[0] if isinstance(result, tuple) else result
        arrays = [given[name] for name in ("a", "b", "M") if not isinstance(given[name], list)]
        kinds = {type(v) for v in arrays if v is not None}
        wanted = np.ndarray if np.ndarray in kinds or not kinds else Tensor
        if not isinstance(result, (wanted, np.floating) if wanted is np.ndarray else wanted):
            return f"a {type(result).__name__} for {', '.join(k.__name__ for k in kinds)}"
        return values({**plain, "log": False}, given, result)

    return make


def to_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to_numpy(part) for part in value)
    return value.numpy() if isinstance(value, Tensor) else value


def batch_arguments(draw: Draw) -> dict[str, Any]:
    n, m = draw.randint(1, 5), draw.randint(1, 5)
    arguments = {
        "M": torch.rand(2, n, m).to(draw.one_of(torch.float32, torch.float64)),
        "reg": draw.one_of(0.1, 0.5, 1),
        "a": torch.full((n,), 1 / n) if draw.chance(0.5) else None,
        "b": torch.full((2, m), 1 / m) if draw.chance(0.5) else None,
        "max_iter": draw.one_of(20, 100),
        "tol": draw.one_of(1e-5, 1e-3, 0),
        "method": draw.one_of("auto", "proximal", "log_sinkhorn", "sinkhorn"),
        "inner_iter": 1,
        "inner_reg": 1e-3,
        "reg_type": draw.one_of("entropy", "KL"),
        "grad": draw.one_of("detach", "autodiff", "last_step", "envelope"),
    }
    return {k: to_numpy(v) for k, v in arguments.items()} if draw.chance(0.5) else arguments


def solve_batch(draw: Draw) -> Call:
    function = dotresize.ot.solve_batch
    check = same_as_plain(lambda **v: function(**v).plan, 0.05)
    arguments = batch_arguments(draw)
    return Call(
        function,
        arguments,
        lambda plain, given, result: check(plain, given, result.plan),
        fixed=("inner_iter", "inner_reg"),
    )


def of_batch_result(name: str) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        arguments = batch_arguments(draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, same = (dotresize.ot.solve_batch(**arguments) for _ in range(2))
        return Call(
            lambda: getattr(result, name), {}, same_as_plain(lambda: getattr(same, name), 1e-6)
        )

    return make


READ = ("potential_a", "potential_b", "marginal_a", "marginal_b", "marginals")
POT: dict[str, tuple[Callable[[Draw], Call], float]] = {
    "ot.sinkhorn": (ot_call("sinkhorn"), 9),
    "ot.sinkhorn2": (ot_call("sinkhorn2"), 4),
    "ot.solve_batch": (solve_batch, 8),
    **{f"ot.BatchResult.{name}": (of_batch_result(name), 0.3) for name in READ},
}
