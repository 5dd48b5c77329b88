r"""Regular expressions of requests and of adapters' files, refused by their form where they could take for ever.

Python's engine tries every way to share a text out among the parts of an expression: ``(.+)+x`` has 2 ** n of them on n characters, ``.*.*.*x``
about n ** 3 / 6. Counted before it is run, on a path of PATH characters:

    a  [a-z]  \d  .  ^          one way; what is in a group, as the group
    x*  x+  x{2,}               free; k of them one after another share the path in (PATH + k over k) ways
    x?  x{1,3}                  as many ways as it can be there
    (self_attn|attention|mlp)   choices of which one's first letters begin the other's add up; the others exclude each other
    (...)*  of several ways     that many for every turn: refused, as are \1 and (?P=name), whatever they cost

Up to four free parts and a few choices are read: ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$" is one of 50,000 ways. The keys of a
rank_pattern and an alpha_pattern are all tried on every path, so theirs are added up.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from typing import Any

from .errors import LoraLabError

PATH = 64  # characters: few modules' paths are longer
MOST_WAYS = 20_000_000
MOST_OF_ALL = 10 * MOST_WAYS  # of the keys of a configuration: 800,000 names, or 20,000 like r"layers\.3\..*q_proj"
LONGEST = 8_000_000  # characters of an expression; those that `save` writes name every layer, where nothing shorter does
LONGEST_KEY, KEPT = 20_000, 300  # of one that stands for a module's name; of one that is compiled once for many paths
WAYS_TO_COMPILE = 2_000  # of each character of a longer key, which is compiled again and again
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
ALONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "RANGE", "CATEGORY", "NEGATE")
ENDS = (r"(.*\.)?(", ")$")
Ways = tuple[int, int]  # free parts, and the product of the others
_NEW = sys.version_info >= (3, 11)
_parser: Any = importlib.import_module("re._parser" if _NEW else "sre_parse")
_compiler: Any = importlib.import_module("re._compiler" if _NEW else "sre_compile")  # re.compile would keep 512 of them, however long


def compile_pattern(pattern: str, where: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """The expression, ready; with `before` and `after` it has to be one without them, too.

    Raises LoraLabError for what is none, and for one of too many ways. where: what it was given as.
    """
    try:
        alone, _ = _checked(pattern, LONGEST_KEY if before or after else LONGEST)
        return _checked(f"{before}{pattern}{after}")[0] if before or after else alone
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise LoraLabError(f"{where}={pattern!r:.200} is not a regular expression: {error}") from None
    except LoraLabError as error:
        raise LoraLabError(f"{where}={pattern!r:.200} {error}") from None


def at_the_end(key: str, where: str = "pattern") -> re.Pattern[str]:
    """PEFT's rule for a key of rank_pattern and alpha_pattern: it matches the end of a path, from a dot on."""
    return compile_pattern(key, where, *ENDS)


def ways_with(key: str, where: str, ways: int) -> int:
    """The ways of a configuration's keys so far, and of this one `at_the_end`. Raises LoraLabError where they are too many together."""
    at_the_end(key, where)
    ways += _checked(f"{ENDS[0]}{key}{ENDS[1]}")[1] + (WAYS_TO_COMPILE * len(key) if len(key) > KEPT else 0)
    if ways > MOST_OF_ALL:
        raise LoraLabError(f"{where}: its keys could be tried in more than {MOST_OF_ALL:,} ways on one path; name the layers instead, without '.*'")
    return ways


def _checked(pattern: str, longest: int = LONGEST) -> tuple[re.Pattern[str], int]:
    """The expression and its ways. Short ones are kept, as they are tried on path after path; a long one lives as long as it is used."""
    if len(pattern) > longest:
        raise LoraLabError(f"has {len(pattern):,} characters, expected {longest:,} at most")
    if len(pattern) <= KEPT:
        return _short(pattern)
    return _longer(pattern) if len(pattern) <= 2 * LONGEST_KEY else _read(pattern)


def _read(pattern: str) -> tuple[re.Pattern[str], int]:
    compiled: re.Pattern[str] = _compiler.compile(pattern)
    if (ways := _total(_ways(_parser.parse(pattern)))) > MOST_WAYS:
        raise LoraLabError(f"could be tried in more than {MOST_WAYS:,} ways on one path: a repetition inside a repetition, or too many of them; "
                           "list the names, or write '.*' once for all that may stand there")  # fmt: skip
    return compiled, ways


_short, _longer = functools.lru_cache(maxsize=16_384)(_read), functools.lru_cache(maxsize=8)(_read)


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
    """In alphabetical order of their beginnings, those that a branch shares a path with stand right before it."""
    ways = [_ways(branch) for branch in branches]
    most, chain = 0, [("", 0)]
    for begins, (_, others) in sorted(zip(map(_beginning, branches), ways, strict=True)):
        while not begins.startswith(chain[-1][0]):
            chain.pop()
        chain.append((begins, chain[-1][1] + others))
        most = max(most, chain[-1][1])
    return max(free for free, _ in ways), most


def _beginning(branch: Any) -> str:
    """The letters that a branch must begin with, up to the first that may stand for another where case is ignored, as the Kelvin sign does for k."""
    letters = []
    for kind, value in branch:
        if str(kind) != "LITERAL" or value > 127:
            break
        letters.append(chr(value).lower())
    return "".join(letters)
