"""The exercises of notebook 07, instruction tuning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.data.templates import ALPACA, IGNORE

from . import NotYet, check, equal, expect, number, refuse, result

# 1: a prompt --------------------------------------------------------------------------------------------------------------------

PAIRED = ", paired with an input that provides further context"


@check
def alpaca_prompt(answer: Any) -> str:
    """answer(instruction, given) -> Alpaca's prompt, up to where the answer begins."""
    cases = {given: ("Sort the words.", given) for given in ("pear apple", "")}
    texts = {given: result(answer, *case) for given, case in cases.items()}
    for given, text in texts.items():
        where = "with an input" if given else "without an input"
        expect(isinstance(text, str), f"{where} it returns a {type(text).__name__}: return the text")
        _compare(text, given, where)
    ends = {text.endswith("\n") for text in texts.values()}
    expect(len(ends) == 1, "one ends in a line break and one does not: both as the lab's, with it, or both as Stanford's, without")
    return "one form, with a place for everything. A model that was tuned in it expects every comma of it."


def _compare(text: str, given: str, where: str) -> None:
    block = f"### Input:\n{given}\n\n" if given else ""
    right = ALPACA.format(instruction="Sort the words.", input=block, paired=PAIRED if given else "")
    right = right if text.endswith("\n") else right.rstrip("\n")  # Stanford's train.py has none behind the last heading
    expect("{" not in text, f"{where} there is a brace in the text: is the f before the string missing?")
    expect("Sort the words." in text, f"{where} the instruction is not in the text: use the arguments")
    expect(given or "### Input" not in text, "without an input its heading stays away, too")
    expect(given or PAIRED not in text, "without an input the first line does not speak of one: 'a task. Write a response ...'")
    expect(not given or given in text, "the input is not in the text")
    expect(not given or PAIRED in text, f"with an input the first line says so: 'a task{PAIRED}. Write a response ...'")
    expect(not given or "### Input:" in text, "the input has a heading of its own, ### Input:")
    expect("### Response:" in text, f"{where} the heading behind which the model writes is missing, ### Response:")
    expect(text.find("### Response:") > max(text.find("Sort"), text.find("### Input:")), "### Response: comes last: behind it the model writes")
    if text.strip() == right.strip() or text.split() == right.split():
        expect(text == right, f"{where} the words are right, blanks or line breaks are not: an empty line before each heading, and one line break "
                              "behind each (behind the last it may be missing)")  # fmt: skip
    expect(text == right, f"{where} it is not Alpaca's text, letter by letter: {_first_difference(text, right)}")


def _first_difference(text: str, right: str) -> str:
    place = next((i for i, (one, other) in enumerate(zip(text, right, strict=False)) if one != other), min(len(text), len(right)))
    return f"it goes on with {text[place : place + 30]!r}, expected {right[place : place + 30]!r}"


# 2: labels ----------------------------------------------------------------------------------------------------------------------

PROMPT, ANSWER, END = [11, 12, 13, 14], [21, 22, 23], 2
IDS = [*PROMPT, *ANSWER, END]
MASK = [IGNORE] * len(PROMPT)


@check
def labelled(answer: Any) -> str:
    """answer(prompt_ids, answer_ids, end_id) -> (input_ids, labels)."""
    pair = result(answer, list(PROMPT), list(ANSWER), END)
    expect(isinstance(pair, (tuple, list)) and len(pair) == 2, "return two lists: input_ids, labels")
    ids, labels = (_list(part, name) for part, name in zip(pair, ("input_ids", "labels"), strict=True))
    expect(labels != IDS or ids == IDS, "ids and labels are in each other's place: return input_ids, labels")
    expect(ids != IDS[:-1], "the end token is missing behind the answer: a model that never sees an end does not end")
    expect(ids == IDS, f"the input_ids are {ids}, expected prompt, answer and end one after another, {IDS}")
    for wrong, words in (
        (IDS, "everything is learned, the prompt, too: its labels are -100, where the loss looks away"),
        ([*MASK, *ANSWER], "there is no label for the end token: the labels are as many as the input_ids"),
        ([*MASK, *ANSWER, IGNORE], "the end token has no label, so the model never learns to stop"),
        ([0] * 4 + [*ANSWER, END], "0 is a token like any other, and would be learned: PyTorch looks away at -100"),
        ([-1] * 4 + [*ANSWER, END], "-1 is no label that PyTorch skips: that is -100"),
        ([*MASK[1:], *ANSWER, END, IGNORE], "the labels are shifted already: the model shifts them itself, so a label stands at its own token"),
        ([*MASK[1:], *ANSWER, END], "the labels are one fewer than the input_ids: the model shifts them itself, so give each token its own"),
        ([*PROMPT, *[IGNORE] * 4], "the prompt is learned and the answer is not: the other way round"),
        ([*PROMPT, *[IGNORE] * 3, END], "the prompt is learned and the answer is not: the other way round, and the end with it"),
        ([IGNORE] * 8, "nothing is learned: the answer and the end have labels"),
    ):
        expect(labels != wrong, words)
    right = [*MASK, *ANSWER, END]
    expect(labels == right, f"the labels are {labels}, expected {right}")
    return "-100 for the question, the tokens themselves for the answer and its end: it reads everything, and learns to answer and to stop."


