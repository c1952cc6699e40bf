"""Three amounts of work, each by one word: how much text is read, and whether shapes are tried."""

from __future__ import annotations

from dataclasses import dataclass

# Nothing here imports torch: the parser needs the words.

DEFAULT = "balanced"


@dataclass(frozen=True)
class Preset:
    """What a word means where no option says otherwise.

    Attributes:
        windows: of calibration text, by the type of the device.
        search: whether the shape that spends ``--params`` best is looked for.
    """

    windows: dict[str, int]
    search: bool = True


PRESETS = {
    "fast": Preset({"cpu": 12, "cuda": 96}, search=False),
    DEFAULT: Preset({"cpu": 32, "cuda": 384}),
    "best": Preset({"cpu": 128, "cuda": 1536}),
}
