"""One call of the fuzz: drawn from its seed, made, judged."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import operator
import os
import sysconfig
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dotresize

from .call import Call, apart
from .kinds import NOTHING, Draw, Odd, odd, plain_of, tensors
from .models import MODELS
from .pot import POT
from .solvers import SOLVERS

CALLS = SOLVERS | POT | MODELS
PACKAGE = Path(dotresize.__file__).parent
OURS = (PACKAGE, PACKAGE.parent / "kernels")
LIBRARY = Path(sysconfig.get_path("stdlib"))
REFUSALS = (ValueError, TypeError, OSError, dotresize.BackendError)
# More warnings than this from one call are a flood.
WARNINGS = 5


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], Any]] = {
    **{
        f"default dtype {word}": functools.partial(default_dtype, getattr(torch, word))
        for word in ("float64", "float16", "bfloat16")
    },
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "numpy raises": lambda: np.errstate(all="raise"),
}
TRANSFORMS = ("vmap", "grad")
# In these no valid call may be refused: they change nothing that concerns it.
HARMLESS = tuple(name for name in CONTEXTS if name.startswith(("default dtype", "numpy")))


def public() -> set[str]:
    """Return the names that must have calls: functions, classes that are called, their methods."""
    found: set[str] = set()
    for module, prefix in ((dotresize, ""), (dotresize.ot, "ot.")):
        for name in {*module.__all__, *getattr(module, "_LATER", ())}:
            value = getattr(module, name)
            if inspect.isclass(value):
                found |= {f"{prefix}{name}.{method}" for method in methods(value)}
                # Nobody but the package makes its results and errors.
                if not issubclass(value, (tuple, Exception)) and not hasattr(
                    value, "__dataclass_fields__"
                ):
                    found.add(prefix + name)
            elif callable(value):
                found.add(prefix + name)
    return found


def methods(kind: type) -> Iterator[str]:
    read = ("__getitem__", "__len__", "__iter__")
    for name, value in vars(kind).items():
        if isinstance(value, (types.FunctionType, property, functools.cached_property)) and (
            name in read or not name.startswith("_")
        ):
            yield name


def parameters(name: str) -> set[str]:
    """Return the names of what a function of the package takes; none for a property."""
    value = operator.attrgetter(name)(dotresize)
    if not callable(value):
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(value).parameters.values()
    return {p.name for p in found if p.kind in named} - {"self"}


def name_of(draw: Draw) -> str:
    """Return the function that is called, the first choice of a seed."""
    return draw.choices(list(CALLS), [weight for _, weight in CALLS.values()])[0]


class Trial:
    """One call: drawn from its seed, made, judged.

    Attributes:
        name: of the function.
        what: the odd arguments and the context, for people.
    """

    def __init__(self, seed: int) -> None:
        draw = Draw(seed)
        self.name = name_of(draw)
        self.call: Call = CALLS[self.name][0](draw)
        self.given = dict(self.call.arguments)
        self.plain = {name: plain_of(value) for name, value in self.given.items()}
        free = [name for name in self.given if name not in self.call.fixed]
        self.context = draw.choice(list(CONTEXTS)) if draw.chance(0.3) or not free else None
        self.along = ""  # the argument that a transform is of
        floats = [k for k, v in self.given.items() if is_plain_float(v)]
        if floats and self.context is None and draw.chance(0.08):
            self.context, self.along = draw.choice(TRANSFORMS), draw.choice(floats)
            free = []
        most = min(len(free), 3 if self.context is None else 1)
        count = draw.randint(min(1, most) if self.context is None else 0, most)
        self.odd: dict[str, Odd] = {}
        for name in self._chosen(draw, free, count):
            own = self.call.own.get(name)
            value = own(draw) if own and draw.chance(0.6) else odd(draw, self.given[name])
            self.odd[name], self.given[name], self.plain[name] = value, value.value, value.plain

    def _chosen(self, draw: Draw, free: list[str], count: int) -> list[str]:
        """Return which arguments are replaced."""
        often = [name for name in self.call.often if name in free]
        if not often or not count or draw.chance(0.4):
            return draw.sample(free, count)
        first = draw.choice(often)
        return [first, *draw.sample([name for name in free if name != first], count - 1)]

    @property
    def what(self) -> str:
        parts = [f"{name}={value.label}" for name, value in self.odd.items()]
        if self.context:
            parts.append(f"under {self.context}" + (f" along {self.along}" if self.along else ""))
        if self._functional:
            parts.append("within functional_call")
        return f"{self.name}({', '.join(parts)})"

    def outcome(self, show: bool = False) -> tuple[str, str]:
        """Return the kind of outcome ("right", "refused", "fault") and what was said."""
        if missing := parameters(self.name) - self.given.keys():
            return "fault", f"the fuzz has no {min(missing)} for {self.name}: add it"
        before, state = {k: copied(v) for k, v in self.given.items()}, global_state()
        result, error = None, None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # as in any program
            try:
                result = self._made()
            except Exception as raised:
                error = raised
                if show:
                    traceback.print_exc()
        if global_state() != state:
            return "fault", f"left behind: {global_state()}, not {state}"
        for name, value in before.items():
            if value is not None and name != "out" and not same(self.given[name], value):
                return "fault", f"changed its argument {name}"
        if changed := self.call.after():
            return "fault", changed
        if len(said) > WARNINGS:
            return "fault", f"{len(said)} warnings, the last: {said[-1].message}"
        if error is None:
            wrong = self._wrong(result)
            return ("right", "") if wrong is None else ("fault", f"result: {wrong}")
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, self._refusals):
            return "fault", text
        wrong = unlike_a_refusal(error)
        if wrong is None and self.context in HARMLESS and not self.odd and not self._functional:
            wrong = "refused a valid call"
        return ("refused", text) if wrong is None else ("fault", f"{wrong}, {text}")

    @property
    def _functional(self) -> bool:
        return getattr(self.call.function, "__name__", "") == "functional"

    @property
    def _refusals(self) -> tuple[type[Exception], ...]:
        # Where POT has something else (docstrings of dotresize.ot), and what sequences raise.
        more = {"ot": NotImplementedError, "SinkhornResult": IndexError}.get(
            self.name.split(".")[0]
        )
        return (*REFUSALS, more) if more else REFUSALS

    def _made(self) -> Any:
        if not self.along:
            with CONTEXTS[self.context]() if self.context else contextlib.nullcontext():
                return self.call.function(**self.given)

        def of(value: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors(self.call.function(**self.given | {self.along: value})))

        value = self.given[self.along]
        if self.context == "vmap":
            return torch.func.vmap(of)(torch.stack([value, value]))
        return torch.func.grad(lambda v: summed(of(v)))(value)

    def _wrong(self, result: Any) -> str | None:
        """Return what is wrong with a result; None if nothing is."""
        if self.along:
            return self._wrong_transform(result)
        nothing = [name for name, value in self.plain.items() if value is NOTHING]
        if nothing:
            return f"accepted a value without real numbers for {nothing[0]}"
        try:
            return self.call.check(self.plain, self.given, result)
        except Exception as error:  # a result that has not even the form, or plain ones are refused
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name})"
            return f"cannot be judged by plain arguments: {text}"

    def _wrong_transform(self, result: Any) -> str | None:
        value = self.given[self.along].clone().requires_grad_(self.context == "grad")
        direct = tuple(tensors(self.call.function(**self.given | {self.along: value})))
        if self.context == "vmap":
            pairs = [(part, v) for many, v in zip(result, direct, strict=True) for part in many]
        else:
            total = summed(direct)
            grads = torch.autograd.grad(total, value) if total.requires_grad else [0 * value]
            pairs = [(result, grads[0])]
        return next((wrong for pair in pairs if (wrong := apart(*pair, 1e-3))), None)


def summed(values: tuple[Tensor, ...]) -> Tensor:
    return sum((v.float().sum() for v in values if v.is_floating_point()), torch.zeros(()))


def is_plain_float(value: Any) -> bool:
    return type(value) is Tensor and value.is_floating_point()


def copied(value: Any) -> Any:
    """Return a copy of a tensor or array, to see whether it was changed; None for other values."""
    if isinstance(value, (Tensor, np.ndarray)):
        plain = plain_of(value)
        return None if plain is NOTHING else plain
    return None


def same(value: Any, before: Tensor) -> bool:
    plain = plain_of(value)
    return plain is not NOTHING and apart(plain, before, 0.0) is None


def global_state() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        tuple(np.geterr().values()),
        os.getcwd(),
    )


def unlike_a_refusal(error: BaseException) -> str | None:
    """Return why an error of a fitting class is no refusal of this package; None if it is one."""
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        # An OSError may be the system's, by way of Python's own library: it names the file.
        if isinstance(error, OSError) and in_library(last.tb_next.tb_frame.f_code):
            break
        last = last.tb_next
    code = last.tb_frame.f_code
    if not any(Path(code.co_filename).resolve().is_relative_to(folder) for folder in OURS):
        return f"from {Path(code.co_filename).name}"
    raises = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    if not raises and not isinstance(error, OSError):
        return f"not raised by a statement of {Path(code.co_filename).name}"
    return None if len(str(error).splitlines()) == 1 else "of several lines or none"


def in_library(code: types.CodeType) -> bool:
    """Return whether code is of Python's standard library."""
    path = Path(code.co_filename)
    installed = "site-packages" in path.parts
    return path.name.startswith("<frozen") or (path.is_relative_to(LIBRARY) and not installed)