def _list(value: Any, name: str) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise NotYet(f"{name} is a {type(value).__name__}: expected a list of ids")
    return list(value)


# 3: a gain and its error ------------------------------------------------------------------------------------------------------------

BEFORE = [True] * 12 + [False] * 8
AFTER = [True] * 10 + [False] * 2 + [True] * 5 + [False] * 3  # 5 gained, 2 lost, of 20


@check
def gain(answer: Any) -> str:
    """answer(before, after) -> (mean change, its standard error)."""
    pair = result(answer, list(BEFORE), list(AFTER))
    expect(isinstance(pair, (tuple, list)) and len(pair) == 2, "return two numbers: mean, standard_error")
    mean, error = number(pair[0], "the mean"), number(pair[1], "the standard error")
    refuse(mean, {
        -0.15: "the sign is turned round: after minus before",
        3.0: "that is how many questions more: divide by their number, 20",
        15.0: "that is in per cent: a share goes from 0 to 1",
        0.35: "that is the share of questions that changed: what was lost counts as -1",
        0.75: "that is the share after: take the share before from it",
        0.25: "those are the gained ones alone: what was lost counts as -1",
    })  # fmt: skip
    expect(equal(mean, 0.15), f"the mean is {mean:.3f}, expected 0.15: of 20 questions 5 were gained and 2 lost")
    deviations = {(0.3275 * 20 / 19) ** 0.5, 0.3275**0.5}
    for deviation in deviations:
        refuse(error, {
            deviation: "that is the standard deviation of one question: the mean of 20 is surer, divide by the root of 20",
            deviation / 20: "divide by the root of 20, not by 20",
            deviation**2 / 20: "that is the square of the error: take its root",
        })  # fmt: skip
    refuse(error, {
        (0.24 / 20 + 0.1875 / 20) ** 0.5: "that is the error of two separate exams: both had the same questions, so take each question's change",
        (0.1875 / 20) ** 0.5: "that is the error of the share after: take the changes, of which many are 0",
    })  # fmt: skip
    right = [deviation / 20**0.5 for deviation in deviations]
    expect(any(equal(error, each, 1e-3) for each in right), f"the standard error is {error:.4f}, expected {max(right):.4f}: the standard deviation "
                                                            "of the changes over the root of 20")  # fmt: skip
    return "0.15 ± 0.13: three questions more of twenty, and still within two standard errors of nothing at all."


# 4: answers of others -----------------------------------------------------------------------------------------------------------------

ROWS = [{"instruction": f"Question {n}?", "input": f"input {n}", "output": f"Answer {n}."} for n in range(9)]


@check
def shuffled(answer: Any) -> str:
    """answer(rows, seed) -> new rows, each with the answer of another one."""
    for seed in range(8):
        given = copy.deepcopy(ROWS)
        made = result(answer, given, seed)
        expect(isinstance(made, Sequence) and not isinstance(made, str) and all(isinstance(row, Mapping) for row in made), "return a list of rows")
        expect(len(made) == len(ROWS), f"{len(ROWS)} rows came in and {len(made)} go out: each keeps its place")
        _look(made, given)
        expect(given == ROWS, "the old rows were changed, and they are needed clean: make new ones, {**row, 'output': ...}")
    first, again, other = ([row["output"] for row in result(answer, copy.deepcopy(ROWS), seed)] for seed in (1, 1, 2))
    expect(first == again, "the same seed gives another order each time: use random.Random(seed)")
    expect(first != other, "every seed gives the same order: use it, random.Random(seed)")
    return "every answer is a good one, and none is where it belongs: noise that no spelling check would find."


