"""Values of every kind that a caller may hand over, for the fuzz of types.

Kinds of tensors and arrays hold the numbers of a valid argument (``like``), in another form.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# What an argument means that holds no real numbers: a result made of it is wrong.
NOTHING = object()


class Odd(NamedTuple):
    """A value of some kind.

    Attributes:
        label: the kind, for people.
        value: what the function is given.
        plain: the same in plain form, as ``plain_of``; NOTHING where it means none.
    """

    label: str
    value: Any
    plain: Any


class Draw(random.Random):
    """Random choices from one seed; torch's own generator is seeded alike."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def one_of(self, *choices: Any) -> Any:
        return self.choice(choices)


class OwnSubclass(Tensor):
    """A subclass with torch's default behaviour."""


class OwnWrapper(Tensor):
    """A subclass without memory of its own: the numbers are in another tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OwnWrapper:
        wrapper = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        wrapper.held = held
        return wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OwnWrapper({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def open_(value: Any) -> Any:
            return value.held if isinstance(value, OwnWrapper) else value

        tree = torch.utils._pytree.tree_map
        found = function(*tree(open_, args), **tree(open_, kwargs or {}))
        return tree(lambda v: OwnWrapper(v) if isinstance(v, Tensor) else v, found)


def _endless() -> list:
    found: list = []
    found.append(found)
    return found


_NUMBERS = (0, 1, -1, 3, -0.5, 0.0, 1e300, 1e-300, math.nan, math.inf, -math.inf, 1j)
_WORDS = ("", "auto", "x", "two\nlines", "nul\0", "\udc80", b"x")
_LISTS = ([], [1, 2], [None], [[0.5, 0.5], [1.0, 2.0]], [[1.0], [2.0, 3.0]], [["a"], ["b"]])
_OTHERS = ((0.5,), {}, {"a": 1}, {1, 2}, range(3), None, True, False, ..., Path("nowhere"))
PYTHON: dict[str, Any] = {
    **{repr(value): value for value in (*_NUMBERS, *_WORDS, *_LISTS, *_OTHERS)},
    "2**63": 2**63,
    "10**400": 10**400,
    "a list that holds itself": _endless(),
    "object()": object(),
    "a lambda": lambda *_: 0.0,
    "a class": Draw,
    "a module": torch,
    "Decimal": Decimal("0.5"),
    "np.float32": np.float32(0.5),
    "np.int64": np.int64(2),
    "np.bool_": np.bool_(True),
    "torch.dtype": torch.float32,
    "torch.device": torch.device("meta"),
}


def _structured(array: np.ndarray) -> np.ndarray:
    found = np.zeros(array.shape, dtype=[("a", "f8"), ("b", "i4")])
    found["a"] = array
    return found


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    **{
        f"array of {word}": lambda a, w=word: a.astype(w)
        for word in ("i8", "u1", "?", "f2", "f4", "f8", "longdouble", "c16", "O", "U4", "S4")
    },
    "structured array": _structured,
    "array of datetimes": lambda a: a.astype("i8").astype("M8[s]"),
    "read-only array": _read_only,
    "array of negative strides": lambda a: np.flip(np.flip(a).copy()),
    "byte-swapped array": lambda a: a.astype(">f8"),
    "zero-dim array": lambda a: np.array(0.5),
    "empty array": lambda a: a[:0],
    "masked array": lambda a: np.ma.masked_array(a, mask=a > 0.5),
    "unaligned array": lambda a: _unaligned(a),
}


def _unaligned(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 1, dtype=np.uint8)
    found = room[1:].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[-1:] = value
    return x


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **{word: lambda x, w=word: x.to(getattr(torch, w)) for word in DTYPES},
    "float4": lambda x: x.to(torch.uint8).view(torch.float4_e2m1fn_x2),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "0-d": lambda x: x.flatten()[0],
    "0-d int": lambda x: torch.tensor(1),
    "1-d": lambda x: x.flatten(),
    "1-d of one": lambda x: x.flatten()[:1],
    "4-d": lambda x: x[(None,) * (4 - x.dim())] if x.dim() < 4 else x,
    "one dimension more": lambda x: x[None],
    "empty": lambda x: x[:0] if x.dim() else x.new_empty(0),
    "no columns": lambda x: x[..., :0] if x.dim() else x.new_empty(2, 0),
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "every second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2] if x.dim() else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() else x.expand(2, 2),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (1,) * x.dim()),
    "requires grad": lambda x: _floats(x).clone().requires_grad_(),
    "with a graph": lambda x: _floats(x).clone().requires_grad_() * 1,
    "conjugate view": lambda x: x.to(torch.complex64).conj(),
    "negative view": lambda x: torch._neg_view(-x),
    "imaginary part": lambda x: torch.complex(-_floats(x).float(), -_floats(x).float()).conj().imag,
    "sparse COO": lambda x: x.to_sparse(),
    "sparse CSR": lambda x: x.to_sparse_csr() if x.dim() > 1 else x.to_sparse(),
    "MKL-DNN": lambda x: x.float().to_mkldnn(),
    "on meta": lambda x: x.to("meta"),
    "Parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=x.is_floating_point()),
    "Parameter without values": lambda x: torch.nn.parameter.UninitializedParameter(),
    "own subclass": lambda x: x.as_subclass(OwnSubclass),
    "own wrapper": OwnWrapper,
    "nested, strided": lambda x: torch.nested.nested_tensor([x, x[:1]] if x.dim() else [x]),
    "nested, jagged": lambda x: torch.nested.nested_tensor(
        [x, x[:1]] if x.dim() else [x[None]], layout=torch.jagged
    ),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0.5),
    "freed memory": _freed,
    "unaligned": lambda x: torch.from_numpy(_unaligned(x.float().numpy())),
    "inference tensor": _inference,
    "NaN inside": lambda x: _with(_floats(x), torch.nan),
    "inf inside": lambda x: _with(_floats(x), torch.inf),
    "-inf inside": lambda x: _with(_floats(x), -torch.inf),
    "negative": lambda x: -1 - x,
    "zeros": torch.zeros_like,
    "large": lambda x: x * 1e30 if x.is_floating_point() else x + 100,
    "largest": lambda x: torch.full_like(x, getattr(torch, _info(x))(x.dtype).max),
    "a list of tensors": lambda x: list(x) if x.dim() else [x],
    "a list of one tensor": lambda x: [x],
    "a tuple of two tensors": lambda x: (x, x),
    "nested lists": lambda x: x.tolist(),
    "a list of arrays": lambda x: list(x.numpy()) if x.dim() else [x.numpy()],
    "a dict of a tensor": lambda x: {"input_ids": x},
    "a memory view": lambda x: memoryview(x.numpy()),
}


def _info(x: Tensor) -> str:
    return "finfo" if x.is_floating_point() else "iinfo"


def odd(draw: Draw, given: Any) -> Odd:
    """Return a value of a random kind in place of a given one; call it in no other context."""
    like = given if isinstance(given, Tensor) and type(given) is Tensor else None
    if like is None:
        like = torch.rand(draw.one_of((2,), (3, 2), (4, 4), (2, 3, 3)))
    family = draw.one_of("python", "array", "tensor", "tensor")
    if family == "python":
        if draw.chance(0.05):
            return Odd("a generator", (v for v in like), list(like))
        label = draw.choice(list(PYTHON))
        value = PYTHON[label]
        value = copy.copy(value) if isinstance(value, (list, dict, set)) else value
    elif family == "array":
        label = draw.choice(list(ARRAYS))
        array = like.double().numpy() if like.is_floating_point() else like.numpy()
        value = ARRAYS[label](np.array(array))
    else:
        label = draw.choice(list(TENSORS))
        try:
            value = TENSORS[label](like)
        except Exception:  # no tensor of this shape or type is of that kind
            label, value = "0-d", like.flatten()[0] if like.numel() else torch.tensor(0.5)
    return Odd(label, value, plain_of(value))


def plain_of(value: Any) -> Any:
    """Return what a value means: tensors and arrays as dense float64 or int64 tensors.

    NOTHING for what holds no real numbers; values of other types as they are.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        try:
            return _plain_numbers(value)
        except Exception:  # whatever an odd tensor raises here, it has no numbers to read
            return NOTHING
    if isinstance(value, (list, tuple)) and value and not any(v is value for v in value):
        parts = [plain_of(part) for part in value]
        return NOTHING if any(part is NOTHING for part in parts) else type(value)(parts)
    return value


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf" or isinstance(value, np.ma.MaskedArray):
            return NOTHING
        kind = np.float64 if value.dtype.kind == "f" else np.int64
        return torch.from_numpy(np.array(value, dtype=kind))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, OwnWrapper):
        value = value.held
    odd_ones = value.is_complex() or value.is_nested or value.is_quantized or value.is_meta
    if odd_ones or isinstance(value, (FakeTensor, torch.masked.MaskedTensor)):
        return NOTHING
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    if dense.untyped_storage().nbytes() == 0 and dense.numel():
        return NOTHING
    # Under the context that it was made in, an inference tensor has no graph either.
    dense = dense.as_subclass(Tensor).clone()
    return dense.to(torch.float64 if dense.is_floating_point() else torch.int64)


def tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors that a result is made of, as arrays' too."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (np.ndarray, np.floating)):
        yield torch.as_tensor(np.array(result))
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors(part)
    else:
        for name in ("plan", "value", "value_linear", "u", "v", "q", "r"):
            if hasattr(result, name):
                yield from tensors(getattr(result, name))
