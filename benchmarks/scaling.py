"""How this project's CPU time grows with each size: sweeps, and the exponent that fits them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .workload import Case

_L1 = {"problems": 1, "tokens": 2048, "n": 768, "m": 768}
_SINKHORN = {"problems": 1, "n": 768, "m": 768, "iterations": 50}
_GROWTH = {
    ("l1", "n"): (256, 512, 1024, 2048, 4096),
    ("l1", "m"): (256, 512, 1024, 2048, 4096),
    ("l1", "tokens"): (512, 1024, 2048, 4096, 8192),
    ("l1", "problems"): (1, 2, 4, 8, 16),
    ("sinkhorn", "n"): (256, 512, 1024, 2048, 4096),
    ("sinkhorn", "m"): (256, 512, 1024, 2048, 4096),
    ("sinkhorn", "problems"): (1, 2, 4, 8, 16),
    ("sinkhorn", "iterations"): (25, 50, 100, 200, 400),
}
# Both widths together, as the models grow.
_SQUARES = ((512, 384), (1024, 768), (2048, 1536), (4096, 3072))


def sweeps() -> Iterable[tuple[str, str, list[Case]]]:
    """Return the operator, the size that grows, and the cases."""
    for operator, base in (("l1", _L1), ("sinkhorn", _SINKHORN | {"iterations": 100})):
        yield operator, "n", [Case(operator, base | {"n": n, "m": m}) for n, m in _SQUARES]
    for (operator, size), values in _GROWTH.items():
        base = _L1 if operator == "l1" else _SINKHORN
        yield operator, size, [Case(operator, base | {size: value}) for value in values]


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Return the least-squares slope of log time over log size."""
    x = [math.log(v) for v in sizes]
    y = [math.log(v) for v in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - mean_x) ** 2 for a in x)


def fits(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return one row per sweep: the exponent of ``name``'s median over the size that grows."""
    out = []
    for operator, size, cases in sweeps():
        mine = [r for r in rows if r["name"] == name and r.get("allocator") == "default"]
        timed = {r["case"]: r for r in mine if "median_s" in r}
        points = [timed[case.label] for case in cases if case.label in timed]
        if len(points) > 2:
            sizes, seconds = [p[size] for p in points], [p["median_s"] for p in points]
            fit = {"operator": operator, "size": size, "from": sizes[0], "to": sizes[-1]}
            if points[0]["m"] != points[-1]["m"] and size == "n":
                fit["size"] = "n and m"
            out.append(fit | {"name": name, "exponent": exponent(sizes, seconds)})
    return out
