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
    if isinstance(patch, _Once):
        return
    interpreter._patch_lang = _Once(patch, (interpreter.tl, interpreter.tl.core))


class _Once:
    """Takes the place of what replaces the words that a function sees."""

    def __init__(self, patch: Any, languages: tuple[Any, ...]) -> None:
        self.patch, self.languages = patch, languages
        self.scopes: dict[tuple[bool, ...], Any] = {}  # of the launch that runs

    def __call__(self, function: Any) -> _Once:
        seen = {id(value) for value in function.__globals__.values()}
        key = tuple(id(language) in seen for language in self.languages)
        if key not in self.scopes:
            self.scopes[key] = self.patch(function)
        return self

    def restore(self) -> None:
        """Undo all of it, the last first, at the end of the launch: the calls within do not."""
        while self.scopes:
            self.scopes.popitem()[1].restore()
