"""Porter's stemmer: "connected", "connecting" and "connection" become "connect".

M. F. Porter 1980, An algorithm for suffix stripping, Program 14(3); the steps have the paper's numbers. With the changes of NLTK's version
of it (mode NLTK_EXTENSIONS), which the `rouge-score` package uses: irregular words, "dies" -> "die", "y" after a consonant only.
"""

from __future__ import annotations

import functools

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning", "inning": "inning",
    "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
# (suffix, what takes its place); the first that the word ends with decides
STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"), ("alli", "al"),
    ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"), ("ator", "ate"), ("alism", "al"),
    ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
STEP_3 = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
STEP_4 = tuple((suffix, "") for suffix in ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ou", "ism", "ate", "iti",
                                           "ous", "ive", "ize"))  # fmt: skip


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of a word in small letters; it need not be a word.

    >>> [stem(word) for word in ("connections", "happily", "relational", "hopping", "dies")]
    ['connect', 'happili', 'relat', 'hop', 'die']
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _past_and_progressive(_plural(word))
    if word.endswith("y") and len(word) > 2 and _letters(word)[-2] == "c":  # step 1c
        word = word[:-1] + "i"
    return _tidied(_step_4(_replaced(_step_2(word), STEP_3, 0)))


def _letters(word: str) -> str:
    """"c" for each consonant, "v" for each vowel; y is a vowel after a consonant.

    >>> _letters("syzygy"), _letters("toy")
    ('cvcvcv', 'cvc')
    """
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds[-1:] == "c")
        kinds += "v" if vowel else "c"
    return kinds


def _measure(stem: str) -> int:
    """m, how often a consonant follows a vowel: about the syllables.

    >>> [_measure(word) for word in ("tree", "oats", "private")]
    [0, 1, 2]
    """
    return _letters(stem).count("vc")


def _ends_cvc(stem: str) -> bool:
    """*o: consonant, vowel, consonant other than w, x and y; or all of it is a vowel and a consonant."""
    kinds = _letters(stem)
    return (kinds.endswith("cvc") and stem[-1] not in "wxy") or kinds == "vc"


def _replaced(word: str, rules: tuple[tuple[str, str], ...], least: int) -> str:
    """By the first rule whose suffix the word has, where the rest's measure is above `least`."""
    for suffix, new in rules:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            return rest + new if _measure(rest) > least else word
    return word


def _plural(word: str) -> str:
    """Step 1a."""
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past_and_progressive(word: str) -> str:
    """Step 1b."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        rest = word[: -len(suffix)]
        if word.endswith(suffix) and "v" in _letters(rest):
            return _with_its_end(rest)
    return word


def _with_its_end(stem: str) -> str:
    """hop(p)ing, fil(e)ing: the letter that the ending added goes, the one it took comes back."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _letters(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_cvc(stem) else stem


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replaced(word, STEP_2, 0)


def _step_4(word: str) -> str:
    if word.endswith("ion"):
        return word[:-3] if _measure(word[:-3]) > 1 and word[-4] in "st" else word
    return _replaced(word, STEP_4, 1)


def _tidied(word: str) -> str:
    """Steps 5a and 5b."""
    if word.endswith("e"):
        size = _measure(word[:-1])
        word = word[:-1] if size > 1 or (size == 1 and not _ends_cvc(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
