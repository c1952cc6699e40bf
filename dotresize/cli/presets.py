"""Three amounts of work, each by one word: how much text is read, and whether shapes are tried."""

from __future__ import annotations

from dataclasses import dataclass

# Nothing here imports torch: the parser needs the words.

DEFAULT = "balanced"

# Of ``merge-ff``: windows of a language model's calibration, and those that choose the layers;
# labelled examples to align by, and to score on at most.
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
    DEFAULT: Preset({"cpu": 64, "cuda": 384}),
    "best": Preset({"cpu": 384, "cuda": 1536}, search=True),
}
