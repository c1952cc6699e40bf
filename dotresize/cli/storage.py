"""``--dtype``: the type in which the weights of a result are stored.

What a quantised file holds is known to few bits; in float32 it would fill eight times its size with
nothing. Its result is stored in bfloat16, if that changes no prediction worth mentioning.
"""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import torch

from dotresize.cli.texts import Texts
from dotresize.evaluate import Predictions, quality
from dotresize.models.bfloat16 import set_types
from dotresize.models.causal_lm import CausalLM

logger = logging.getLogger("dotresize")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Mean KL between the predictions before and after rounding, in nats, on this many tokens at the
# beginning of each text: it is much the same on all.
MOST_KL = 1e-3
TOKENS = 256


def check_dtype(name: str) -> None:
    """Raise ValueError for a type that is none of those."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype {name}: must be auto, {', '.join(DTYPES)}")


class Storage:
    """The type that a run's result is stored in.

    Attributes:
        dtype: None for that of the model.
    """

    def __init__(
        self, asked: str, *, quantised: bool, texts: Texts, model: CausalLM | None = None
    ) -> None:
        """Take what was asked for.

        quantised: whether the model was, before it was read; model: whose config names the type
        that its weights had then.
        """
        self.dtype = DTYPES.get(asked)
        self._decide = asked == "auto" and quantised
        if asked == "auto" and not quantised and model is not None and model.store.whole:
            stored = getattr(model.config, "dtype", None)
            if stored in (torch.bfloat16, torch.float16):
                self.dtype = stored
        self._windows = [windows[:1, :TOKENS] for windows in texts.windows.values()]

    @torch.no_grad()
    def round(self, model: CausalLM, row: dict[str, Any]) -> None:
        """Round a model's weights to the type, in place, and say so in its report.

        They stay in the type that the model computes in, until ``cast``.
        """
        kl = None
        if self._decide:
            self.dtype, kl = self._decided(model)
        elif self.dtype == torch.float16 and _overflows(model):
            logger.warning("float16: some weights are too large for it; stored as bfloat16")
            self.dtype = torch.bfloat16
        if self.dtype is not None and model.store.whole:
            _round(model, self.dtype)
        kept = next(model.module.parameters()).dtype if self.dtype is None else self.dtype
        row["stored"] = {"dtype": str(kept).removeprefix("torch."), "kl_of_rounding": kl}

    def cast(self, model: CausalLM) -> None:
        """Give a model's weights the type, in place."""
        if self.dtype is not None and model.store.whole:
            set_types(model.module, {}, self.dtype)

    def _decided(self, model: CausalLM) -> tuple[torch.dtype, float | None]:
        if not self._windows:
            return torch.float32, None
        rounded = model.copied()
        _round(rounded, torch.bfloat16)
        total = count = 0.0
        for windows in self._windows:
            with closing(Predictions(model, windows, desc="float32")) as exact:
                found = quality(rounded, exact, desc="bfloat16").kl
                assert found is not None
            total, count = total + found * windows.numel(), count + windows.numel()
        kl = total / count
        kept = torch.bfloat16 if kl <= MOST_KL else torch.float32
        logger.info(
            "weights are stored as %s: rounded to bfloat16, the KL to the float32 predictions is "
            "%.1e nats",
            *(str(kept).removeprefix("torch."), kl),
        )
        return kept, kl


@torch.no_grad()
def _round(model: CausalLM, dtype: torch.dtype) -> None:
    for weight in model.module.parameters():
        weight.copy_(weight.to(dtype))


def _overflows(model: CausalLM) -> bool:
    most = torch.finfo(torch.float16).max
    return any(not w.is_meta and bool(w.abs().max() > most) for w in model.module.parameters())
