"""Linear assignment: every backend against scipy's optimum, and the certificate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ON_GPU, device_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dotresize import assignment, sinkhorn
from dotresize.ops import assignment_launch

INF = float("inf")
SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 53, 64, 97]


def sinkhorn_by_cpp(*args, backend: str, **options):
    return sinkhorn(*args, backend="cpp", **options)


@pytest.fixture(autouse=True)
def _quick_duals(monkeypatch):
    """How good the duals are must not matter; the interpreter is slow and has a test of its own."""
    if not ON_GPU:
        monkeypatch.setattr(assignment_launch, "SINKHORN_ITERATIONS", 3)
        monkeypatch.setattr(assignment_launch, "sinkhorn", sinkhorn_by_cpp)


def value(score: Tensor, columns: Tensor) -> float:
    """The sum of an assignment's scores, which it must be: each column once."""
    columns = columns.cpu()
    assert columns.dtype == torch.int64
    assert columns.sort().values.tolist() == list(range(len(score)))
    return float(score.cpu().double().gather(1, columns[:, None]).sum())


def optimum(score: Tensor, maximize: bool) -> float:
    matrix = score.cpu().double().numpy()
    return float(matrix[linear_sum_assignment(matrix, maximize=maximize)].sum())


def check(score: Tensor, backend: str, *, exact: bool = False) -> None:
    for maximize in (True, False):
        columns, proof = assignment(score, maximize=maximize, certificate=True, backend=backend)
        assert columns.device == proof.u.device == score.device
        size = float(score.double().abs().max()) * len(score)
        best = optimum(score, maximize)
        assert abs(value(score, columns) - best) <= (0 if exact else 1e-13 * size)
        assert abs(proof.gap) <= (0 if exact else 1e-13 * size)
        assert proof.violation <= (0 if exact else 1e-13 * size)
        total = float(proof.u.sum() + proof.v.sum())
        assert abs(total - best) <= (0 if exact else 1e-12 * size)
        excess = score.double() - proof.u[:, None] - proof.v
        assert float((excess if maximize else -excess).max()) <= 1e-13 * size


@pytest.mark.parametrize("n", SIZES)
def test_random_scores(backend, n):
    check(torch.randn(n, n, device=device_of(backend)), backend)


@pytest.mark.parametrize("n", [17, 40, 53])
@pytest.mark.parametrize("high", [1, 2, 10, 1000, 2**40])
def test_integers_are_exact(backend, n, high):
    """From all-equal scores, with many ties, to numbers that float32 cannot hold."""
    score = torch.randint(-high, high, (n, n), device=device_of(backend))
    check(score, backend, exact=True)
    check(score.double() * 2.0**-50, backend, exact=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8),
        *(torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    ],
    ids=str,
)
def test_every_type_is_read_as_it_is(backend, dtype):
    score = torch.randint(0, 100, (33, 33)).to(dtype)
    if dtype.is_floating_point:
        score = torch.randn(33, 33).to(dtype)
    check(score.to(device_of(backend)), backend, exact=not dtype.is_floating_point)


def test_equal_scores_and_duplicate_rows(backend):
    device = device_of(backend)
    check(torch.full((37, 37), 0.1, device=device), backend)
    check(torch.zeros(37, 37, device=device), backend, exact=True)
    check(torch.randn(5, 41, device=device).repeat(9, 1)[:41], backend)
    check(torch.randn(41, 5, device=device).repeat(1, 9)[:, :41], backend)
    check(torch.randn(41, 1, device=device).expand(41, 41), backend)  # all alike to each row
    check(torch.arange(30, device=device).outer(torch.arange(30, device=device)), backend)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-30, 1e30, 1e300])
def test_huge_and_tiny_scales(backend, scale):
    check(torch.randn(24, 24, dtype=torch.float64, device=device_of(backend)) * scale, backend)


def test_scores_that_would_overflow(backend):
    score = torch.full((9, 9), -1.7e308, dtype=torch.float64)
    score[torch.arange(9), torch.arange(9).roll(2)] = 1.7e308
    columns = assignment(score.to(device_of(backend)), backend=backend)
    assert columns.tolist() == torch.arange(9).roll(2).tolist()


def test_layouts(backend):
    wide = torch.randn(3, 60, 60, device=device_of(backend))
    views = [wide[0].T, wide[1, ::2, 1::2], wide[2, 5:24, 7:26], wide[:, 3, :3], wide[0].flip(1)]
    for view in views:
        check(view, backend)
    batch = wide.permute(1, 0, 2)[:3, :, ::20]
    found = assignment(batch, backend=backend)
    for one, columns in zip(batch, found, strict=True):
        assert torch.equal(assignment(one, backend=backend), columns)


