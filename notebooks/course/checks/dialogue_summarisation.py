"""The exercises of notebook 06, dialogue summarisation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_lab import data
from lora_lab.training import rouge

from . import check, equal, expect, number, refuse, result

# 1: runs of words ----------------------------------------------------------------------------------------------------------------

ANSWER, REFERENCE = "The door and the cat and the cat", "On the mat, by a door, sat the cat."  # common: the, the, door, cat; of 8 and of 9


@check
def rouge_n(answer: Any) -> str:
    """answer(text, reference, n) -> (precision, recall, f1) of runs of n words."""
    precision, recall, f1 = _three(result(answer, ANSWER, REFERENCE, 1), f"rouge_n({ANSWER!r}, {REFERENCE!r}, 1)")
    expect(precision <= 1 and recall <= 1, f"{max(precision, recall):g} is more than all of it: shares go from 0 to 1, not to 100")
    for wrong, words in {
        (4 / 9, 4 / 8): "precision and recall are in each other's place: precision is a share of the answer, recall one of the reference",
        (3 / 4, 3 / 8): "sets forget how often a word is there: count, as collections.Counter does",
        (3 / 8, 3 / 9): "the common words are a set, which forgets how often a word is there: two Counters and & keep the smaller count",
        (2 / 8, 2 / 9): "'door,' with its comma and 'cat.' with its full stop are the words door and cat: split the texts with words(...)",
        (4 / 8, 4 / 8): "both are shares of the answer: recall divides by the words of the reference",
        (4 / 9, 4 / 9): "both are shares of the reference: precision divides by the words of the answer",
    }.items():
        expect(not _close((precision, recall), wrong), words)
    expect(not equal(precision, 6 / 8), "a word that the answer repeats counts each time: 'the' is twice in the reference, and counts twice at most")
    expect(_close((precision, recall), (4 / 8, 4 / 9)), f"precision {precision:.3f} and recall {recall:.3f} are not it: 4 words are common (the, "
                                                        "the, door, cat), the answer has 8, the reference 9")  # fmt: skip
    refuse(f1, {17 / 36: "that is the ordinary mean of the two: F1 is the harmonic one, 2PR / (P + R)", 4 / 17: "the 2 is missing in 2PR / (P + R)",
                2 / 9: "that is P times R: F1 is 2PR / (P + R)"}, relative=1e-4)  # fmt: skip
    expect(equal(f1, 8 / 17), f"F1 is {f1:.3f}, expected 2PR / (P + R) = 0.471")
    pairs = _three(result(answer, ANSWER, REFERENCE, 2), f"rouge_n({ANSWER!r}, {REFERENCE!r}, 2)")
    expect(not _close(pairs, (4 / 8, 4 / 9, 8 / 17)), "right for single words, and the same for n = 2: it does not use n")
    expect(_close(pairs, (1 / 7, 1 / 8, 2 / 15)), f"right for n = 1; for n = 2 it says {_listed(pairs)}, expected 0.143, 0.125, 0.133: 'the cat' is "
                                                  "common, once, of 7 pairs and of 8")  # fmt: skip
    for text, words in (("Dogs bark.", "texts with nothing in common"), ("", "an empty answer and any other")):
        expect(_close(_three(result(answer, text, REFERENCE, 2), words), (0, 0, 0)), f"right for others, but {words} get 0")
    return "common runs over the answer's runs, and over the reference's. Each alone can be had for nothing, which is why F1 takes both."


def _three(value: Any, what: str) -> tuple[float, float, float]:
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    expect(len(parts) == 3, f"{what} is {str(value)[:40]}: return three numbers, precision, recall and f1")
    first, second, third = (number(part, f"a part of {what}") for part in parts)
    return first, second, third


def _close(values: Sequence[float], wanted: Sequence[float]) -> bool:
    return all(abs(value - right) < 1e-3 for value, right in zip(values, wanted, strict=True))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


# 2: the longest common subsequence ------------------------------------------------------------------------------------------------


class Word(str):
    """A word that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Word.compared += 1
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


