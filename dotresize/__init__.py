"""Narrower neural networks by optimal transport: fast solvers, and a compressor made with them."""

from dotresize.ops.backends import backends
from dotresize.ops.l1_accumulator import L1CostAccumulator
from dotresize.ops.l1_cost import l1_cost
from dotresize.ops.result import SinkhornResult
from dotresize.ops.sinkhorn import sinkhorn

__version__ = "0.1.0"

__all__ = ["L1CostAccumulator", "SinkhornResult", "backends", "l1_cost", "sinkhorn"]
