"""The bundled sentences, instructions and questions: how many, how long, how different, how they end, and whether their sums come out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import combinations, product

import pytest

BUNDLED = resources.files("lora_lab.data") / "bundled"
CATEGORIES = {"rewriting", "summarising", "extraction", "classification", "brainstorming", "explaining", "factual questions", "arithmetic", "listing",
              "letters", "conversion", "asking back"}  # fmt: skip


def rows(name):
    return [json.loads(line) for line in (BUNDLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


SENTIMENT = {part: rows(f"sentiment_{part}") for part in ("train", "held_out")}
INSTRUCTIONS = {part: rows(f"instructions_{part}") for part in ("train", "held_out")}
FACTS = rows("facts")
SENTENCES = [row["text"] for part in SENTIMENT.values() for row in part]
ANSWERED = [row for part in INSTRUCTIONS.values() for row in part]
QUESTIONS = [f"{row['instruction']}\n{row['input']}" for row in ANSWERED]


def words(text):
    return set(re.findall(r"[a-z0-9']+", text.lower()))


NOTHING = words("a an and are at by called did do does from how in is it many of on or the there to usually was were what which who")


def most_alike(texts):
    """(Jaccard's index, one text, the other) of the two that share most of their words."""
    sets = [words(text) for text in texts]
    return max((len(sets[i] & sets[j]) / len(sets[i] | sets[j]), texts[i], texts[j]) for i, j in combinations(range(len(texts)), 2))


def ends_cleanly(answer):
    """With a full stop, a closing bracket or table row, or the names below a letter's last line ("Best wishes,")."""
    return bool(re.search(r"([.!?][\"']?|[}\]|])\Z", answer) or re.search(r",\n[A-Z][A-Za-z ]*\Z", answer))


def sums(answer) -> Iterator[tuple[str, float]]:
    """Each "12 x 7 = 84" of an answer: its left side, and what stands right."""
    for left, right in re.findall(r"([\d.,]+(?: [-+x/] [\d.,]+)+) = ([\d,]+(?:\.\d+)?)", answer):
        yield left.replace(",", ""), float(right.replace(",", ""))


@pytest.mark.parametrize("name", ["sentiment_train", "sentiment_held_out", "instructions_train", "instructions_held_out", "facts"])
def test_a_file_is_one_object_a_line_in_ascii(name):
    text = (BUNDLED / f"{name}.jsonl").read_bytes().decode("ascii")
    assert text.endswith("}\n") and "\r" not in text and "\n\n" not in text
    assert not {character for row in map(json.loads, text.splitlines()) for value in row.values() if isinstance(value, str)
                for character in value if character != "\n" and not " " <= character <= "~"}  # fmt: skip


def test_sentiments_are_384_and_120_half_of_them_positive():
    assert {part: Counter(row["label"] for row in of) for part, of in SENTIMENT.items()} == {"train": {0: 192, 1: 192}, "held_out": {0: 60, 1: 60}}
    assert all(set(row) == {"text", "label"} for of in SENTIMENT.values() for row in of)


def test_a_sentiments_text_has_8_to_35_words_and_ends_with_a_stop():
    lengths = [len(text.split()) for text in SENTENCES]
    assert min(lengths) >= 8 and max(lengths) <= 35
    assert all(re.search(r"[.!?]\Z", text) and text == text.strip() and text[0].isupper() for text in SENTENCES)


def test_length_does_not_give_the_sentiment_away():
    """Else a model could learn it instead: the two means differ by less than a word."""
    mean = {label: sum(len(row["text"].split()) for of in SENTIMENT.values() for row in of if row["label"] == label) / 252 for label in (0, 1)}
    assert abs(mean[0] - mean[1]) < 1


def test_no_sentiment_is_there_twice_nor_nearly():
    """Not across training and held-out either: two texts share less than two fifths of their words, and few the first three."""
    assert most_alike(SENTENCES)[0] < 0.4, most_alike(SENTENCES)
    assert max(Counter(" ".join(text.lower().split()[:3]) for text in SENTENCES).values()) <= 3


def test_instructions_are_228_and_48_the_same_number_of_each_category():
    assert {part: Counter(row["category"] for row in of) for part, of in INSTRUCTIONS.items()} == {
        "train": dict.fromkeys(CATEGORIES, 19), "held_out": dict.fromkeys(CATEGORIES, 4)}  # fmt: skip
    assert all(list(row) == ["instruction", "input", "output", "category"] for row in ANSWERED)
    assert all(isinstance(value, str) and value == value.strip() for row in ANSWERED for value in row.values())


def test_about_a_third_of_the_instructions_have_an_input():
    for of in INSTRUCTIONS.values():
        assert 0.28 < sum(bool(row["input"]) for row in of) / len(of) < 0.38


def test_no_instruction_is_there_twice_nor_nearly():
    """Not across training and held-out either; the answers' wording differs, too."""
    assert most_alike(QUESTIONS)[0] < 0.6, most_alike(QUESTIONS)
    assert len({row["output"] for row in ANSWERED}) == len({row["instruction"] for row in ANSWERED}) == len(ANSWERED)


def test_every_answer_begins_like_a_sentence_and_ends_cleanly():
    assert not [row["output"] for row in ANSWERED if not ends_cleanly(row["output"]) or not re.match(r"[A-Z0-9\"{\[|]", row["output"])]
    assert not ends_cleanly("The journey takes 2 hours and") and not ends_cleanly("1. A towel.\n2. Sun") and not ends_cleanly("Dear Jo,\n\nI am")


def test_an_answer_has_at_most_80_words_and_8_sentences():
    for row in ANSWERED:
        assert len(row["output"].split()) <= 80
        sentences = row["output"].count("\n") + 1 if row["output"].startswith("1. ") else len(re.findall(r"[.!?](?=\s|\Z)", row["output"]))
        assert sentences <= 8, row["output"]


def test_lists_are_numbered_from_one_and_each_point_ends_with_a_stop():
    lists = [row["output"].split("\n") for row in ANSWERED if row["output"].startswith("1. ")]
    assert len(lists) > 40
    for points in lists:
        assert len(points) > 1
        for number, point in enumerate(points, start=1):
            assert re.fullmatch(rf"{number}\. .*[.!?]", point), point


def test_every_sum_comes_out():
    """Each "12 x 7 = 84" is computed; an arithmetic answer has one at least, and what its last one comes to is in the last sentence."""
    for row in ANSWERED:
        found = list(sums(row["output"]))
        for left, right in found:
            assert eval(left.replace("x", "*")) == pytest.approx(right, abs=1e-9), row["output"]  # digits and + - x / only, by the pattern
        if row["category"] == "arithmetic":
            assert found and re.search(rf"\b{found[-1][1]:g}\b", row["output"].split("so ")[-1]), row["output"]


def test_what_is_meant_to_be_json_is_json():
    answers = [json.loads(row["output"]) for row in ANSWERED if row["output"][0] in "{["]
    assert {type(answer) for answer in answers} == {dict, list}


def test_facts_are_60_questions_with_three_wrong_answers_each():
    assert len({row["question"] for row in FACTS}) == len(FACTS) == 60
    for row in FACTS:
        assert list(row) == ["question", "answer", "wrong"] and row["question"].endswith("?")
        assert len({row["answer"].lower(), *map(str.lower, row["wrong"])}) == 4


def test_a_facts_right_answer_cannot_be_told_by_its_form():
    """All four begin alike (capital, digit, "The", "An"), and right answers are as long as wrong ones."""
    article = re.compile(r"(The|An?) ")
    for row in FACTS:
        four = [row["answer"], *row["wrong"]]
        assert len({answer[0].isdigit() for answer in four}) == 1 and len({bool(article.match(answer)) for answer in four}) == 1, four
    right, wrong = sum(len(row["answer"]) for row in FACTS) / 60, sum(len(answer) for row in FACTS for answer in row["wrong"]) / 180
    assert abs(right - wrong) < 1


def test_no_instruction_teaches_a_fact_nor_a_wrong_answer_to_one():
    """Else the questions would measure the training data and not what the model knew: no row shares an answer and half of the question's words."""
    for fact, row in product(FACTS, ANSWERED):
        asked, told = words(fact["question"]) - NOTHING, words(" ".join(row.values()))
        answers = [words(answer) - NOTHING for answer in (fact["answer"], *fact["wrong"])]
        assert not (2 * len(asked & told) >= len(asked) and any(answer <= words(row["output"]) for answer in answers)), (fact, row)