# (one text, the other, the length, what a wrong answer has overlooked)
PAIRS = (
    ("police killed the gunman", "police kill the gunman", 3, "expected 3, 'police the gunman': words may be left out between them"),
    ("the gunman killed police", "police killed the gunman", 2, "expected 2, 'the gunman': the order counts; words in any order is ROUGE-1"),
    ("a x b y c", "a b c", 3, "expected 3: a run without gaps is something else, between the common words others may stand"),
    ("end a b c", "a b c end", 3, "expected 3, 'a b c': taking the first match that comes ('end') gives away the rest; the table tries both"),
    ("the the the", "the", 1, "expected 1: a word of one text pairs with one word of the other"),
    ("the", "the the the", 1, "expected 1: where two words agree it is one more than before *both* of them, up and left in the table, not beside"),
    ("p q a b c", "a r b s c p q", 3, "expected 3, 'a b c': the longest run, 'p q', is no part of it, and taking it first gives away the others"),
    ("", "a b", 0, "expected 0: nothing is common with an empty text"),
    ("a b", "c d", 0, "expected 0: they have nothing in common"),
    ("x a b c", "a b c", 3, "expected 3: the last row or column of the table, or the first, is left out"),
)


@check
def lcs(answer: Any) -> str:
    """answer(left, right) -> length of the longest common subsequence of two lists of words."""
    for left, right, length, words in PAIRS:
        value = result(answer, left.split(), right.split())
        expect(not isinstance(value, (list, tuple, str)), "it returns the subsequence itself: return its length")
        found = number(value, f"lcs of {left!r} and {right!r}")
        expect(found == length, f"for {left!r} and {right!r} it says {found:g}, {words}")
    Word.compared = 0
    result(answer, [Word(letter) for letter in "abcdefghi"], [Word(letter) for letter in "ABCDEFGHI"])
    expect(Word.compared <= 20 * 81, f"right, but it compares {Word.compared:,} times for 9 words against 9, and would never be done with 60: it "
                                     "solves the same small problem again and again. Keep each in a table")  # fmt: skip
    return "the longest common subsequence: same words, same order, gaps allowed. n × m steps, where trying all would take 2 to the power of n."


# 3: two texts that fool ROUGE -----------------------------------------------------------------------------------------------------

FOOLED = next(row for row in data.load("dialogues")[1] if row["id"] == "held-out-002")  # the glasses; facts: Friday, 30, case, lenses


@check
def fool_rouge(false: Any, true: Any) -> str:
    """false: a summary of FOOLED with ROUGE-L of 0.8 or more that is wrong.  true: one with 0.35 or less that says all the facts."""
    for text, name in ((false, "the false summary"), (true, "the true summary")):
        expect(text is not None and text is not ..., f"{name} is not written yet: put a text in place of the ...")
        expect(isinstance(text, str), f"{name} is a {type(text).__name__}: expected a text")
        expect(len(text.split()) >= 12, f"{name} has {len(text.split())} words: write 12 at least")
    scores = {name: _rouge_l(text) for name, text in (("false", false), ("true", true))}
    lost = [fact for fact in FOOLED["facts"] if not _says(true, fact)]
    changed = [fact for fact in FOOLED["facts"] if not _says(false, fact)]
    expect(scores["false"] > scores["true"], "the two stand in each other's place: the false one first, then the true one")
    expect(changed, "the false summary still says all four facts: change one of them (a day, a price), and leave the rest as it is")
    expect(changed != ["30"] or "thirty" not in false.lower(), "thirty is 30, so the summary is still true: change what a fact says, not how")
    expect(scores["false"] >= 0.8, f"the false summary has ROUGE-L {scores['false']:.2f}: take the reference word for word, and change only a fact")
    expect(len(false.split()) >= len(FOOLED["summary"].split()), "something is left out, which is no lie: let another word stand in a fact's place")
    expect(not lost, f"the true summary does not say {', '.join(map(repr, lost))}: it must have all of {', '.join(map(repr, FOOLED['facts']))}")
    expect(scores["true"] <= 0.35, f"the true summary has ROUGE-L {scores['true']:.2f}: say the same in other words, and in another order")
    return (f"ROUGE-L {scores['false']:.2f} for a lie, and {scores['true']:.2f} for the truth. It counts words that two texts share, and knows "
            "nothing of what they say.")  # fmt: skip


