"""torch's defaults (dtype, device, autocast) change no result: what is made is named in full."""

from __future__ import annotations

import ast
import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import device_of, tiny_model

import dotresize
from dotresize import (
    L1CostAccumulator,
    activation_cost,
    assignment,
    factorize,
    l1_cost,
    ot,
    sinkhorn,
    transport_map,
)
from dotresize.ops.activation_cost import METRICS

ROOT = Path(__file__).parent.parent
# Functions whose result has torch's default dtype and device unless both are named.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "tensor", "zeros"}


@contextlib.contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


OTHERS = {
    "float64": lambda: defaults(torch.float64),
    "bfloat16": lambda: defaults(torch.bfloat16),
    "float16": lambda: defaults(torch.float16),
    "meta": lambda: defaults(device="meta"),
    "autocast": autocast,
}


@pytest.fixture(params=OTHERS)
def other(request):
    return OTHERS[request.param]


def flat(value) -> list:
    if isinstance(value, (tuple, list)):
        return [entry for part in value for entry in flat(part)]
    return [value]


def assert_same(found, expected) -> None:
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        if isinstance(right, torch.Tensor):
            assert (left.dtype, left.device) == (right.dtype, right.device)
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        else:
            assert left == right or right != right


def solver_calls(backend: str) -> dict:
    device = device_of(backend)
    draw = torch.Generator(device).manual_seed(0)
    given = {"generator": draw, "dtype": torch.float32, "device": device}
    x, y = torch.randn(2, 30, 12, **given), torch.randn(2, 30, 9, **given)
    index = x[0, 0].argsort()[:9]
    cost, score = torch.rand(2, 8, 7, **given), torch.rand(2, 5, 5, **given)
    a, b = torch.rand(8, **given) + 0.1, torch.rand(7, **given) + 0.1
    a, b = a / a.sum(), b / b.sum()
    options = {"backend": backend}

    def accumulated() -> torch.Tensor:
        total = L1CostAccumulator(12, targets=index, batch=2, device=device, **options)
        for chunk in x.split(20, 1):
            total.update(chunk)
        return total.result()

    def of_metrics() -> list:
        return [activation_cost(x, y, metric=metric, **options) for metric in METRICS]

    def gradients() -> tuple:
        leaves = [v.detach().clone().requires_grad_() for v in (x, y, cost, a, b)]
        own = l1_cost(*leaves[:2], **options)
        result = sinkhorn(*leaves[2:3], 0.3, *leaves[3:], max_iter=9, **options)
        loss = (own * own).sum() + (result.plan**2).sum() + result.value.sum().to(own)
        return torch.autograd.grad(loss, leaves)

    def solved() -> tuple:
        result = sinkhorn(cost, 0.1, a, b, schedule=(4.0,), max_iter=9, **options)
        numbers = result.n_iter, result.marginal_error, result.converged
        return result.potentials, numbers, result.plan, result.value, result.value_linear

    def ragged() -> tuple:
        result = sinkhorn([cost[0], cost[1, :5]], 0.1, max_iter=9, **options)
        return result.potentials, result.plan, result.status

    def matched() -> tuple:
        columns, proof = assignment(score, certificate=True, **options)
        return columns, proof.u, proof.v, proof.gap, proof.violation

    calls = {
        "l1_cost": lambda: l1_cost(x, y, **options),
        "l1_cost of itself": lambda: l1_cost(x, statistics=True, **options),
        "l1_cost, targets": lambda: l1_cost(x, targets=index, reduction="sum", **options),
        "accumulator": accumulated,
        "metrics": of_metrics,
        "gradients": gradients,
        "sinkhorn": solved,
        "sinkhorn, a list": ragged,
        "assignment": matched,
    }
    for precision, built in {"u8": ("cpp", "torch"), "fp16": ("triton", "torch")}.items():
        if backend in built:
            calls[precision] = lambda p=precision: l1_cost(x, y, precision=p, **options)
    if backend == "triton":  # a launch takes the interpreter a second
        calls = {name: calls[name] for name in ("accumulator", "fp16", "gradients", "sinkhorn")}
    return calls


@functools.cache
def expected_of(backend: str) -> dict:
    return {name: call() for name, call in solver_calls(backend).items()}


def test_solvers(backend, other):
    expected = expected_of(backend)
    with other():
        found = {name: call() for name, call in solver_calls(backend).items()}
    for name, value in expected.items():
        assert_same(found[name], value)


def test_maps_and_names_of_pot(other):
    torch.manual_seed(0)
    cost = torch.rand(9, 5)
    batch = torch.rand(3, 6, 4)
    plan = sinkhorn(cost, 1.0).plan

    def everything() -> list:
        factors = factorize(transport_map(plan))
        solved = ot.solve_batch(batch, 0.2)
        numbers = ot.sinkhorn([], [], cost.numpy(), 0.2)
        return [
            *(factors.q, factors.r, ot.sinkhorn([], [], cost, 0.2), torch.from_numpy(numbers)),
            *(ot.sinkhorn2([0.5] + [0.0625] * 8, [], cost, 0.2), solved.plan, solved.value),
        ]

    expected = everything()
    with other():
        found = everything()
    assert_same(found, expected)


def test_compress(other):
    model = tiny_model("llama")
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (6, 24))
    ways = [
        {"width": 24},
        {"width": 24, "method": "dot"},
        {"ff_width": 32},
        {"params": 0.8, "search": True},
    ]

    def everything() -> list:
        return [
            tensor
            for way in ways
            for tensor in dotresize.compress(model, tokens, **way)[0].state_dict().values()
        ]

    expected = everything()
    with other():
        found = everything()
    assert_same(found, expected)


def test_what_is_made_is_named_in_full():
    """Every call of a factory gives both dtype and device."""
    vague = []
    for path in sorted([*ROOT.glob("dotresize/**/*.py"), *ROOT.glob("kernels/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id == "torch"):
                continue
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            if node.func.attr in FACTORIES and missing:
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                vague.append(f"{place}: torch.{node.func.attr} without {' and '.join(missing)}")
    assert vague == []


def test_a_wrong_buffer_is_refused_before_its_address_is_taken():
    from dotresize.ops.arguments import address

    assert address(None, torch.float32) == 0
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")):
        with pytest.raises(RuntimeError, match="the kernel takes torch"):
            address(wrong, torch.float32)


@pytest.mark.parametrize(
    "setting", ["set_default_dtype(torch.float16)", "set_default_device('meta')"]
)
def test_nothing_crashes_the_process(setting):
    """What once ended in a corrupted heap, or in a segmentation fault."""
    code = (
        "import torch; from dotresize import assignment, l1_cost, sinkhorn\n"
        "x = torch.randn(300, 64, device='cpu'); score = torch.rand(60, 60, device='cpu')\n"
        f"torch.{setting}\n"
        "c = l1_cost(x); assignment(score); assert sinkhorn(c, 1.0).plan.dtype == torch.float32\n"
        "assert float(c.diagonal().abs().max()) == 0 and c.device.type == 'cpu'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
