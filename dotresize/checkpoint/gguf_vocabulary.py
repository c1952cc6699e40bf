"""A tokenizer as llama.cpp reads it: pieces, their kinds, merges or scores, and how text is split.

llama.cpp does not read tokenizer.json. It has two kinds of byte-pair encoding: "gpt2", on bytes,
with merges in order and a splitting rule known by its name; and "llama", SentencePiece's, where
of all neighbours the pair with the highest score becomes one piece. A score is here minus the rank
of the first merge that makes the piece, which gives the same order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dotresize.calibration.text import added_around

# The splitting rules that llama.cpp has names for, by the regular expression of tokenizer.json.
_RULES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
CONVERTER = "llama.cpp's convert_hf_to_gguf.py may take it"
# Rules by which a word that is in the vocabulary is one token, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "tekken")
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        rule: name of the splitting rule; None where nothing is split.
        pieces: of every token id, as text.
        kinds: of every token id, gguf.TokenType.
        merges: "left right" in order; none for "llama".
        scores: of every token id; none for "gpt2".
        prefixed: whether a space is put in front of a text.
        first, last: the tokens that ``tokenizer(text)`` puts around a text, None for none.
    """

    model: str
    rule: str | None
    pieces: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    prefixed: bool
    first: int | None
    last: int | None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer, filled up to the model's ``size``.

    Raises ValueError for one that llama.cpp has no form for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__}: must be one with a tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: is {model['type']}, must be BPE; {CONVERTER}")
    tokens = dict(model["vocab"]) | {t["content"]: t["id"] for t in described["added_tokens"]}
    if max(tokens.values()) >= size:
        raise ValueError(
            f"tokenizer: has a token {max(tokens.values())}, the model's vocabulary is {size}"
        )
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    by_bytes = not model.get("byte_fallback")
    pieces, kinds = _pieces(tokens, described["added_tokens"], size, by_bytes=by_bytes)
    first, last = added_around(tokenizer)
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        rule=_rule(described) if by_bytes else None,
        pieces=pieces,
        kinds=kinds,
        merges=[" ".join(pair) for pair in merges] if by_bytes else [],
        scores=[] if by_bytes else _scores(merges, tokens, size),
        prefixed=not by_bytes and _prefixed(described),
        first=first,
        last=last,
    )


def _pieces(
    tokens: dict[str, int], added: list[dict[str, Any]], size: int, *, by_bytes: bool
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    pieces = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for piece, i in tokens.items():
        pieces[i], kinds[i] = piece, int(TokenType.NORMAL)
        if not by_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            kinds[i] = int(TokenType.BYTE)
    for token in added:
        i = token["id"]
        control = token["special"] or _looks_special(token["content"])
        kinds[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        if not control:  # these are looked for in the text as it was written
            pieces[i] = token["content"].replace(_SPACE, " ")
    return pieces, kinds


def _looks_special(piece: str) -> bool:
    """Return whether a token is one of control though its tokenizer does not say so."""
    return piece.startswith("<|") and piece.endswith("|>")


def _scores(merges: list[list[str]], tokens: dict[str, int], size: int) -> list[float]:
    """Return scores that merge in the order of ``merges``; pieces that none makes come last."""
    scores = [-1e9] * size
    for rank, (left, right) in reversed(list(enumerate(merges))):
        made = tokens.get(left + right)
        if made is not None:
            scores[made] = -float(rank)
    return scores


def _rule(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of a splitting rule; ValueError where it has none."""
    steps = _steps(described["pre_tokenizer"])
    name = _known(steps)
    whole_words = described["model"].get("ignore_merges", False)
    if name is not None and whole_words != (name in _WHOLE_WORDS):
        raise ValueError(
            f"tokenizer: ignore_merges is {whole_words}, which llama.cpp's {name} is not; "
            f"{CONVERTER}"
        )
    if name is None:
        kinds = " and ".join(step["type"] for step in steps)
        known = ", ".join(sorted({"gpt-2", "smollm", *_RULES.values()}))
        raise ValueError(
            f"tokenizer: splits text by {kinds or 'no rule'} of its own, which is not among "
            f"{known}; {CONVERTER}"
        )
    return name


def _known(steps: list[dict[str, Any]]) -> str | None:
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, own = steps[:-1], steps[-1].get("use_regex", True)
    if own and not before:
        return "gpt-2"
    if own and [(s["type"], s.get("individual_digits")) for s in before] == [("Digits", True)]:
        return "smollm"
    if own or [s["type"] for s in before] != ["Split"] or before[0].get("invert"):
        return None
    return _RULES.get(before[0]["pattern"].get("Regex", ""))


def _prefixed(described: dict[str, Any]) -> bool:
    """Return whether a space is put in front of a text, by the normalizer or the pre-tokenizer."""
    return '"Prepend"' in json.dumps(described["normalizer"]) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(described["pre_tokenizer"])
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])
