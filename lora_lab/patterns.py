r"""Regular expressions of requests and of adapters' files, refused by their form where they could take for ever.

Python's engine tries every way to share a text out among the parts of an expression: ``(.+)+x`` has 2 ** n of them on n characters, ``.*.*.*x``
about n ** 3 / 6. Counted before it is run, on a path of PATH characters:

    a  [a-z]  \d  .  ^          one way; what is in a group, as the group
    x*  x+  x{2,}               free; k of them one after another share the path in (PATH + k over k) ways
    x?  x{1,3}                  as many ways as it can be there
    (q|k|v)                     choices that begin with the same letter, or with none, count; the others exclude each other
    (...)*  of several ways     that many for every turn: refused, as are \1 and (?P=name), whatever they cost

Up to four free parts and a few choices are read: ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$" is one of 50,000 ways.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections import Counter
from typing import Any

from .errors import LoraLabError

PATH = 64  # characters: few modules' paths are longer
MOST_WAYS = 5_000_000
LONGEST = 1_000_000  # characters of an expression; those that `save` writes name every layer, where nothing shorter does
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
ALONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "RANGE", "CATEGORY", "NEGATE")
Ways = tuple[int, int]  # free parts, and the product of the others
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def compile_pattern(pattern: str, where: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """The expression, ready; with `before` and `after` it has to be one without them, too.

    Raises LoraLabError for what is none, and for one of too many ways. where: what it was given as.
    """
    try:
        alone = _checked(pattern)
        return _checked(f"{before}{pattern}{after}") if before or after else alone
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise LoraLabError(f"{where}={pattern!r:.200} is not a regular expression: {error}") from None
    except LoraLabError as error:
        raise LoraLabError(f"{where}={pattern!r:.200} {error}") from None


def at_the_end(key: str, where: str = "pattern") -> re.Pattern[str]:
    """PEFT's rule for a key of rank_pattern and alpha_pattern: it matches the end of a path, from a dot on."""
    return compile_pattern(key, where, r"(.*\.)?(", ")$")


@functools.lru_cache(maxsize=16_384)
def _checked(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST:
        raise LoraLabError(f"has {len(pattern):,} characters, expected {LONGEST:,} at most")
    compiled = re.compile(pattern)
    if _total(_ways(_parser.parse(pattern))) > MOST_WAYS:
        raise LoraLabError(f"could be tried in more than {MOST_WAYS:,} ways on one path: a repetition inside a repetition, or too many of them; "
                           "list the names, or write '.*' once for all that may stand there")  # fmt: skip
    return compiled


def _total(ways: Ways) -> int:
    free, others = ways
    return math.comb(PATH + free, free) * others


def _ways(sequence: Any) -> Ways:
    """Of parts one after another."""
    free, others = 0, 1
    for kind, value in sequence:
        more, times = _part(str(kind), value)
        free, others = min(free + more, PATH), min(others * times, MOST_WAYS + 1)
    return free, others


def _part(kind: str, value: Any) -> Ways:
    if kind in ALONE:
        return 0, 1
    if kind in REPEATS:
        return _repeated(*value)
    if kind == "BRANCH":
        return _choice(value[1])
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(value[-1])
    if kind == "ATOMIC_GROUP":
        return _ways(value)
    raise LoraLabError("refers back to a group, or has another part that is not read here")


def _repeated(low: int, high: int, body: Any) -> Ways:
    turns = min(int(high), PATH) - min(int(low), PATH)
    free, others = _ways(body)
    if high == 1:
        return free, others * (1 + turns)
    if (free, others) != (0, 1):
        return 0, min(_total((free, others)) ** min(int(high), PATH) * (1 + turns), MOST_WAYS + 1)
    return (1, 1) if turns > 3 else (0, 1 + turns)


def _choice(branches: Any) -> Ways:
    ways = [_ways(branch) for branch in branches]
    begins = [_first_letter(branch) for branch in branches]
    together = begins.count(None) + max(Counter(letter for letter in begins if letter is not None).values(), default=0)
    return max(free for free, _ in ways), together * max(others for _, others in ways)


def _first_letter(branch: Any) -> str | None:
    for kind, value in branch:
        return chr(value).lower() if str(kind) == "LITERAL" else None
    return None