def _look(made: Any, given: Any) -> None:
    expect(all({"instruction", "output"} <= {*row} for row in made), "a row has lost its instruction or its output: {**row, 'output': ...} keeps all")
    questions, answers = ([row[field] for row in made] for field in ("instruction", "output"))
    moved = questions != [row["instruction"] for row in ROWS]
    together = all(row["instruction"][9:-1] == row["output"][7:-1] for row in made)
    expect(not (moved and together), "whole rows were shuffled: each still has its own answer. Move the answers alone")
    expect(not moved, "the instructions have moved: they stay, and the answers move")
    inputs = [row.get("input") for row in made]
    expect(inputs == [row["input"] for row in ROWS], "the inputs have moved or gone: they belong to their instructions")
    expect(not together, "each row still has its own answer" + (", but the order in `rows` was changed" if given != ROWS else ""))
    expect(len({*answers}) == len(answers), "an answer is there twice and another is gone: move them round, do not draw them")
    expect({*answers} == {row["output"] for row in ROWS}, "there are answers that are none of the rows': take those of other rows")
    own = sum(row["output"] == old["output"] for row, old in zip(made, ROWS, strict=True))
    expect(own == 0, f"{own} of {len(ROWS)} rows have kept their own answer: a shuffle leaves some in place by chance. Let each take that of the "
                     "next row in a shuffled order")  # fmt: skip


# 5: shares ----------------------------------------------------------------------------------------------------------------------------

SIZES = {"large": 900, "middle": 90, "small": 10}


@check
def task_shares(answer: Any) -> str:
    """answer(sizes, temperature, maximum) -> {task: share}."""
    found = _of_tasks(result(answer, dict(SIZES), 2, 400), "for temperature 2 and a limit of 400")
    total = sum(found.values())
    powers = {"large": 20.0, "middle": 90**0.5, "small": 10**0.5}
    expect(not _same(found, powers), "those are the powers: divide each by the sum of all, so that the shares sum to 1")
    expect(abs(total - 100) > 0.1, "the shares sum to 100: they go from 0 to 1")
    expect(abs(total - 1) < 1e-3, f"the shares sum to {total:.3f}: divide by the sum of the powers")
    for wrong, words in (
        (_normal({"large": 400, "middle": 90, "small": 10}), "the temperature does nothing (dividing by it does not, either): it is a power, 1 / T"),
        (_normal({"large": 400**2, "middle": 90**2, "small": 10**2}), "that is the power of T, and makes the large ones larger: take 1 / T"),
        (_normal({"large": 30, "middle": 90**0.5, "small": 10**0.5}), "the limit does nothing: min(n, K) comes first, and then the power"),
        (_normal(dict.fromkeys(SIZES, 1)), "all are equal: that is what an endless temperature would do"),
    ):
        expect(not _same(found, wrong), words)
    right = _normal(powers)
    expect(_same(found, right), f"for temperature 2 and a limit of 400 it says {_shown(found)}, expected {_shown(right)}")
    plain = _of_tasks(result(answer, dict(SIZES), 1, 10_000), "for temperature 1 and no limit")
    expect(_same(plain, _normal(SIZES)), f"right for temperature 2, but for temperature 1 and a limit that nobody reaches it says {_shown(plain)}: "
                                         "then the shares are those of the sizes, 0.900, 0.090, 0.010")  # fmt: skip
    return "the large task still gets the most, and the small one is no longer drowned: 61 %, 29 % and 10 %, where sizes alone give 90, 9 and 1."


def _of_tasks(value: Any, what: str) -> dict[str, float]:
    if not isinstance(value, Mapping) or set(value) != set(SIZES):
        raise NotYet(f"{what} it returns {str(value)[:50]}: return a dict with the same tasks")
    return {task: number(share, f"the share of {task}") for task, share in value.items()}


def _normal(values: Mapping[str, float]) -> dict[str, float]:
    return {task: value / sum(values.values()) for task, value in values.items()}


def _same(left: Mapping[str, float], right: Mapping[str, float]) -> bool:
    return all(abs(left[task] - right[task]) < 1e-4 * max(right[task], 1e-9) + 1e-6 for task in right)


def _shown(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.3f}" for share in shares.values())
