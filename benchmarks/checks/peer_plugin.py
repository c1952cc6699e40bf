"""A pytest plugin: tests of SciPy and lapx call this package where they mean their own functions.

Given to pytest by ``benchmarks/checks/peer_tests.py``, beside ``reached``. The functions here only
translate arguments and results. Backends are named: the torch backend's ``assignment`` is SciPy's.
What SciPy's tests compare with stays SciPy's: other metrics, the metric given as a function, and
the plain Python of "test_cityblock".
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import torch

import dotresize

from .reached import counted, notes

# A float32 number is off by at most this share of it.
_ROUNDING = 2.0**-24
_assignment = counted(dotresize.assignment, backend="cpp")
_l1_cost = counted(dotresize.l1_cost, reduction="sum", backend="cpp")
_scipy_cdist = scipy.spatial.distance.cdist
_scipy_pdist = scipy.spatial.distance.pdist


def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Return the rows and their columns, as SciPy's."""
    columns = _assignment(torch.as_tensor(np.asarray(cost_matrix)), maximize=maximize).numpy()
    rows = np.flatnonzero(columns >= 0)
    return rows, columns[rows]


def lapjv(cost: Any, extend_cost: bool = False, return_cost: bool = True, **options: Any) -> Any:
    """Return the sum, the column of each row and the row of each column, as lapx's.

    extend_cost only says that a cost may be rectangular.
    """
    if not extend_cost and cost.shape[0] != cost.shape[1]:
        raise ValueError("extend_cost is not given")
    columns = _assignment(torch.as_tensor(cost), maximize=False, **options).numpy()
    rows, used = np.full(cost.shape[1], -1), np.flatnonzero(columns >= 0)
    rows[columns[used]] = used
    total = cost[used, columns[used]].sum()
    return (total, columns, rows) if return_cost else (columns, rows)


def lapmod(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("sparse costs")


def cdist(XA: Any, XB: Any, metric: Any = "euclidean", *, out: Any = None, **kwargs: Any) -> Any:
    """Return the distances between rows of two matrices, as SciPy's."""
    options = _options(metric, out, kwargs)
    if options is None:
        return _scipy_cdist(XA, XB, metric, out=out, **kwargs)
    cost = _cost(XA, XB, options)
    return cost if out is None else out


def pdist(X: Any, metric: Any = "euclidean", *, out: Any = None, **kwargs: Any) -> Any:
    """Return the distances between rows of one matrix, each pair once, as SciPy's."""
    options = _options(metric, out, kwargs)
    if options is None:
        return _scipy_pdist(X, metric, out=out, **kwargs)
    cost = _cost(X, None, options)
    return cost[np.triu_indices(len(cost), 1)] if out is None else out


def _options(metric: Any, out: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the options for ``l1_cost``, None where the metric is another one."""
    if not isinstance(metric, str) or metric not in ("cityblock", "minkowski"):
        return None
    options = {k: v for k, v in given.items() if k != "w" or v is not None}
    if metric == "minkowski" and options.pop("p", 2) != 1:
        return None
    return options if out is None else options | {"out": torch.from_numpy(out)}


def _cost(x: Any, y: Any, options: dict[str, Any]) -> Any:
    """Return the sums, float32, and note how far they are from float64's.

    ``l1_cost`` has no weights. To a function that says so by NotImplementedError, SciPy's tests
    give none.
    """
    first = _activations(x)
    try:
        cost = _l1_cost(first, None if y is None else _activations(y), **options).numpy()
    except TypeError as error:
        if set(options) != {"w"}:
            raise
        notes()["weights"] = 1
        raise NotImplementedError(str(error)) from error
    found = notes()
    found["roundings"] = max(
        found.get("roundings", 0.0), _roundings(cost, x, x if y is None else y)
    )
    return cost


def _activations(x: Any) -> torch.Tensor:
    """Return rows as columns, in float32."""
    return torch.from_numpy(np.array(x, dtype=np.float32)).T


def _roundings(cost: Any, x: Any, y: Any) -> float:
    """Return the largest error of a cost, in roundings of all the numbers that it is made of."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    exact = np.abs(x[:, None] - y[None]).sum(2)
    size = np.abs(x).sum(1)[:, None] + np.abs(y).sum(1)
    return float((np.abs(cost - exact) / np.where(size > 0, size * _ROUNDING, 1)).max(initial=0))


def pytest_configure(config: pytest.Config) -> None:
    scipy.optimize.linear_sum_assignment = linear_sum_assignment
    scipy.spatial.distance.cdist = cdist
    scipy.spatial.distance.pdist = pdist
    lap = types.ModuleType("lap")
    lap.lapjv, lap.lapmod = lapjv, lapmod  # type: ignore[attr-defined]
    sys.modules["lap"] = lap
