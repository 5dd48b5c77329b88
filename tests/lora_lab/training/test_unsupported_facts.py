"""Wrong facts that code can see: a number is the same however it is spelled, a name is no ordinary word, and right texts raise few alarms."""

from __future__ import annotations

import pytest
from task_tools import decoder, jsonl

from lora_lab import data
from lora_lab.tasks import Reading, gather
from lora_lab.training.evaluation import Written, ordinary_words, unsupported_facts


@pytest.mark.parametrize(("text", "source"), [
    ("She is 26.", "I turned twenty six."), ("She is 26.", "twenty-six"), ("She is twenty-six.", "I am 26"), ("in 1998", "nineteen ninety eight"),
    ("in 2008", "two thousand eight"), ("in 2008", "in two thousand and eight"), ("on 07/29/2008", "July twenty ninth two thousand eight"),
    ("130/80", "one thirty over eighty"), ("1,200 pounds", "twelve hundred, no, one thousand two hundred"), ("250 mg", "two hundred fifty"),
    ("98.6 degrees", "ninety eight point six"), ("on the 3rd", "on March third"), ("2500", "two thousand five hundred"), ("20 drops", "two zero"),
    ("two visits", "twice"), ("200,000", "two hundred thousand"),
])  # fmt: skip
def test_a_number_is_the_same_however_it_is_spelled(text, source):
    assert unsupported_facts(text, source, {"she"}) == []


@pytest.mark.parametrize(("text", "source", "wrong"), [
    ("She is 27.", "I turned twenty six.", ["27"]), ("15 euros", "5 euros", ["15"]), ("twelve of them", "ten of them", ["12"]),
    ("in 1989", "nineteen ninety eight", ["1989"]), ("2 and 2 and 3", "two", ["3"]), ("thirty visits", "three visits", ["30"]),
])  # fmt: skip
def test_a_number_that_nobody_said_is_noticed_once(text, source, wrong):
    assert unsupported_facts(text, source, {"she"}) == wrong


def test_the_number_words_of_two_sentences_are_two_numbers():
    assert unsupported_facts("He is 26.", "I am twenty. Six of us came.", {"he"}) == ["26"]


@pytest.mark.parametrize("text", ["7" * 5000, "seven " * 5000, "seven hundred thousand " * 2000], ids=["digits", "words", "thousands"])
def test_a_number_without_end_is_read_as_several(text):
    """Python refuses to write or read a number of more than 4,300 digits."""
    assert unsupported_facts(text, text, set()) == []
    assert 0 < len(unsupported_facts(text, "nothing", set())) < 10


def test_one_alone_is_no_number():
    assert unsupported_facts("No one saw the other one.", "nothing", {"no"}) == []


def test_a_name_is_a_word_with_a_capital_that_is_not_ordinary_and_not_in_the_source():
    assert unsupported_facts("Denies pain. Zora told Dr. Wu and Ben's dog.", "wu: BEN has no pain", {"denies"}) == ["Zora"]
    assert unsupported_facts("Denies pain.", "no pain", set()) == ["Denies"]


def test_ordinary_words_are_those_in_small_letters_of_the_texts_and_of_the_bundled_data():
    found = ordinary_words(["Zora was obtunded. Obtunded she stayed."])
    assert {"obtunded", "was", "because"} <= found and "zora" not in found


def test_right_summaries_raise_few_alarms_and_those_of_other_dialogues_many():
    """The count itself, counted."""
    rows = data.load("dialogues")[1]
    ordinary = ordinary_words(())
    right = [unsupported_facts(row["summary"], row["dialogue"], ordinary) for row in rows]
    others = [unsupported_facts(other["summary"], row["dialogue"], ordinary) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    assert sum(map(bool, right)) < 0.1 * len(rows) and sum(map(bool, others)) > 0.9 * len(rows)


def test_a_summarys_score_is_the_mean_of_its_rows(tmp_path, monkeypatch):
    model, tokenizer = decoder()
    rows = [{"dialogue": f"A: I am {age}.\nB: And Ben is two.", "summary": f"A is {age}."} for age in (4, 5)]
    material = gather("summarization", jsonl(tmp_path / "rows.jsonl", rows), wanted=())
    reader = material.reader(model, tokenizer, Reading(generation={"max_new_tokens": 2}))
    monkeypatch.setattr(reader, "written", lambda *_: [Written("He is 9, Zora 8 and Ben 2.", True), Written("Ben is five.", True)])
    assert reader.scores(model, material.part("all"))["wrong facts"] == 3 / 2
    assert reader.without_model(material.part("all"))[1]["wrong facts"] == 0
