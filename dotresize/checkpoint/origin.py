"""Where a model came from, for the card of what is made of it: its hub id and its licence."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotresize.checkpoint.source import snapshot

# What a card's metadata say of a licence.
_LICENCE = ("license", "license_name", "license_link")
# Files of a model directory that go with its weights wherever they go.
_PASSED_ON = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Origin:
    """What is known of a model's source.

    Attributes:
        hub_id: "organisation/name"; None where the source is local and does not say.
        licence: entries of a card's metadata.
        files: licence texts beside the model.
    """

    hub_id: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def copy_files(self, folder: Path) -> None:
        """Copy the licence texts into a directory."""
        for path in self.files:
            shutil.copyfile(path, folder / path.name)


def origin_of(source: str) -> Origin:
    """Return what a model's directory, .gguf file or hub id says of where it came from."""
    path = Path(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _of_gguf(path)
    if not path.exists():
        return Origin(source, _metadata(_downloaded_card(source)))
    folder = snapshot(path)
    cache = next((p for p in (folder, *folder.parents) if p.name.startswith("models--")), None)
    hub_id = None if cache is None else "/".join(cache.name.split("--")[1:])
    files = [f for pattern in _PASSED_ON for f in sorted(folder.glob(pattern)) if f.is_file()]
    return Origin(hub_id, _metadata(folder / "README.md"), tuple(files))


def _of_gguf(path: Path) -> Origin:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    named = {
        key: str(fields[f"general.{name}"].contents())
        for key, name in (
            ("license", "license"),
            ("license_name", "license.name"),
            ("license_link", "license.link"),
            ("url", "source.url"),
        )
        if f"general.{name}" in fields
    }
    url = named.pop("url", "")
    _, hub, hub_id = url.partition("https://huggingface.co/")
    return Origin(hub_id.strip("/") if hub and hub_id.count("/") == 1 else None, named)


def _downloaded_card(hub_id: str) -> Path | None:
    """Return a hub model's card, as far as the hub or its cache gives it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "README.md"))
    except Exception:  # a card is welcome, and no reason to stop
        return None


def _metadata(card: Path | None) -> dict[str, Any]:
    if card is None or not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) or {}
    except Exception:  # a card that cannot be read says nothing
        return {}
    return {name: found[name] for name in _LICENCE if isinstance(found.get(name), (str, list))}
