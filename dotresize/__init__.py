"""Narrower neural networks by optimal transport: fast solvers, and a compressor made with them."""

import importlib
from typing import TYPE_CHECKING, Any

from dotresize.ops import process  # noqa: F401 - remembers the process, and costs nothing

if TYPE_CHECKING:
    from dotresize import ot
    from dotresize.ops.activation_cost import activation_cost
    from dotresize.ops.assignment import AssignmentCertificate, assignment
    from dotresize.ops.backends import BackendError, backends
    from dotresize.ops.cost_accumulator import ActivationCostAccumulator, L1CostAccumulator
    from dotresize.ops.cost_operands import CostStatistics
    from dotresize.ops.l1_cost import l1_cost
    from dotresize.ops.sinkhorn import sinkhorn
    from dotresize.ops.sinkhorn_result import SinkhornResult
    from dotresize.ops.transport_map import Factors, factorize, transport_map

__version__ = "0.1.0"

__all__ = [
    "ActivationCostAccumulator",
    "AssignmentCertificate",
    "BackendError",
    "CostStatistics",
    "Factors",
    "L1CostAccumulator",
    "SinkhornResult",
    "activation_cost",
    "assignment",
    "backends",
    "compress",
    "factorize",
    "l1_cost",
    "load",
    "merge_feed_forward",
    "ot",
    "recover",
    "save",
    "sinkhorn",
    "transport_map",
]


# Importing the package costs nothing. A solver costs torch and numpy on its first use, the
# compressor transformers: the command line can answer before any of them is there.
_WHERE = {
    "ActivationCostAccumulator": "ops.cost_accumulator",
    "AssignmentCertificate": "ops.assignment",
    "BackendError": "ops.backends",
    "CostStatistics": "ops.cost_operands",
    "Factors": "ops.transport_map",
    "L1CostAccumulator": "ops.cost_accumulator",
    "SinkhornResult": "ops.sinkhorn_result",
    "activation_cost": "ops.activation_cost",
    "assignment": "ops.assignment",
    "backends": "ops.backends",
    "compress": "compression",
    "factorize": "ops.transport_map",
    "l1_cost": "ops.l1_cost",
    "load": "checkpoint",
    "merge_feed_forward": "merging.merge",
    "recover": "recovery",
    "save": "checkpoint",
    "sinkhorn": "ops.sinkhorn",
    "transport_map": "ops.transport_map",
}


def __getattr__(name: str) -> Any:
    if name == "ot":
        return importlib.import_module("dotresize.ot")
    if name not in _WHERE:
        raise AttributeError(f"module 'dotresize' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dotresize.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
