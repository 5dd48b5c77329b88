"""The exercises of notebook 00, the whole story."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import NotYet, check, equal, expect, number, refuse, result

# 1: a voice ----------------------------------------------------------------------------------------------------------------------

# text -> (is there a first person in it, what a wrong answer has overlooked)
TEXTS = {
    "I wore it all winter.": (True, "it begins with I, and you say there is no first person"),
    "A crisp shirt in six sizes.": (False, "there is an i inside crisp, shirt and sizes, but no word I: look at whole words"),
    "i love it": (True, "customers do not always press shift: small letters count, too (text.lower())"),
    "Bought it for my sister.": (True, "my is a word of the first person, too"),
    "MY SISTER WANTS ONE": (True, "and some never let go of shift: make the text lower case first"),
    "Wipe off the dust, use a soft brush.": (False, "there is an us inside dust and an us in use, but no word us: look at whole words"),
    "It gave us nothing but trouble": (True, "us is a word of the first person, too"),
    "Honestly, I'm happy.": (True, "I'm is the first person as well: the word ends at the apostrophe"),
    "Who likes it? Me.": (True, "a full stop or a comma behind the word is no part of it"),
    "We've had it for years.": (True, "We've is the first person as well: the word ends at the apostrophe"),
    "This jacket warms you and your children.": (False, "you and your are the second person: brochures are full of them"),
    "": (False, "an empty text has no first person: where is your True from?"),
    "All of ours broke; the other ones were mine.": (True, "ours and mine are on the list, too"),
    "They kept it to themselves.": (False, "themselves is no first person: whole words, and only those of the list"),
}


@check
def first_person(answer: Any) -> str:
    """answer(text) -> whether there is a word of the first person in it."""
    values = {text: result(answer, text) for text in TEXTS}
    for text, value in values.items():
        expect(value is True or value is False or value in (0, 1), f"for {text!r} it returns {str(value)[:40]!r}: return True or False")
    expect(any(values.values()), "it says no to every text, even to 'I wore it all winter.'")
    expect(not all(values.values()), "it says yes to every text: a list or a string that is not empty counts as True, compare what is in it")
    for text, (right, words) in TEXTS.items():
        expect(bool(values[text]) == right, f"{text!r}: {words}")
    return "a voice has become a number. It is a crude one, and that is its strength: anybody can count it again."


# 2 and 3: bytes -------------------------------------------------------------------------------------------------------------------


@check
def training_bytes(answer: Any) -> str:
    """answer(frozen, trained) -> bytes of weights, gradients and AdamW's states in 32 bit."""
    frozen, trained = 1_000_000, 10_000
    size = number(result(answer, frozen, trained), "your number of bytes for 1,000,000 frozen and 10,000 trained weights")
    refuse(size, {
        16 * (frozen + trained): "that trains all of them: a frozen weight has no gradient and no averages, it is 4 bytes and no more",
        4 * (frozen + trained): "that is the weights alone, as for writing text: one that trains has a gradient and AdamW's two averages, too",
        16 * trained: "the frozen weights are missing: they do not train, but they are in memory",
        4 * frozen + 8 * trained: "AdamW's averages are missing: two more numbers for each weight that trains",
        4 * frozen + 12 * trained: "one of four numbers is missing for the weights that train: the weight, its gradient, and two averages",
        frozen + 4 * trained: "that counts numbers: each of them has 4 bytes",
        2 * frozen + 16 * trained: "2 bytes are 16 bit: here everything is 32 bit",
        2 * frozen + 8 * trained: "that is 16 bit throughout: here everything is 32 bit, 4 bytes a number",
        4 * frozen + 24 * trained: "24 bytes is the lecture's table with its last line, activations and temporary memory: leave these out",
    }, relative=1e-6)  # fmt: skip
    expect(equal(size, 4 * frozen + 16 * trained, 1e-6), f"{size:,.0f} is not it: 4 bytes for a frozen weight, 4 + 4 + 8 for one that trains")
    whole = number(result(answer, 0, 10**9), "your number of bytes for a billion weights that all train")
    expect(equal(whole, 16e9, 1e-6), f"right for that model, but a billion weights that all train need 16 GB, and it says {whole / 1e9:,.1f}: "
                                     "use the arguments")  # fmt: skip
    return "4 bytes for a frozen weight, 16 for one that trains: a billion weights are 16 GB to train and 4 to keep frozen."


