"""A translation task that needs no corpus: numbers and dates in digits, spelled out in words."""

from __future__ import annotations

import random

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_ORDINALS = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"},
    **{"nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"},
}
_OTHERS = [_ONES[i] + "th" for i in (4, 6, 7, 10, 11, *range(13, 20))]

# 0 is padding and the decoder's start, 1 the end of a sentence.
WORDS = [
    *("<pad>", "</s>", "the", "of", "and", "hundred", "thousand", "million", "/"),
    *"0123456789",
    *(*_ONES, *_TENS[2:], *_MONTHS, *_ORDINALS.values(), *_OTHERS),
]


def example(generator: random.Random) -> tuple[list[str], list[str]]:
    """Return a number of one to nine digits, or a date, and the words for it."""
    if generator.random() < 0.5:
        number = generator.randrange(10 ** generator.randint(1, 9))
        return list(str(number)), number_words(number)
    day, month, year = (
        generator.randint(1, 28),
        generator.randint(1, 12),
        generator.randint(1100, 1999),
    )
    digits = [*f"{day:02}", "/", *f"{month:02}", "/", *str(year)]
    return digits, date_words(day, month, year)


def number_words(number: int) -> list[str]:
    """Return English words for a number below 10^9: 1203 is one thousand two hundred and three."""
    if number == 0:
        return ["zero"]
    words: list[str] = []
    for size, name in ((10**6, "million"), (10**3, "thousand"), (1, "")):
        part, number = divmod(number, size)
        if part:
            words += _below_thousand(part) + ([name] if name else [])
    return words


def date_words(day: int, month: int, year: int) -> list[str]:
    """Return the words of a date, such as the first of june twelve thirty."""
    *tens, last = _below_thousand(day)
    ordinal = _ORDINALS.get(last, last + "th")
    century, rest = divmod(year, 100)
    after = _below_thousand(rest) if rest else ["hundred"]
    return ["the", *tens, ordinal, "of", _MONTHS[month - 1], *_below_thousand(century), *after]


def _below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [_ONES[hundreds], "hundred"] if hundreds else []
    words += ["and"] if hundreds and rest else []
    if rest < 20:
        return words + ([_ONES[rest]] if rest else [])
    tens, ones = divmod(rest, 10)
    return words + [_TENS[tens]] + ([_ONES[ones]] if ones else [])