def test_a_batch_is_its_problems(backend):
    score = torch.randn(7, 29, 29, device=device_of(backend))
    columns, proof = assignment(score, certificate=True, backend=backend)
    assert columns.shape == proof.u.shape == proof.v.shape == (7, 29)
    assert proof.gap.shape == proof.violation.shape == (7,)
    for i in range(7):
        one, alone = assignment(score[i], certificate=True, backend=backend)
        assert torch.equal(one, columns[i])
        assert torch.equal(alone.v, proof.v[i])
        assert alone.gap == float(proof.gap[i])
    assert torch.equal(assignment(score, backend=backend), columns)


def test_empty(backend):
    device = device_of(backend)
    for shape in ((0, 0), (0, 5, 5), (4, 0, 0), (0, 0, 0)):
        columns, proof = assignment(
            torch.ones(shape, device=device), certificate=True, backend=backend
        )
        assert columns.shape == proof.u.shape == shape[:-1]
        assert columns.dtype == torch.int64
    assert assignment(torch.ones(0, 0, device=device), certificate=True)[1].gap == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_forbidden_pairs(backend, dtype):
    for allowed in (0.1, 0.3, 0.9):
        score = torch.randn(43, 43).to(dtype)
        score[torch.rand(43, 43) > allowed] = -INF
        score[torch.arange(43), torch.randperm(43)] = 0.0  # there is one assignment at least
        score = score.to(device_of(backend))
        columns, proof = assignment(score, certificate=True, backend=backend)
        assert abs(value(score, columns) - optimum(score, True)) < 1e-10
        assert abs(proof.gap) < 1e-10
        other = assignment(-score, maximize=False, backend=backend)
        assert abs(value(-score, other) - optimum(-score, False)) < 1e-10


def test_no_assignment_names_the_problem(backend):
    few = torch.randn(3, 8, 8)
    few[1, :5, 4:] = -INF  # five rows, four columns
    row, column = few.clone(), few.clone()
    row[1, 3], column[1, :, 3] = -INF, -INF
    for score in (few, row, column):
        score = score.to(device_of(backend))
        with pytest.raises(ValueError, match=r"problem 1: its forbidden pairs \(-inf\) leave no"):
            assignment(score, backend=backend)
        with pytest.raises(ValueError, match=r"problem 0: its forbidden pairs \(inf\) leave no"):
            assignment(-score[1], maximize=False, backend=backend)


@pytest.mark.parametrize("n", [5, 16, 21])
def test_bad_numbers_are_named(backend, n):
    score = torch.randn(3, n, n, device=device_of(backend))
    for bad, word in ((torch.nan, "nan"), (INF, "inf")):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            broken = score.to(dtype)
            broken[2, 3, n - 1] = bad
            broken[2, 0, 0] = -INF
            with pytest.raises(ValueError, match=rf"problem 2 is {word} at row 3, column {n - 1}:"):
                assignment(broken, backend=backend)
    broken[2, 3, n - 1] = -INF
    with pytest.raises(ValueError, match="is -inf at row 0, column 0: must be finite, or inf"):
        assignment(broken, maximize=False, backend=backend)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.ones(4), r"has shape \(4,\): must be \(n, m\) or \(B, n, m\)"),
        (torch.ones(1, 1, 4, 4), "has shape"),
        (torch.ones(4, 4, dtype=torch.bool), "dtype torch.bool: must be float16"),
        (torch.ones(4, 4, dtype=torch.complex64), "dtype torch.complex64"),
        (np.ones((4, 4)), "score is a ndarray: must be a torch tensor"),
    ],
)
def test_what_is_refused(score, message):
    with pytest.raises(ValueError, match=message):
        assignment(score)


RECTANGLES = [(1, 5), (3, 4), (7, 40), (16, 17), (31, 97), (5, 1), (64, 30), (33, 32)]


