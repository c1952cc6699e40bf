"""Narrower neural networks by optimal transport: fast solvers, and a compressor made with them."""

import importlib
from typing import Any

from dotresize import ot
from dotresize.ops.assignment import AssignmentCertificate, assignment
from dotresize.ops.backends import BackendError, backends
from dotresize.ops.l1_accumulator import L1CostAccumulator
from dotresize.ops.l1_cost import CostStatistics, l1_cost
from dotresize.ops.sinkhorn import sinkhorn
from dotresize.ops.sinkhorn_result import SinkhornResult
from dotresize.ops.transport_map import Factors, factorize, transport_map

__version__ = "0.1.0"

__all__ = [
    "AssignmentCertificate",
    "BackendError",
    "CostStatistics",
    "Factors",
    "L1CostAccumulator",
    "SinkhornResult",
    "assignment",
    "backends",
    "compress",
    "factorize",
    "l1_cost",
    "load",
    "merge_feed_forward",
    "ot",
    "recover",
    "sinkhorn",
    "transport_map",
]


# Importing the package costs torch and numpy only; models are touched on first use.
_LATER = {
    "compress": "compression",
    "load": "checkpoint",
    "merge_feed_forward": "merging.merge",
    "recover": "recovery",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'dotresize' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dotresize.{_LATER[name]}"), name)
