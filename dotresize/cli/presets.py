"""Three amounts of work, each by one word: how much text is read, and whether shapes are tried."""

from __future__ import annotations

from dataclasses import dataclass

# Nothing here imports torch: the parser needs the words.

DEFAULT = "balanced"

# What ``merge-ff`` reads where no option says otherwise: of a language model so many windows of
# text, of which the second number choose the layers; of other models so many labelled examples to
# align by, and at most so many to score on.
MERGE_WINDOWS, SELECT_WINDOWS = 20, 4
EXAMPLES, EVAL_EXAMPLES = 128, 1000


@dataclass(frozen=True)
class Preset:
    """What a word means where no option says otherwise.

    Attributes:
        windows: of calibration text, by the type of the device.
        search: as the option of that name in ``narrow.options.Options``.
    """

    windows: dict[str, int]
    search: bool | None = None


PRESETS = {
    "fast": Preset({"cpu": 24, "cuda": 96}),
    DEFAULT: Preset({"cpu": 56, "cuda": 384}),
    "best": Preset({"cpu": 96, "cuda": 1536}, search=True),
}