def _rouge_l(text: str) -> float:
    return rouge([text], [FOOLED["summary"]], kinds=["rougeL"])["rougeL"].f1


def _says(text: str, fact: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None


# 4: whether a text says something -------------------------------------------------------------------------------------------------

# (text, fact, whether it says it, what a wrong answer has overlooked)
SAYINGS = (
    ("They met on Friday.", "Friday", True, "Friday is there: a full stop behind the word is no part of it"),
    ("They met on Monday.", "Friday", False, "there is no Friday in it"),
    ("She paid 15 euros.", "5 euros", False, "15 euros is another price than 5 euros: whole words only"),
    ("He plays football.", "foot", False, "football is no foot: whole words only"),
    ("Gate two is closed.", "gate two", True, "capitals do not matter at the beginning of a sentence"),
    ("The gate has two doors.", "gate two", False, "both words are there, and yet not the fact: they have to stand together"),
    ("It costs 3x50.", "3.50", False, "a dot in a pattern stands for any character: re.escape(fact) takes it as a dot"),
    ("It costs 3.50.", "3.50", True, "3.50 is there"),
    ("Bring the case, said Ms. Ode.", "Ms. Ode", True, "a dot inside the fact belongs to it"),
    ("The lamp was 20 (no more).", "20 (no more)", True,
     "brackets in a fact are only brackets: re.escape(fact); and \\b behind one of them wants a letter next, where (?!\\w) wants none"),
)


@check
def says(answer: Any) -> str:
    """answer(text, fact) -> whether the text says it, in whole words."""
    values = [result(answer, text, fact) for text, fact, _, _ in SAYINGS]
    for value, (text, fact, _, _) in zip(values, SAYINGS, strict=True):
        expect(isinstance(value, (bool, int)), f"for {text!r} and {fact!r} it returns {str(value)[:40]!r}: return True or False")
    expect(any(values), "it says no to everything, even to 'They met on Friday.' and Friday")
    expect(not all(values), "it says yes to everything, even to 'They met on Monday.' and Friday")
    for value, (text, fact, right, words) in zip(values, SAYINGS, strict=True):
        expect(bool(value) == right, f"{text!r} and {fact!r}: {words}")
    return "a fact can be looked for. Crude, as it does not know 'ten past two' from '14:10', but anybody can count it again."


# 5: repetition --------------------------------------------------------------------------------------------------------------------


@check
def repeated(answer: Any) -> str:
    """answer(text, n) -> the share of the text's runs of n words that were there before."""
    text = "Yes, yes, yes and no"
    share = number(result(answer, text, 2), f"repeated({text!r}, 2)")
    refuse(share, {
        0.75: "that is the share of *different* runs: take it from 1",
        0.5: "every run that comes more than once counts here, the first time, too: count only those that were there before",
        1 / 3: "that is repeats over different runs: divide by all runs, 4",
        0.4: "those are single words: the runs have n words, here 2",
        0.2: "divide by the number of runs, 4, not by the number of words",
        1.0: "that is how many: divide by the number of runs, 4",
        25.0: "a share goes from 0 to 1, not to 100",
        0.0: "nothing is repeated, it says: 'Yes,' with its capital and comma and 'yes' are the same word. Split the text with words(...)",
    })  # fmt: skip
    expect(equal(share, 0.25), f"for {text!r} and n = 2 it says {share:.3f}: 4 runs, 3 of them different, so 1 of 4 was there before")
    for other, n, right, words in (("a b c d", 2, 0.0, "nothing is repeated in it"), ("a", 3, 0.0, "a text shorter than n words repeats nothing"),
                                   ("a b a b a b", 3, 0.5, "4 runs of 3 words, 2 of them new")):  # fmt: skip
        value = number(result(answer, other, n), f"repeated({other!r}, {n})")
        expect(equal(value, right), f"right for the first text, but for {other!r} and n = {n} it says {value:.3f}, expected {right}: {words}")
    return "the share of runs that were there before: 0 for a text that never repeats itself, near 1 for one that is stuck."
