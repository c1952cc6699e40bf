"""Cases of ``torch.cdist`` at p = 1 on ``l1_cost``: torch's wheel holds no tests of it.

It holds the shapes that torch's tests of every operator use: the tests of samples run those. The
others are new, of the kinds that torch's tests of cdist have: long, large, empty, strided,
broadcast and equal inputs. What is expected is torch's own result in float64 for the same numbers.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dotresize
from dotresize.benchmarks.checks.reached import counted

# What docs/l1_cost.md promises, twice over.
RELATIVE = 2e-6
_l1_cost = counted(dotresize.l1_cost, reduction="sum", backend="cpp")
SHAPES = [
    ((rows, features), (columns, features))
    for rows, columns, features in itertools.product((1, 3, 17), (1, 4, 33), (1, 10, 257))
]
LARGE = [
    ((1000, 10), (1000, 10)),
    ((4, 1000, 10), (4, 1000, 10)),
    ((3, 100_000), (5, 100_000)),
]
EMPTY = [
    ((0, 5), (4, 5)),
    ((2, 5), (0, 5)),
    ((0, 2, 5), (0, 3, 5)),
    ((2, 0, 5), (2, 3, 5)),
]
NO_FEATURES = [((2, 0), (3, 0)), ((2, 0), (0, 0)), ((2, 3, 0), (2, 4, 0))]
BROADCAST = [
    ((1, 4, 5), (3, 2, 5)),
    ((3, 4, 5), (1, 2, 5)),
    ((4, 5), (3, 2, 5)),
    ((2, 3, 4, 5), (2, 3, 6, 5)),
]
DIFFERENTIATED = [((3, 5), (4, 5)), ((17, 257), (33, 257)), ((2, 9, 70), (2, 8, 70))]


def samples() -> list[Any]:
    """Return the pairs of shapes in torch's ``sample_inputs_cdist``.

    They are read, as importing that module takes a package that torch does not require.
    """
    spec = importlib.util.find_spec("torch.testing._internal.common_methods_invocations")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "sample_inputs_cdist"
    )
    sizes = [node for node in function.body if isinstance(node, ast.Assign)][:2]
    names: dict[str, Any] = {}
    # S as in torch.testing._internal.opinfo.core.
    exec(compile(ast.Module(sizes, []), spec.origin, "exec"), {"S": 5}, names)
    return list(names["test_cases"])


SAMPLES = samples()


def named(pair: Any) -> str:
    return "-".join("x".join(map(str, shape)) for shape in pair)


def pairs(shapes: list[Any]) -> pytest.MarkDecorator:
    """Return the mark that runs a test on each pair of shapes."""
    return pytest.mark.parametrize("shapes", shapes, ids=named)


def cdist(x: Tensor, y: Tensor) -> Tensor:
    """Return ``torch.cdist(x, y, p=1)`` by this package, whose points are columns."""
    return _l1_cost(x.mT, y.mT)


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def integers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return small whole numbers: many of them are equal, and their sums are exact."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes]


def check(x: Tensor, y: Tensor) -> None:
    found, exact = cdist(x, y), torch.cdist(x.double(), y.double(), p=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=RELATIVE, atol=0, equal_nan=True)


@pairs(SAMPLES)
def test_sample(shapes):
    check(*random(*shapes))


@pairs(SHAPES)
def test_shape(shapes):
    check(*random(*shapes))


@pairs(LARGE)
def test_large(shapes):
    check(*random(*shapes))


@pairs(EMPTY)
def test_empty(shapes):
    check(*random(*shapes))


@pairs(NO_FEATURES)
def test_no_features(shapes):
    check(*random(*shapes))


@pairs(BROADCAST)
def test_broadcast(shapes):
    check(*random(*shapes))


@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "batch"])
@pytest.mark.parametrize("which", ["x", "y", "both"])
def test_non_contiguous(which, batch):
    (x,) = random((*batch, 5, 7)) if which == "y" else (v.mT for v in random((*batch, 7, 5)))
    (y,) = random((*batch, 3, 7)) if which == "x" else (v.mT for v in random((*batch, 7, 3)))
    assert x.is_contiguous() == (which == "y")
    assert y.is_contiguous() == (which == "x")
    check(x, y)


def test_strided():
    x, y = random((2, 34, 40), (3, 20, 60))
    check(x[:, 1::2, ::3], y[:2, ::4, 2:16])
    check(x[1, ::5, 3:], y[0, :, 3:40])


def test_expanded():
    x, y = random((1, 9), (4, 1))
    check(x.expand(6, 9), y.expand(4, 9))
    check(x.expand(3, 5, 9), y.expand(3, 4, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check(*random((17, 300), (9, 300), dtype=dtype))


def test_double():
    check(*random((3, 5), (4, 5), dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(value):
    x, y = random((3, 5), (4, 5))
    x[1, 2] = value
    check(x, y)


def test_same_inputs():
    (x,) = random((1, 27, 32))
    check(x, x)
    assert torch.equal(cdist(x, x).diagonal(dim1=1, dim2=2), torch.zeros(1, 27))
    assert torch.equal(_l1_cost(x.mT), cdist(x, x))


def gradients(function: Any, leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Return the gradients of ``<weights, function(*leaves)>``."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    function(*leaves).backward(weights)
    found = [leaf.grad for leaf in leaves]
    assert all(
        g is not None and g.dtype == leaf.dtype for g, leaf in zip(found, leaves, strict=True)
    )
    return found


def check_gradients(leaves: list[Tensor], ours: Any = cdist, theirs: Any = torch.cdist) -> None:
    """Compare gradients for whole weights, whose sums are exact, and for random ones."""

    def exact(*values: Tensor) -> Tensor:
        return theirs(*values, p=1)

    wide = [leaf.double() for leaf in leaves]
    shape = exact(*wide).shape
    for weights in (*integers(shape), *random(shape)):
        bound = 0 if torch.equal(weights, weights.round()) else 1e-6 * float(weights.abs().sum())
        found = gradients(ours, leaves, weights)
        expected = gradients(exact, wide, weights.double())
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=bound)


@pairs([(x, y) for x, y in SAMPLES if len(x) < 4 and x[:-2] == y[:-2]])
def test_gradient_of_sample(shapes):
    check_gradients(random(*shapes))


@pairs(DIFFERENTIATED)
def test_gradient(shapes):
    check_gradients(random(*shapes))


@pairs(DIFFERENTIATED)
def test_gradient_at_ties(shapes):
    check_gradients(integers(*shapes))


@pytest.mark.parametrize("which", ["x", "y"])
def test_gradient_of_one(which):
    x, y = random((5, 30), (6, 30))
    if which == "x":
        check_gradients([x], lambda v: cdist(v, y), lambda v, p: torch.cdist(v, y.double(), p=p))
    else:
        check_gradients([y], lambda v: cdist(x, v), lambda v, p: torch.cdist(x.double(), v, p=p))


def test_gradient_non_contiguous():
    x, y = random((30, 5), (30, 6))
    check_gradients(
        [x, y], lambda a, b: cdist(a.mT, b.mT), lambda a, b, p: torch.cdist(a.mT, b.mT, p=p)
    )


@pytest.mark.parametrize("how", ["x twice", "x alone", "targets"])
def test_gradient_of_same_inputs(how):
    (x,) = random((1, 27, 32))
    kept = torch.tensor([4, 4, 0, 26])
    if how == "targets":
        check_gradients(
            [x],
            lambda v: _l1_cost(v.mT, targets=kept),
            lambda v, p: torch.cdist(v, v[:, kept], p=p),
        )
    else:
        ours = (lambda v: cdist(v, v)) if how == "x twice" else (lambda v: _l1_cost(v.mT))
        check_gradients([x], ours, lambda v, p: torch.cdist(v, v, p=p))
