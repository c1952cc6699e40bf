"""Where a model is read from: a directory, a .gguf file, the hub's cache, or a hub id."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Return what transformers' ``from_pretrained`` takes for a source: a name, and keywords.

    Raises ValueError, in one line, for what is none.
    """
    path = snapshot(Path(source))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {source}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {source}: a directory without config.json is not a model")
        return str(path), {"trust_remote_code": False}
    if path.exists():
        raise ValueError(f"model {source}: must be a directory, a .gguf file or a hub id")
    if not _HUB_ID.fullmatch(source) or path.parent.is_dir():
        raise ValueError(f"model {source}: no such directory, nor the form of a hub id")
    return source, {"trust_remote_code": False}


def snapshot(path: Path) -> Path:
    """Return the model inside a folder of the hub's cache (``models--org--name``); others as is.

    Of several snapshots the one that ``refs/main`` names is meant.
    """
    found = sorted((path / "snapshots").glob("*/config.json"))
    if not found or (path / "config.json").exists():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        named = path / "snapshots" / main.read_text(encoding="utf-8").strip()
        if named / "config.json" in found:
            return named
    if len(found) > 1:
        raise ValueError(
            f"model {path}: holds {len(found)} snapshots; give one, such as {found[0].parent}"
        )
    return found[0].parent


def config_of(where: str, options: dict[str, Any]) -> Any:
    """Return the config of what ``locate`` has found, which the caller may change."""
    if "gguf_file" in options:
        file = Path(where) / options["gguf_file"]
        return copy.deepcopy(_gguf_config(file, file.stat().st_mtime_ns))
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoConfig.from_pretrained(where, **options)


@functools.lru_cache(maxsize=1)
def _gguf_config(file: Path, changed: int) -> Any:
    """Return the config that a file has. That takes seconds: its vocabulary is parsed as well.

    changed: when the file was; a newer one is read anew.
    """
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)


@contextlib.contextmanager
def one_line(source: str) -> Iterator[None]:
    """Raise ValueError in one line for whatever a damaged file makes the readers raise."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"model {source}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    text = " ".join(str(error).split())[:200]
    # Some messages say nothing without the exception's name, such as a KeyError's.
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
