"""docs/api.md from the docstrings: every public name, its signature, and what it says of itself."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import dotresize

OT = ("sinkhorn", "sinkhorn2", "solve_batch")


def api() -> str:
    """Return the page, without its heading."""
    names = [(f"dotresize.{name}", getattr(dotresize, name)) for name in dotresize.__all__]
    names = [(name, value) for name, value in names if not inspect.ismodule(value)]
    names += [(f"dotresize.ot.{name}", getattr(dotresize.ot, name)) for name in OT]
    return "\n\n".join(_entry(name, value) for name, value in names)


def _entry(name: str, value: Any) -> str:
    parts = [f"## `{name}`"]
    if inspect.isfunction(value) or name.endswith("Accumulator"):
        parts.append(f"```python\n{_signature(name, value)}\n```")
    parts.append(_text(value))
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if inspect.isfunction(member) and not key.startswith("_") and member.__doc__:
                parts.append(f"**`{_signature(key, member)}`**")
                parts.append(_text(member))
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    """Return a docstring as it is written, which keeps its columns."""
    return f"```text\n{inspect.cleandoc(value.__doc__ or '')}\n```"


def _signature(name: str, value: Any) -> str:
    parameters = inspect.signature(value).parameters.values()
    written: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in written:
            written.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f"={p.default!r}"
        written.append(f"{star}{p.name}{default}")
    call = f"{name}({', '.join(written)})"
    if len(call) <= 98:
        return call
    inner = textwrap.fill(", ".join(written), 94)
    return f"{name}(\n{textwrap.indent(inner, '    ')}\n)"
