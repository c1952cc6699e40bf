"""What ``dotresize.ot`` needs around the solver: arrays in and out, and checks of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotresize.ops.arguments import FLOAT_NAMES, FLOATS, check_dense, check_number, shown

# Where float32 iterations stop improving: their column error stays near 5e-8 of the mass (measured
# from 50 x 40 to 3000 x 2500). Below this tolerance float32 is solved in float64.
FLOAT32_TOLERANCE = 1e-6
_NUMPY_KINDS = "biuf"


@dataclass(frozen=True)
class Arrays:
    """The type that results have: NumPy or torch, dtype and device of the caller's arrays.

    Lists follow the arrays beside them; by themselves they are NumPy's float64. Integers become
    float64 (NumPy) or torch's default type.
    """

    numpy: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, **values: Any) -> Arrays:
        """Raise ValueError unless all are NumPy arrays, or all torch tensors, of real numbers."""
        if values.get("M", ()) is None:
            raise ValueError("M is None: must be the cost, a NumPy array, torch tensor or list")
        given = {k: v for k, v in values.items() if v is not None and not isinstance(v, list)}
        for name, value in given.items():
            if not isinstance(value, (Tensor, np.ndarray)):
                kind = type(value).__name__
                raise ValueError(f"{name} is a {kind}: must be a NumPy array, torch tensor or list")
            if isinstance(value, Tensor):
                check_dense(name, value)
            elif isinstance(value, np.ma.MaskedArray):
                raise ValueError(f"{name} is a masked array: fill it, or forbid pairs by inf")
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        if tensors and len(tensors) < len(given):
            raise ValueError(f"{', '.join(given)}: must be all NumPy arrays or all torch tensors")
        if tensors:
            for name, value in given.items():
                whole = not value.dtype.is_floating_point and not value.dtype.is_complex
                if value.dtype not in FLOATS and not whole:
                    kinds = f"{FLOAT_NAMES}, or integers"
                    raise ValueError(f"{name} has dtype {value.dtype}: must be {kinds}")
            dtype = tensors[0].dtype
            for tensor in tensors[1:]:
                dtype = torch.promote_types(dtype, tensor.dtype)
            dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
            for name, value in given.items():
                if value.device != tensors[0].device:
                    places = f"{value.device}, another on {tensors[0].device}"
                    raise ValueError(f"{name} is on {places}: must be on one device")
            return cls(False, dtype, tensors[0].device)
        for name, value in given.items():
            if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize > 8:
                raise ValueError(
                    f"{name} has dtype {value.dtype}: must be real, of at most 64 bits"
                )
        common = np.result_type(*given.values()) if given else np.dtype(np.float64)
        common = common if common.kind == "f" else np.dtype(np.float64)
        return cls(True, getattr(torch, common.name), torch.device("cpu"))

    def tensor(self, value: Any) -> Tensor:
        """Return a tensor of the results' dtype; a caller's tensor keeps its graph."""
        if isinstance(value, Tensor):
            return value.to(self.dtype)
        # torch takes no read-only, byte-swapped or negatively strided array.
        try:
            plain = np.asarray(value)
        except ValueError:
            plain = np.asarray(None)
        if plain.dtype.kind not in _NUMPY_KINDS:
            raise ValueError(f"{value!s:.40} is not an array of real numbers")
        plain = np.require(plain, plain.dtype.newbyteorder("="), ["C", "W"])
        return torch.as_tensor(plain, device=self.device).to(self.dtype)

    def working(self, cost: Tensor, tol: float) -> Tensor:
        """Return the cost in float64 where its own type cannot reach ``tol``."""
        return cost.double() if tol < FLOAT32_TOLERANCE else cost

    def back(self, value: Tensor, dtype: torch.dtype | None = None) -> Any:
        """Return the caller's kind of array; a NumPy scalar for a 0-d tensor."""
        value = value.to(self.device, dtype or self.dtype)
        return value.numpy()[()] if self.numpy else value


def tolerance(name: str, value: Any) -> float:
    number = check_number(name, value, "one number, finite and not negative")
    if number < 0:
        raise ValueError(f"{name} is {shown(value)}: must be one number, finite and not negative")
    return number


def positive_reg(reg: Any, exact: str) -> float:
    """Return reg as a float. NotImplementedError, naming the call ``exact``, for None and 0."""
    if isinstance(reg, Tensor) and reg.requires_grad:
        raise NotImplementedError("reg requires grad: POT's own solvers differentiate by it")
    number = 0.0 if reg is None else check_number("reg", reg, "one positive number")
    if number == 0:
        raise NotImplementedError(f"reg is {shown(reg)}, exact transport: use {exact} of POT")
    if number < 0:
        raise ValueError(f"reg is {shown(reg)}: must be positive and finite")
    return number


def linear_loss(plan: Tensor, cost: Tensor) -> Tensor:
    """Return ``<C, P>`` per problem, (B,) float64.

    Forbidden pairs hold no mass and cost nothing.
    """
    return (plan * cost.masked_fill(cost == math.inf, 0)).sum((1, 2), dtype=torch.float64)