@check
def disk_bytes(answer: Any) -> str:
    """answer(tasks, base, adapter) -> bytes on disk for so many tasks with LoRA, in 32 bit."""
    tasks, base, adapter = 100, 134_515_008, 2_442_240
    size = number(result(answer, tasks, base, adapter), "your number of bytes for 100 tasks")
    refuse(size, {
        4 * tasks * (base + adapter): "the base is there for each task: all of them share one, that is the point",
        4 * tasks * base: "that is a full copy for each task, without LoRA",
        4 * tasks * adapter: "the base is missing: adapters alone compute nothing",
        4 * (base + adapter): "that is one task: there are 100 adapters",
        base + tasks * adapter: "that counts weights: each has 4 bytes",
        2 * (base + tasks * adapter): "2 bytes are 16 bit: here everything is 32 bit, 4 bytes a weight",
        16 * (base + tasks * adapter): "16 bytes are for training: on disk there are weights only, 4 bytes each",
    }, relative=1e-6)  # fmt: skip
    expect(equal(size, 4 * (base + tasks * adapter), 1e-6), f"{size:,.0f} is not it: the base once, an adapter for each task, 4 bytes a weight")
    none = number(result(answer, 0, base, adapter), "your number of bytes for no task at all")
    expect(equal(none, 4 * base, 1e-6), f"right for 100 tasks, but with no task the base alone is there, and it says {none:,.0f}: use the arguments")
    return "1.5 GB for a hundred tasks, where full copies take 54: the base is there once."


# 4: rows of one's own -------------------------------------------------------------------------------------------------------------

FIELDS = ("instruction", "input", "output")
OTHER_NAMES = ("response", "answer", "completion", "target", "text", "prompt", "question", "outputs", "inputs")


@check
def rows(answer: Any) -> str:
    """answer: at least six rows to train on."""
    expect(answer is not None and answer is not ..., "there are no rows yet: write them in place of the ...")
    expect(not (isinstance(answer, Mapping) and set(FIELDS) & set(answer)), "that is one dict: write a list of them, one for each row")
    expect(isinstance(answer, (list, tuple)) and answer, "expected a list of rows: [{...}, {...}, ...]")
    for place, row in enumerate(answer):
        _row(row, f"row {place}")
    expect(len(answer) >= 6, f"there are {len(answer)} rows: write six at least, or it learns them by heart and nothing else")
    outputs = [row["output"].strip() for row in answer]
    expect(len(set(outputs)) > 1, "all outputs are the same: it would learn that one text by heart, and no manner")
    expect(len(set(outputs)) == len(outputs), "an output is there twice: give each row one of its own")
    return f"{len(answer)} rows with {sum(len(text.split()) for text in outputs)} words of answers. Now see what it makes of them."


def _row(row: Any, name: str) -> None:
    if not isinstance(row, Mapping):
        raise NotYet(f"{name} is a {type(row).__name__}: expected a dict with the fields instruction, input and output")
    for field in FIELDS:
        others = [other for other in row if other in OTHER_NAMES]
        instead = f"; it has {others[0]!r}, which another format uses" if others else ""
        expect(field in row, f"{name} has no {field!r}{instead}")
        expect(isinstance(row[field], str), f"the {field} of {name} is no text")
    expect(row["instruction"].strip(), f"the instruction of {name} is empty: the model has to be told what to do")
    expect(row["output"].strip(), f"the output of {name} is empty: that is the text which is learned")
    expect(row["output"].strip() != row["input"].strip(), f"{name} answers with its own input: it would learn to copy")
