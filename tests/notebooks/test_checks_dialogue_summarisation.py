"""The checks of notebook 06: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter

from check_tools import each_gets_its_own, said

from course.checks import dialogue_summarisation as check
from lora_lab.training import rouge


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text, n, split=words):
    found = split(text)
    return [*zip(*(found[i:] for i in range(n)), strict=False)]


def scored(counts=Counter, split=words, finish=None, order=1, mean=lambda p, r: 2 * p * r / (p + r) if p + r else 0.0, size=None):
    """ROUGE-N with one thing or another done wrongly."""

    def rouge_n(answer, reference, n):
        ours, theirs = (runs(text, size or n, split) for text in (answer, reference))
        left, right = counts(ours), counts(theirs)
        common = sum((left & right).values()) if counts is Counter else len(left & right)
        shares = (finish or (lambda c, a, b: (c / max(a, 1), c / max(b, 1))))(common, len(ours), len(theirs))
        return (*shares[::order], mean(*shares))

    return rouge_n


def unclipped(answer, reference, n):
    ours, theirs = runs(answer, n), runs(reference, n)
    precision, recall = sum(run in theirs for run in ours) / len(ours), sum(run in ours for run in theirs) / len(theirs)
    return precision, recall, 2 * precision * recall / (precision + recall)


def of_sets(answer, reference, n):
    left, right = {*runs(answer, n)}, {*runs(reference, n)}
    precision, recall = len(left & right) / len(left), len(left & right) / len(right)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_rouge_n():
    each_gets_its_own(
        check.rouge_n,
        right=[scored(), lambda a, r, n: list(vars(rouge([a], [r], kinds=[f"rouge{n}"])[f"rouge{n}"]).values())],
        wrong={
            "each other's place": scored(order=-1),
            "'the' is twice in the reference": unclipped,
            "sets forget": of_sets,
            "two Counters and &": scored(counts=set),
            "both are shares of the answer": scored(finish=lambda c, a, b: (c / a, c / a)),
            "both are shares of the reference": scored(finish=lambda c, a, b: (c / b, c / b)),
            "with its comma": scored(split=lambda text: text.lower().split()),
            "are not it": scored(split=lambda text: words(text)[:-1]),
            "ordinary mean": scored(mean=lambda p, r: (p + r) / 2),
            "P times R": scored(mean=lambda p, r: p * r),
            "the 2 is missing": scored(mean=lambda p, r: p * r / (p + r)),
            "it does not use n": scored(size=1),
            "for n = 2 it says": lambda a, r, n: scored()(a, r, n) if n == 1 else scored()(a, r, 3),
            "not to 100": lambda a, r, n: tuple(100 * part for part in scored()(a, r, n)),
            "ZeroDivisionError": scored(mean=lambda p, r: 2 * p * r / (p + r)),
            "return three numbers": lambda a, r, n: scored()(a, r, n)[2],
        },
    )


@functools.cache
def deep(left, right):
    if not left or not right:
        return 0
    return 1 + deep(left[1:], right[1:]) if left[0] == right[0] else max(deep(left[1:], right), deep(left, right[1:]))


def naive(left, right):
    if not left or not right:
        return 0
    return 1 + naive(left[1:], right[1:]) if left[0] == right[0] else max(naive(left[1:], right), naive(left, right[1:]))


def table(left, right):
    rows = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            rows[i + 1][j + 1] = rows[i][j] + 1 if word == other else max(rows[i][j + 1], rows[i + 1][j])
    return rows


def first_come(left, right):
    count, start = 0, 0
    for word in left:
        if word in right[start:]:
            count, start = count + 1, right.index(word, start) + 1
    return count


def without_gaps(left, right):
    return difflib.SequenceMatcher(None, left, right, autojunk=False).find_longest_match().size


def longest_runs(left, right):
    return sum(block.size for block in difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks())


def one_row(left, right):
    """A table of one row, in which what stood up and left is overwritten before it is needed."""
    row = [0] * (len(right) + 1)
    for word in left:
        for j, other in enumerate(right):
            row[j + 1] = row[j] + 1 if word == other else max(row[j + 1], row[j])
    return row[-1]


def test_lcs():
    each_gets_its_own(
        check.lcs,
        right=[lambda left, right: table(left, right)[-1][-1], lambda left, right: deep(tuple(left), tuple(right))],
        wrong={
            "the order counts": lambda left, right: sum((Counter(left) & Counter(right)).values()),
            "words may be left out between": without_gaps,
            "gives away the rest": first_come,
            "taking it first gives away": longest_runs,
            "more than before *both*": one_row,
            "pairs with one word": lambda left, right: len(left) if len({*left}) == 1 else table(left, right)[-1][-1],
            "is left out": lambda left, right: table(left, right)[-1][-1] - (left[:1] == ["x"]),
            "return its length": lambda left, right: [word for word in left if word in right],
            "Keep each in a table": naive,
            "IndexError": lambda left, right: table(left, right)[len(left) + 1][0],
        },
    )


REFERENCE = check.FOOLED["summary"]
FALSE = REFERENCE.replace("Friday", "Monday")
TRUE = ("30 less to pay, plus a case thrown in: so much for a pair of spectacles whose lenses sat on opposite sides, and which come home on Friday. "
        "Meanwhile Ferdinand reads with what he wore before, bent back into shape by Ayumi free of charge.")  # fmt: skip


def test_fool_rouge():
    each_gets_its_own(
        check.fool_rouge,
        right=[(FALSE, TRUE), (REFERENCE.replace("30", "50"), TRUE)],
        wrong={
            "each other's place": (TRUE, FALSE),
            "still says all four facts": (REFERENCE, TRUE),
            "change only a fact": ("Ferdinand's new glasses had the wrong sides in them, and Ayumi would see to it by Monday.", TRUE),
            "does not say 'Friday'": (FALSE, TRUE.replace("on Friday", "soon")),
            "in other words": (FALSE, REFERENCE.replace("had been", "were")),
            "thirty is 30": (REFERENCE.replace("30", "thirty"), TRUE),
            "which is no lie": (REFERENCE.replace(" until Friday", ""), TRUE),
            "write 12 at least": (FALSE, "Friday, 30, case, lenses."),
            "is not written yet": (FALSE, ...),
            "expected a text": ([FALSE], TRUE),
        },
        arguments=2,
    )


def test_says():
    each_gets_its_own(
        check.says,
        right=[check._says, lambda text, fact: bool(re.search(rf"(?<!\w){re.escape(fact.lower())}(?!\w)", text.lower()))],
        wrong={
            "15 euros": lambda text, fact: fact.lower() in text.lower(),
            "capitals do not matter": lambda text, fact: re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text) is not None,
            "a dot in a pattern": lambda text, fact: re.search(rf"(?<!\w){fact}(?!\w)", text, re.IGNORECASE) is not None,
            "is no part of it": lambda text, fact: f" {fact.lower()} " in f" {text.lower()} ",
            "stand together": lambda text, fact: {*words(fact)} <= {*words(text)},
            "says no to everything": lambda text, fact: False,
            "says yes to everything": lambda text, fact: True,
            "return True or False": lambda text, fact: re.findall(re.escape(fact), text),
        },
    )


def test_repeated():
    def right(text, n):
        found = runs(text, n)
        return 1 - len({*found}) / len(found) if found else 0.0

    each_gets_its_own(
        check.repeated,
        right=[right],
        wrong={
            "*different* runs": lambda text, n: len({*runs(text, n)}) / len(runs(text, n)),
            "the first time, too": lambda text, n: sum(c for c in Counter(runs(text, n)).values() if c > 1) / len(runs(text, n)),
            "repeats over different runs": lambda text, n: len(runs(text, n)) / len({*runs(text, n)}) - 1,
            "single words": lambda text, n: 1 - len({*words(text)}) / len(words(text)),
            "not by the number of words": lambda text, n: (len(runs(text, n)) - len({*runs(text, n)})) / len(words(text)),
            "how many": lambda text, n: len(runs(text, n)) - len({*runs(text, n)}),
            "not to 100": lambda text, n: 100 * right(text, n),
            "its capital and comma": lambda text, n: 1 - len({*runs(text, n, str.split)}) / max(len(runs(text, n, str.split)), 1),
            "ZeroDivisionError": lambda text, n: 1 - len({*runs(text, n)}) / len(runs(text, n)),
            "right for the first text": lambda text, n: right(text, 2),
        },
    )


def test_a_recursion_without_a_table_is_noticed_before_it_takes_long():
    """Nine words against nine are some 48,000 comparisons; sixty against sixty would never end."""
    assert "it compares 48,619 times" in said(check.lcs, naive)
