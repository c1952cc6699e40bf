"""Gluon, or its stand-in for the interpreter.

Gluon is Triton with explicit layouts: it says which thread holds which entry of a block, and that
is what the L1 kernel's speed depends on. Triton's interpreter does not know it. There, ``gl`` is
Triton itself with every layout dropped, so that one kernel text runs in both.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


class _WithoutLayouts:
    """``triton.language`` under the names and arguments of Gluon."""

    def BlockedLayout(self, *_: Any) -> None:
        return None

    def SliceLayout(self, *_: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(tl, name), tl.dtype):
            return getattr(tl, name)
        # Looked up at each call: the interpreter puts its own functions into the module.
        return lambda *args, layout=None, **kwargs: getattr(tl, name)(*args, **kwargs)


if triton.knobs.runtime.interpret:
    gl: Any = _WithoutLayouts()
    jit = triton.jit
else:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl

__all__ = ["gl", "jit"]
