"""Cases to be tracked over time with pytest-benchmark: ``python -m pytest benchmarks``.

Save and compare with ``--benchmark-autosave`` and ``--benchmark-compare``. Every result is checked
against float64 before it is timed. For comparisons with peers use ``dotresize bench``.
"""

from __future__ import annotations

import pytest

from .. import l1, sinkhorn
from ..workload import Case

_BUILDERS = {"l1": l1.build, "sinkhorn": sinkhorn.build}
CASES = [
    l1.CASES[0],
    l1.CASES[2],
    sinkhorn.CASES[1],
    Case("sinkhorn", {"problems": 30, "n": 576, "m": 464, "iterations": 20}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("name", [l1.OURS, "dotresize cpp, u8"])
def test_operator(benchmark, case, name):
    work = _BUILDERS[case.operator](case, peers=False)
    if name not in work.competitors:
        pytest.skip(f"{case.operator} has no {name}")
    competitor = work.competitors[name]
    assert work.error(competitor.call()) <= competitor.accepted
    benchmark.extra_info |= {"operator": case.operator} | case.sizes
    benchmark.pedantic(competitor.call, rounds=7, warmup_rounds=1)
