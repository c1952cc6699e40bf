"""Multiple choice from held-out text: which words really come next?

An item is a sentence that is cut inside, some sentences before it, and four choices of CHOSEN words
for what follows the cut. The three wrong choices are cut alike from other sentences of the same
document, so subject and style do not give the answer away. No choice stands in a calibration text:
topics of CPython's help quote each other, and more than half of the items would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHOICES = 4
CHOSEN = 12  # words of each choice
CONTEXT = (30, 90)  # words before the cut, in whole sentences but for the last
BEGUN = 4  # words of its own sentence that a cut leaves before it, at least
ITEMS = 100  # of one source

_END = re.compile(r"[.!?][\"')\]]* (?=[\"'(]*[A-Z])")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Gen|Sen|Lt|Col|Capt|Prof|Rev|Jr|Sr|No|vs|ca?|cf|e\.g|i\.e)\. $"
)
_LEAST = 8  # words of a paragraph of prose; headings and list marks have fewer

Item = dict[str, Any]


def make_items(held_out: list[str], calibration: list[str], most: int = ITEMS) -> list[Item]:
    """Return at most that many items, spread evenly over the documents.

    An item has its document's number, ``context``, ``choices`` and ``answer``, the place of the
    right choice, which goes round. The same texts always make the same items.
    """
    known = plain(" ".join(calibration))
    found: dict[str, tuple[int, str, list[str]]] = {}  # by the right choice: none is asked twice
    for number, document in enumerate(held_out):
        cuts = [cut for cut in _cuts(document) if cut[1] not in known]
        every = list(dict.fromkeys(continuation for _, continuation in cuts))
        for context, continuation in cuts:
            wrong = _others(every, continuation, context)
            if CONTEXT[0] <= len(context.split()) <= CONTEXT[1] and len(wrong) == CHOICES - 1:
                found.setdefault(continuation, (number, context, wrong))
    count = min(most, len(found))
    items = []
    for i in range(count):
        continuation = list(found)[i * len(found) // count]
        number, context, wrong = found[continuation]
        answer = i % CHOICES
        choices = [*wrong[:answer], continuation, *wrong[answer:]]
        items.append({"document": number, "context": context, "choices": choices, "answer": answer})
    return items


def write_items(
    folder: Path, held_out: list[Path], calibration: list[Path], most: int = ITEMS
) -> dict[str, int]:
    """Write each source's items as ``SOURCE.jsonl``; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    known = [text for path in calibration for text in texts_of(path)]
    counts = {}
    for path in held_out:
        items = make_items(texts_of(path), known, most)
        lines = (json.dumps(item) + "\n" for item in items)
        (folder / path.name).write_text("".join(lines), encoding="utf-8")
        counts[path.stem] = len(items)
    return counts


def plain(text: str) -> str:
    """Return a text with single spaces for all its white space."""
    return " ".join(text.split())


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _others(every: list[str], right: str, context: str) -> list[str]:
    """Return continuations of other sentences, from all over the document."""
    shown = plain(context)
    others = [words for words in every if words != right and words not in shown]
    if len(others) < CHOICES - 1:
        return []
    start = every.index(right)
    return [others[(start + i * len(others) // CHOICES) % len(others)] for i in range(1, CHOICES)]


def _cuts(document: str) -> Iterator[tuple[str, str]]:
    """Yield context and continuation for each sentence that is long enough to be cut."""
    for passage in _passages(document):
        for i, (text, join) in enumerate(passage):
            words = text.split()
            start = max(BEGUN, (len(words) - CHOSEN) // 2)
            # Words are left after each choice as well, or its full stop would set it apart.
            if len(words) < BEGUN + CHOSEN + BEGUN:
                continue
            context = " ".join(words[:start])
            for earlier, its_join in reversed(passage[:i]):
                if len(context.split()) >= CONTEXT[0]:
                    break
                context, join = earlier + join + context, its_join
            yield context, " ".join(words[start : start + CHOSEN])


def _passages(document: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the sentences between headings, code and tables, and what joins each to the last."""
    passage: list[tuple[str, str]] = []
    for text in map(plain, re.split(r"\n\s*\n", document)):
        if _is_prose(text):
            joins = ["\n\n", *" " * text.count(" ")]
            passage += zip(_sentences(text), joins, strict=False)
        elif passage:
            yield passage
            passage = []
    if passage:
        yield passage


def _is_prose(paragraph: str) -> bool:
    code = paragraph.startswith(">>>") or "::=" in paragraph or "**" in paragraph
    return len(paragraph.split()) >= _LEAST and paragraph[-1] in ".!?\"')" and not code


def _sentences(paragraph: str) -> list[str]:
    found, start = [], 0
    for match in _END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[start : match.end()]):
            found.append(paragraph[start : match.end() - 1])
            start = match.end()
    return [*found, paragraph[start:]]
