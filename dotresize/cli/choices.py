"""The command line's arguments as objects that are passed on, and as what ``--resume`` compares.

A choice is a field of a dataclass; on the command line it is the option of that name, or of the
field's ``flag``. Both what is passed on and what is compared follow from the fields.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dotresize.cli.presets import PRESETS
from dotresize.compression import make_options
from dotresize.narrow.options import Options
from dotresize.narrow.targets import read_targets
from dotresize.ops.arguments import check_word

_Kind = TypeVar("_Kind")
# Windows that any text gives, however short: they may overlap.
ANY_TEXT = 32

logger = logging.getLogger("dotresize")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run begins with: a directory, a .gguf file or a hub id."""

    model: str


@dataclass(frozen=True, kw_only=True)
class TextChoices:
    """The texts that a run reads, and how much of them.

    Attributes:
        calibration, eval, unseen: files; the last ones are of kinds that the calibration has not.
        windows: for calibration, of ``window`` tokens each, placed by ``seed``.
        default_windows, default_window: whether nobody asked for that number, or that length, so
            that short texts, or a model, may make it less.
        eval_windows: of each text to evaluate on; None for all.
    """

    calibration: list[str] | None = None
    windows: int = 0
    window: int
    default_windows: bool = field(default=False, metadata={"resume": False})
    default_window: bool = field(default=False, metadata={"resume": False})
    seed: int = 0
    eval: list[str] | None = None
    unseen: list[str] | None = None
    eval_windows: int | None

    def fitted(self, config: Any) -> TextChoices:
        """Return the choices with windows that a model's positions are enough for."""
        positions = getattr(config, "max_position_embeddings", None) or self.window
        shorter = self.default_window and positions < self.window
        return replace(self, window=positions) if shorter else self

    def within(self, streams: list[Tensor]) -> TextChoices:
        """Return the choices with no more windows of a preset than texts have room for.

        streams: the tokens of each text. Half of what the shortest holds is taken of each, so that
        windows hardly overlap, and some are left to evaluate on; ``ANY_TEXT`` windows always.
        """
        room = len(streams) * min(len(stream) for stream in streams) // self.window // 2
        count = min(self.windows, max(room, ANY_TEXT))
        if not self.default_windows or count == self.windows:
            return self
        logger.info("the texts have room for %d windows, not for %d", count, self.windows)
        return replace(self, windows=count)

    @property
    def files(self) -> list[str]:
        """All files that are read."""
        return [*(self.calibration or []), *self.evaluated]

    @property
    def evaluated(self) -> list[str]:
        """All files to evaluate on."""
        return [*(self.eval or []), *(self.unseen or [])]


@dataclass(frozen=True, kw_only=True)
class RecoveryChoices:
    """The training afterwards: so many steps, None for none, and its highest learning rate."""

    recover: int | None = None
    learning_rate: float = 2e-4


def chosen(kind: type[_Kind], args: argparse.Namespace) -> _Kind:
    """Return a dataclass of choices as the command line has them."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def fill_in(args: argparse.Namespace, device: torch.device) -> None:
    """Put what ``--preset`` means in place of the options that were not given.

    Raises:
        ValueError: a word that is none of ``PRESETS``.
    """
    check_word("preset", args.preset, PRESETS)
    preset = PRESETS[args.preset]
    args.default_windows = args.windows is None
    if args.windows is None:
        args.windows = preset.windows[device.type]
    # Shapes of an offloaded model cannot be tried.
    if args.search is None and args.memory is None and compress_options(args).budgeted:
        args.search = preset.search


def compress_options(args: argparse.Namespace, **others: Any) -> Options:
    """Return the choices that the command line shares with ``dotresize.compress``, checked."""
    names = {"scope", *(one.name for one in fields(Options))} & vars(args).keys()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.targets is not None:
        given["targets"] = read_targets(args.targets)
    if args.sensitivity is not None:
        check_word("sensitivity", args.sensitivity, ("on", "off"))
        given["sensitivity"] = args.sensitivity == "on"
    return make_options(refit=not args.no_refit, **given | others)


def settings(args: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """Return the choices that decide what the output holds, as they were typed.

    A run that is resumed must have the same. kinds: dataclasses of choices; a field with
    ``resume=False`` in its metadata changes nothing.
    """
    flags = [
        one.metadata.get("flag", one.name)
        for kind in kinds
        for one in fields(kind)
        if one.metadata.get("resume", True)
    ]
    return {flag: getattr(args, flag) for flag in ("scope", *flags) if hasattr(args, flag)}
