"""OUT.partial: the finished stages of a run, from which an interrupted one goes on.

Each stage appears whole or not at all, and is read back as it was, so that a run which goes on ends
with the weights it would have had. The folder is removed when OUT is complete.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import checkpoint, distributed
from dotresize.accounting import peak_memory
from dotresize.inputs import refuse_changes
from dotresize.recovery import recover
from dotresize.statistics import Statistics

logger = logging.getLogger("dotresize")

_TENSORS = ("importance", "moment", "cost", "final")


def partial_folder(out: str) -> Path:
    """Beside an output directory, whatever slashes its name ends in."""
    path = Path(out)
    return path.with_name(f"{path.name}.partial")


class Stages:
    """What a run has finished, beside its output directory.

    Attributes:
        path: OUT.partial; absent until the first stage is done.
        shards: where a model on a shelf writes, once ``shelve`` has said so.
    """

    def __init__(self, out: str, settings: dict[str, Any], *, resume: bool) -> None:
        """ValueError where a run of other settings, or one not to be resumed, has left some."""
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

    def calibration(
        self, make: Callable[[], tuple[Tensor, Statistics]], device: torch.device
    ) -> tuple[Tensor, Statistics]:
        """Tokens and statistics: as they were kept, or made and kept."""
        from safetensors.torch import load_file, save_file

        folder = self.path / "calibration"
        if not folder.exists():
            tokens, statistics = make()
            record: dict[str, Any] = dict(vars(statistics))
            tensors = {name: record.pop(name) for name in _TENSORS}
            tensors = {k: v.contiguous() for k, v in tensors.items() if v is not None}

            def fill(new: Path) -> None:
                save_file(tensors | {"tokens": tokens.contiguous()}, new / "tensors.safetensors")
                (new / "record.json").write_text(json.dumps(record), encoding="utf-8")

            try:
                self._keep(folder, fill)
            except OSError as error:  # the run itself needs no room for it
                logger.warning("calibration is not kept for --resume: %s", error.strerror or error)
            return tokens, statistics
        tensors = load_file(folder / "tensors.safetensors", device=str(device))
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        tokens = tensors.pop("tokens").cpu()
        record |= {name: tensors.get(name) for name in _TENSORS}
        return tokens, Statistics(**record)

    def narrowed(
        self,
        make: Callable[[], tuple[Any, dict[str, Any]]],
        tokenizer: Any,
        device: torch.device,
    ) -> tuple[Any, dict[str, Any]]:
        """The narrowed model and its report: as they were kept, or made and kept."""
        folder = self.path / "narrow"
        if not folder.exists():
            narrow, report = make()

            def fill(new: Path) -> None:
                checkpoint.save(narrow, tokenizer, new)
                (new / "report.json").write_text(json.dumps(report), encoding="utf-8")

            self._keep(folder, fill)
            return narrow, report
        narrow, _ = checkpoint.load_with_tokenizer(
            str(folder), device, to_narrow=False, work=self.shards
        )
        return narrow, json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def recovered(
        self, dense: Any, narrow: Any, tokens: Tensor, free: dict[str, Any], **choices: Any
    ) -> dict[str, Any]:
        """Trains ``narrow`` in place; its report, with the training-free one's figures apart."""
        found = recover(dense, narrow, tokens, folder=self.path / "training", **choices)
        row = {name: value for name, value in free.items() if name != "figures"}
        row["recovery"] = found
        row["training_free"] = {"perplexity": free["perplexity"], "seconds": free["seconds"]}
        row["seconds"] = {"recovery": found["seconds"]}
        row["peak_memory_bytes"] = peak_memory()
        return row

    def shelve(self) -> Path:
        """The folder that ``shards`` names from now on, empty."""
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
