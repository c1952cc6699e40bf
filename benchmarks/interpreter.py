"""Makes Triton's interpreter quick enough for kernels of many functions."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Have a launch replace the words of ``triton.language`` once.

    The interpreter does so again at every call of a device function, over what it replaced before:
    each call makes all later ones slower, and a kernel that stays on the device makes thousands.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    if hasattr(patch, "once"):
        return
    within: list[Any] = []

    class Scope:
        def __init__(self, function: Any) -> None:
            self.first = not within
            self.inner = patch(function) if self.first else None
            within.append(self)

        def restore(self) -> None:
            if self.inner is not None:
                self.inner.restore()
                within.clear()

    Scope.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = Scope
