"""OUT.recovery: what a recovery that was interrupted goes on from, until OUT is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize import checkpoint
from dotresize.inputs import already_done
from dotresize.recovery import check, recover


class RecoveryFolder:
    """The training-free model with its reports, and beside it the state of the training.

    Attributes:
        path: beside the output directory.
        begun: whether an earlier run with the same settings has left something.
    """

    def __init__(self, out: str, settings: dict[str, Any], *, resume: bool) -> None:
        """ValueError where a recovery of other settings, or one not to be resumed, lies there."""
        check()
        self.path = Path(f"{out}.recovery")
        if self.path.exists() and not resume:
            raise ValueError(
                f"{self.path}: holds an unfinished recovery; go on with --resume, or remove it"
            )
        self._settings = settings
        self._narrow = self.path / "narrow"
        self.begun = already_done(str(self._narrow), settings)
        if not self.begun:
            _clear(self.path)
            checkpoint.check_output(self.path)

    def keep(self, narrow: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
        record = {"settings": self._settings, "rows": rows}

        def fill(folder: Path) -> None:
            checkpoint.save(narrow, tokenizer, folder)
            (folder / "dotresize.json").write_text(json.dumps(record), encoding="utf-8")

        checkpoint.write_whole(self._narrow, fill)

    def kept(self, device: torch.device) -> tuple[Any, list[dict[str, Any]]]:
        """What ``keep`` was given: model and reports."""
        narrow, _ = checkpoint.load(str(self._narrow), device, to_narrow=False)
        record = json.loads((self._narrow / "dotresize.json").read_text(encoding="utf-8"))
        return narrow, record["rows"]

    def recovered(
        self, dense: Any, narrow: Any, tokens: Tensor, free: dict[str, Any], *, seed: int
    ) -> dict[str, Any]:
        """Trains ``narrow`` in place; its report, with the training-free one's figures apart."""
        found = recover(dense, narrow, tokens, folder=self.path / "training", seed=seed)
        row = {name: value for name, value in free.items() if name != "figures"}
        row["recovery"] = found
        row["training_free"] = {"perplexity": free["perplexity"], "seconds": free["seconds"]}
        row["seconds"] = {"recovery": found["seconds"]}
        return row

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _clear(path: Path) -> None:
    """Removes the folder of a run that was killed before it had anything to keep."""
    if path.is_dir() and all(entry.name.startswith(checkpoint.PARTIAL) for entry in path.iterdir()):
        shutil.rmtree(path)
