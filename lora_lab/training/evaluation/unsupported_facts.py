"""Wrong facts that can be seen without understanding: numbers that nobody said, and names that nobody bears.

    unsupported_facts("Zora bought 3 spiders.", "Ben: I bought two spiders.", ordinary)      ["3", "Zora"]

Both ways it is an estimate. Who did what to whom is not seen; and a right text may have a sum that its writer did in her head. So the count of right
texts belongs beside that of a model's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator

from ...data.formats import BUNDLED, load

SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
         "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
FIRST = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
         *(f"{word}th" for word in SMALL[13:]))  # fmt: skip
MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december")
CARDINALS = {**{word: value for value, word in enumerate(SMALL)}, **{word: 10 * value for value, word in enumerate(TENS, start=2)}}
OTHERS = {**{word: value for value, word in enumerate(FIRST, start=1)}, **{f"{word[:-1]}ieth": CARDINALS[word] for word in TENS},
          **{word: value for value, word in enumerate(MONTHS, start=1)}, "once": 1, "twice": 2}  # fmt: skip
TIMES = {"hundred": 100, "thousand": 1000}
MOST_DIGITS, MOST_WORDS = 100, 40  # of one number: a longer run is read as several
TITLES = {"dr", "mr", "mrs", "ms"}


def unsupported_facts(text: str, source: str, ordinary: Collection[str]) -> list[str]:
    """The numbers and the names of `text` that `source` has not, however they are spelled there.

    ordinary: words in small letters that are no names, though a sentence may begin with them: see `ordinary_words`.

    >>> unsupported_facts("On 07/29/2008 Dr. Wu saw a 55-year-old.", "Doctor Wu: July twenty ninth two thousand eight. You are fifty five?", {"on"})
    []
    >>> unsupported_facts("Zora bought three spiders from Wu.", "Wu: I bought two spiders.", {"bought", "spiders"})
    ['3', 'Zora']
    """
    said = _may_mean(source)
    numbers = [number for number in dict.fromkeys(_stated(text)) if number not in said]
    known = {*re.findall(r"[^\W\d_]+", source.lower())} | TITLES
    names = [name for name in dict.fromkeys(re.findall(r"\b[A-Z][a-z]+\b", text)) if name.lower() not in known and name.lower() not in ordinary]
    return [*map(str, numbers), *names]


def ordinary_words(texts: Iterable[str]) -> frozenset[str]:
    """Words that stand in small letters in these texts, or in the bundled data."""
    return _small(" ".join(texts)) | _bundled()


@functools.cache
def _bundled() -> frozenset[str]:
    return _small(" ".join(str(row) for name in BUNDLED for part in load(name) for row in part or ()))


def _small(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b[a-z]+\b", text))


# Numbers ----------------------------------------------------------------------------------------------------------------------


def _stated(text: str) -> Iterator[int]:
    """In digits, each group of them one; in words, as they are read together. "one" alone is seldom a number.

    >>> [*_stated("Half past ten, 98.6, 1,200, twenty-six, two thousand and eight, and one more")]
    [98, 6, 1200, 10, 26, 2008]
    """
    yield from _digits(text)
    for run in _runs(text, CARDINALS):
        if run != ["one"]:
            yield [*_read(run, CARDINALS)][-1]


def _may_mean(text: str) -> set[int]:
    """Every number that someone who heard this could have written down: a run of words, and any part of it.

    >>> sorted(_may_mean("nineteen ninety eight"))
    [8, 19, 90, 98, 1990, 1998]
    """
    words = {**CARDINALS, **OTHERS}
    parts = (run[start:] for run in _runs(text, words) for start in range(len(run)))
    return {*_digits(text)} | {value for part in parts for value in _read(part, words)}


def _digits(text: str) -> Iterator[int]:
    yield from map(int, re.findall(rf"\d{{1,{MOST_DIGITS}}}", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)))


def _runs(text: str, words: Collection[str]) -> list[list[str]]:
    """The number words of a text that stand together; "and" may stand behind hundred and thousand."""
    found: list[list[str]] = [[]]
    tokens = re.findall(r"[a-z]+|[^a-z\s-]", text.lower())
    for index, token in enumerate(tokens):
        if token in words or token in TIMES:
            found[-1].append(token)
        elif token != "and" or tokens[index - 1] not in TIMES:
            found.append([])
    return [run[start : start + MOST_WORDS] for run in found for start in range(0, len(run), MOST_WORDS)]


def _read(run: list[str], words: dict[str, int]) -> Iterator[int]:
    """The value after each word: twenty six is 26, two hundred five 205, and what does not add up is said digit by digit: one thirty 130."""
    value = 0
    for place, word in enumerate(run):
        if word in TIMES:
            last = value % TIMES[word]
            value += (last or 1) * TIMES[word] - last
        elif place and value % 10 ** len(str(words[word])) == 0 and words[word]:
            value += words[word]
        else:
            value = int(f"{value}{words[word]}") if place else words[word]
        yield value
