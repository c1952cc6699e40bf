"""OUT.partial: the finished stages of a run, from which an interrupted one goes on.

Each stage appears whole or not at all, and is read back as it was, so that a run which goes on ends
with the weights it would have had. The folder is removed when OUT is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dotresize import checkpoint, distributed
from dotresize.calibration.statistics import MATRICES, Statistics
from dotresize.cli.names import PARTIAL, partial_folder
from dotresize.models.causal_lm import CausalLM
from dotresize.narrow.allocation import Allocation
from dotresize.narrow.pipeline import Prepared
from dotresize.narrow.split import Split

logger = logging.getLogger("dotresize")

# Recorded since windows begin with the token that the tokenizer puts in front of a text (BOS).
FIRST_TOKEN = {"first_token": "the tokenizer's"}
_TENSORS = ("importance", "final", *MATRICES)


def check_name(out: str) -> None:
    """Raise ValueError for an output whose name leaves no room for that of its unfinished run."""
    name = Path(out).name
    size, most = len(os.fsencode(name)), 255 - len(PARTIAL)
    if not name:
        raise ValueError(f"output {out!r}: must be the name of a new directory")
    if size > most:
        raise ValueError(f"output {name[:40]}...: File name too long, {size} bytes; at most {most}")


def run_in_stages(
    out: str,
    settings: dict[str, Any],
    also: dict[str, Any],
    *,
    resume: bool,
    check: Callable[[], None],
    run: Callable[[Stages], int],
) -> int:
    """Run a command whose finished stages are kept; return its exit code.

    With ``resume``, nothing is done for a finished output of the same settings, and an interrupted
    run goes on. Without, bad input leaves nothing behind: the same settings would fail again.

    Args:
        settings: what decides the output's weights, recorded with it.
        also: what decides besides what an interrupted run has found.
        check: raises ValueError for what is refused before anything is written.
    """
    check_name(out)
    if resume and already_done(out, settings):
        if partial_folder(out).exists():
            Stages(out, settings | also, resume=True).remove()
        logger.info("%s is complete with these settings; nothing to do", out)
        return 0
    checkpoint.check_output(out)
    check()
    stages = Stages(out, settings | also, resume=resume)
    distributed.wait()  # nobody writes before all have looked
    try:
        return run(stages)
    except ValueError:
        if not resume:
            stages.remove()
        raise


class Stages:
    """What a run has finished, beside its output directory.

    Attributes:
        path: OUT.partial; absent until the first stage is done.
        shards: where an offloaded model writes, once ``offload`` has made it.
    """

    def __init__(self, out: str, settings: dict[str, Any], *, resume: bool) -> None:
        """Raise ValueError for an unfinished run of other settings, or one not to be resumed."""
        self.path = partial_folder(out)
        self.shards: Path | None = None
        self._settings = settings
        if not self.path.exists():
            return
        if not resume:
            raise ValueError(
                f"{self.path}: holds an unfinished run; go on with --resume, or remove it"
            )
        try:
            before = dict(json.loads((self.path / "settings.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ValueError(f"{self.path}: is not what an unfinished run leaves") from None
        refuse_changes(self.path, settings, before)

    def calibration(self, make: Callable[[], Prepared], device: torch.device) -> Prepared:
        """Return what ``prepare`` makes before a model is narrowed: as it was kept, or kept now."""
        from safetensors.torch import load_file, save_file

        folder = self.path / "calibration"
        if not folder.exists():
            prepared = make()
            tokens, statistics, split, allocation = prepared
            record: dict[str, Any] = dict(vars(statistics))
            tensors = {name: record.pop(name) for name in _TENSORS}
            tensors = {k: v.contiguous() for k, v in tensors.items() if v is not None}

            def fill(new: Path) -> None:
                save_file(tensors | {"tokens": tokens.contiguous()}, new / "tensors.safetensors")
                parts = {
                    "statistics": record,
                    "split": None if split is None else split.record(),
                    "allocation": None if allocation is None else vars(allocation),
                }
                (new / "record.json").write_text(json.dumps(parts), encoding="utf-8")

            try:
                self._keep(folder, fill)
            except OSError as error:  # the run itself needs no room for it
                logger.warning("calibration is not kept for --resume: %s", error.strerror or error)
            return prepared
        tensors = load_file(folder / "tensors.safetensors", device=str(device))
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        tokens = tensors.pop("tokens").cpu()
        known = record["statistics"] | {name: tensors.get(name) for name in _TENSORS}
        split, allocation = record["split"], record["allocation"]
        return Prepared(
            tokens,
            Statistics(**known),
            None if split is None else Split.recorded(**split),
            None if allocation is None else Allocation.recorded(**allocation),
        )

    def model(
        self,
        name: str,
        make: Callable[[], tuple[CausalLM, dict[str, Any]]],
        tokenizer: Any,
        device: torch.device,
    ) -> tuple[CausalLM, dict[str, Any]]:
        """Return a model and its report: as they were kept under a name, or made and kept."""
        folder = self.path / name
        if not folder.exists():
            model, report = make()

            def fill(new: Path) -> None:
                checkpoint.write_directory(model, tokenizer, new)
                (new / "report.json").write_text(json.dumps(report), encoding="utf-8")

            self._keep(folder, fill)
            return model, report
        model, _ = checkpoint.load_with_tokenizer(
            str(folder), device, to_narrow=False, work=self.shards
        )
        return model, json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def training(self, name: str) -> Path:
        """Return the folder of a training, from which it goes on when it was interrupted."""
        self._begin()
        return self.path / name

    def offload(self) -> Path:
        """Return the folder that ``shards`` names from now on, empty."""
        self._begin()
        distributed.wait()
        self.shards = self.path / f"shards-{distributed.rank()}"
        shutil.rmtree(self.shards, ignore_errors=True)
        self.shards.mkdir()
        return self.shards

    def remove(self) -> None:
        if distributed.rank() == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def _keep(self, folder: Path, fill: Callable[[Path], None]) -> None:
        self._begin()
        checkpoint.write_whole(folder, fill)

    def _begin(self) -> None:
        if self.path.exists() or distributed.rank():
            return

        def begin(new: Path) -> None:
            text = json.dumps(self._settings)
            (new / "settings.json").write_text(text, encoding="utf-8")

        checkpoint.write_whole(self.path, begin)


def digests(paths: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def files_of(model: str) -> list[list]:
    """Return names, sizes and dates of the files a model is read from; none for a hub id."""
    path = Path(model)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def already_done(out: str, settings: dict[str, Any]) -> bool:
    """Return whether an output is complete; ValueError where it was made with other settings."""
    path = Path(out) / "dotresize.json"
    if not path.is_file():
        return False
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is not the record of a finished run") from None
    if not list(path.parent.glob("*.safetensors")):
        raise ValueError(f"output {out}: its weights are missing")
    refuse_changes(Path(out), settings, before)
    return True


def refuse_changes(made: Path, settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise ValueError naming the first setting that was another when ``made`` was written."""
    if settings.keys() & FIRST_TOKEN.keys() - before.keys():
        raise ValueError(
            f"output {made}: was calibrated on windows without the token that the tokenizer puts "
            "first (BOS); it cannot be resumed"
        )
    for name, value in settings.items():
        if name not in before:
            raise ValueError(
                f"output {made}: its record says nothing of {name}, as another command or version "
                "made it; it cannot be resumed"
            )
        if value != before[name]:
            then, now = (_shortened(v) for v in (before[name], value))
            raise ValueError(f"output {made}: made with another {name} ({then} then, {now} now)")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
