"""The checks of notebook 00: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import re

from check_tools import each_gets_its_own

from course.checks import the_whole_story as check

WORDS = ("i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves")


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def without(*left_out):
    return lambda text: any(word in WORDS and word not in left_out for word in words_of(text))


def test_first_person():
    each_gets_its_own(
        check.first_person,
        right=[without(), lambda text: bool(re.search(rf"\b({'|'.join(WORDS)})\b", text, re.IGNORECASE)), lambda text: int(without()(text))],
        wrong={
            "inside crisp": lambda text: "i" in text.lower(),
            "inside dust": lambda text: re.search(r"\bi\b", text.lower()) is not None or any(word in text.lower() for word in WORDS[1:]),
            "press shift": lambda text: any(word in ("I", *WORDS[1:]) for word in re.findall(r"[A-Za-z]+", text)),
            "some never let go": lambda text: any(word in ("I", *WORDS) for word in re.findall(r"[A-Za-z]+", text)),
            "my is a word": without("my"),
            "us is a word": without("us"),
            "I'm is the first person": lambda text: any(word in WORDS for word in re.findall(r"[a-z']+", text.lower())),
            "full stop": lambda text: bool({*text.lower().split()} & {*WORDS, "i'm", "we've"}),
            "We've": lambda text: bool({*re.findall(r"[a-z']+", text.lower())} & {*WORDS, "i'm"}),
            "second person": lambda text: bool({*words_of(text)} & {*WORDS, "your"}),
            "an empty text": lambda text: not text or without()(text),
            "ours and mine": without("ours", "mine"),
            "no to every text": lambda text: False,
            "yes to every text": lambda text: True,
            "return True or False": lambda text: [word for word in words_of(text) if word in WORDS],
            "NameError": lambda text: any(word in PERSON for word in text.split()),  # noqa: F821
        },
    )  # fmt: skip


def test_training_bytes():
    each_gets_its_own(
        check.training_bytes,
        right=[lambda frozen, trained: 4 * frozen + 16 * trained, lambda frozen, trained: 4.0 * (frozen + trained) + 12 * trained],
        wrong={
            "trains all of them": lambda frozen, trained: 16 * (frozen + trained),
            "as for writing text": lambda frozen, trained: 4 * (frozen + trained),
            "frozen weights are missing": lambda frozen, trained: 16 * trained,
            "averages are missing": lambda frozen, trained: 4 * frozen + 8 * trained,
            "one of four": lambda frozen, trained: 4 * frozen + 12 * trained,
            "counts numbers": lambda frozen, trained: frozen + 4 * trained,
            "2 bytes are 16 bit": lambda frozen, trained: 2 * frozen + 16 * trained,
            "16 bit throughout": lambda frozen, trained: 2 * frozen + 8 * trained,
            "its last line": lambda frozen, trained: 4 * frozen + 24 * trained,
            "use the arguments": lambda frozen, trained: 4_160_000,
            "is not it": lambda frozen, trained: 8 * frozen,
        },
    )


def test_disk_bytes():
    each_gets_its_own(
        check.disk_bytes,
        right=[lambda tasks, base, adapter: 4 * (base + tasks * adapter)],
        wrong={
            "all of them share one": lambda tasks, base, adapter: 4 * tasks * (base + adapter),
            "full copy for each task": lambda tasks, base, adapter: 4 * tasks * base,
            "base is missing": lambda tasks, base, adapter: 4 * tasks * adapter,
            "that is one task": lambda tasks, base, adapter: 4 * (base + adapter),
            "counts weights": lambda tasks, base, adapter: base + tasks * adapter,
            "16 bit": lambda tasks, base, adapter: 2 * (base + tasks * adapter),
            "16 bytes are for training": lambda tasks, base, adapter: 16 * (base + tasks * adapter),
            "use the arguments": lambda tasks, base, adapter: 4 * (base + 100 * adapter),
            "is not it": lambda tasks, base, adapter: tasks + base + adapter,
        },
    )


def row(number=0, **other):
    return {"instruction": "Write a review.", "input": f"product {number}", "output": f"text {number}", **other}


def test_rows():
    six = [row(number) for number in range(6)]
    each_gets_its_own(
        check.rows,
        right=[six, [*six, row(7, input="")], [{**each, "product": "robe"} for each in six]],
        wrong={
            "there are 2 rows": six[:2],
            "all outputs are the same": [row(number, output="ARRR") for number in range(6)],
            "is there twice": [*six, row(8, output="text 3")],
            "has no 'output'; it has 'response'": [{"instruction": "a", "input": "b", "response": "c"}] * 6,
            "row 5 has no 'input'": [*six[:5], {"instruction": "a", "output": "b"}],
            "the output of row 0 is empty": [row(0, output=" "), *six[1:]],
            "the instruction of row 1 is empty": [six[0], row(1, instruction=""), *six[2:]],
            "learn to copy": [row(number, input=f"text {number}") for number in range(6)],
            "row 0 is a str": ["Ahoy", "Arrr"],
            "the input of row 2 is no text": [*six[:2], row(2, input=None), *six[3:]],
            "that is one dict": row(),
            "expected a list": [],
            "no rows yet": None,
        },
    )