def check_rectangle(score: Tensor, backend: str, *, exact: bool = False) -> None:
    """Each of the fewer is matched, the sum is scipy's, and the proof holds."""
    n, m = score.shape
    for maximize in (True, False):
        columns, proof = assignment(score, maximize=maximize, certificate=True, backend=backend)
        assert columns.shape == (n,)
        assert columns.device == score.device
        rows = (columns >= 0).nonzero()[:, 0]
        assert len(rows) == min(n, m)
        assert (columns[columns < 0] == -1).all()
        assert len(columns[rows].unique()) == len(rows)
        found = float(score.double()[rows, columns[rows]].sum())
        best = optimum(score, maximize)
        size = float(score.double().abs().max()) * min(n, m)
        slack = 0 if exact else 1e-12 * size
        assert abs(found - best) <= slack
        assert abs(proof.gap) <= slack
        assert proof.violation <= slack
        assert (proof.u.shape, proof.v.shape) == ((n,), (m,))
        assert abs(float(proof.u.sum() + proof.v.sum()) - best) <= slack
        sign = 1 if maximize else -1
        excess = sign * (score.double() - proof.u[:, None] - proof.v)
        assert float(excess.max()) <= slack
        longer = proof.v if n < m else proof.u
        assert float((-sign * longer).max()) <= slack


@pytest.mark.parametrize("shape", RECTANGLES)
def test_rectangles(backend, shape):
    device = device_of(backend)
    check_rectangle(torch.randn(shape, device=device), backend)
    check_rectangle(
        torch.randn(shape, device=device, dtype=torch.float64).T.contiguous().T, backend
    )
    for high in (1, 3, 1000, 2**40):
        score = torch.randint(-high, high, shape, device=device)
        check_rectangle(score, backend, exact=True)
    products = torch.arange(shape[0])[:, None] * torch.arange(shape[1])
    check_rectangle(products.to(device), backend, exact=True)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_forbidden_pairs_of_rectangles(backend, shape):
    score = torch.randn(shape, device=device_of(backend))
    score[torch.rand_like(score) < 0.3] = -INF
    score[:, 0] = -INF
    score[0] = -INF
    if shape[0] < shape[1]:
        with pytest.raises(ValueError, match="leave no assignment of every row to a column"):
            assignment(score, backend=backend)
        score[0, 5] = 1.0
    else:
        with pytest.raises(ValueError, match="leave no assignment of every column to a row"):
            assignment(score, backend=backend)
        score[5, 0] = 1.0
    columns = assignment(score, backend=backend)
    rows = (columns >= 0).nonzero()[:, 0]
    found = float(score.double()[rows, columns[rows]].sum())
    assert abs(found - optimum(score, True)) < 1e-5


def test_a_batch_of_rectangles(backend):
    device = device_of(backend)
    for shape in ((4, 9, 15), (4, 15, 9)):
        score = torch.randn(shape, device=device)
        columns, proof = assignment(score, certificate=True, backend=backend)
        assert (proof.u.shape, proof.v.shape) == (shape[:2], (shape[0], shape[2]))
        for i in range(4):
            assert torch.equal(columns[i], assignment(score[i], backend=backend))


def test_lists_of_different_sizes(backend):
    device = device_of(backend)
    shapes = [(5, 5), (9, 3), (3, 9), (40, 40), (5, 5), (0, 4), (4, 0)]
    types = [torch.float32, torch.float64, torch.int64, torch.float16, *[torch.float32] * 3]
    scores = [
        (torch.randn(shape, device=device) * 9).to(dtype)
        for shape, dtype in zip(shapes, types, strict=True)
    ]
    found, proofs = assignment(scores, certificate=True, backend=backend)
    assert isinstance(found, list)
    for score, columns, proof in zip(scores, found, proofs, strict=True):
        alone, its = assignment(score, certificate=True, backend=backend)
        assert torch.equal(columns, alone)
        assert torch.equal(proof.u, its.u)
        assert abs(proof.gap) <= 1e-10
    assert found[-1].tolist() == [-1] * 4
    assert assignment([], backend=backend) == []
    assert assignment(tuple(scores[:2]), backend=backend)[1].tolist() == found[1].tolist()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([torch.rand(2, 2), torch.rand(2)], r"score 1 has shape \(2,\): must be \(n, m\)"),
        ([torch.rand(2, 2), 3], "score 1 is a int: must be a torch tensor"),
        ([torch.rand(2, 2), torch.rand(2, 2) > 0], "score 1 has dtype torch.bool"),
        ([torch.rand(0, 2), torch.full((3, 2), torch.nan)], "score 1 is nan at row 0, column 0"),
        ([torch.rand(2, 2), torch.full((3, 3), -INF)], "score 1: its forbidden pairs"),
        ([torch.nested.nested_tensor([torch.rand(2, 2)])], "score 0 is a nested tensor"),
    ],
)
def test_what_no_list_may_hold(backend, scores, message):
    given = [s.to(device_of(backend)) if isinstance(s, Tensor) else s for s in scores]
    with pytest.raises(ValueError, match=message):
        assignment(given, backend=backend)
