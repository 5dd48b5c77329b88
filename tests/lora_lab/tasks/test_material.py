"""A user's rows for a task: three parts without a common text, what was dropped and why, and a preview that says so."""

from __future__ import annotations

from collections import Counter

import pytest
from task_tools import decoder, dialogues, encoder, instructions, jsonl, opinions, t5, table

from lora_lab import LoraLabError
from lora_lab.data import load
from lora_lab.data.formats import BUNDLED
from lora_lab.data.tables import Classes
from lora_lab.tasks import gather, preview

PARTS = ("train", "validation", "test")


def texts(material, part):
    return {row["text"] for row in material.part(part)}


def distinct(count=60):
    return [{"text": f"text {number}", "label": number % 2} for number in range(count)]


# Parts ------------------------------------------------------------------------------------------------------------------------


def test_rows_that_nobody_divided_are_divided_the_same_way_every_time_a_tenth_of_each_class(tmp_path):
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", distinct()))
    again = gather("sentiment", jsonl(tmp_path / "b.jsonl", distinct()[::-1]))
    assert [len(material.part(part)) for part in PARTS] == [48, 6, 6]
    for part in PARTS:
        assert texts(material, part) == texts(again, part) and sum(row["label"] for row in material.part(part)) * 2 == len(material.part(part))
    assert not texts(material, "train") & (texts(material, "test") | texts(material, "validation"))


def test_a_text_is_never_in_two_parts(tmp_path):
    """However often and with whatever label it comes; rows that say the same twice are dropped."""
    rows = [{"text": f"text {number % 20}", "label": number // 20 % 2} for number in range(80)]
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", rows))
    train, validation, test = (texts(material, part) for part in PARTS)
    assert train and test and validation and not train & test and not train & validation and not validation & test
    assert material.dropped["there twice"] == 40


def test_the_parts_that_a_source_has_stay_as_they_are(tmp_path):
    """SST-2 has labels for training and validation alone. Training rows that are held back, too, are dropped, held-out rows never."""
    train, held = distinct(40), distinct(44)[36:]
    jsonl(tmp_path / "train.jsonl", train)
    jsonl(tmp_path / "validation.jsonl", held)
    jsonl(tmp_path / "test.jsonl", [{"text": "secret", "label": -1}] * 5)
    material = gather("sentiment", tmp_path)
    assert texts(material, "test") == {row["text"] for row in held} and not texts(material, "train") & texts(material, "test")
    assert material.dropped["the label '-1' is none of the classes"] == 5 and "the validation rows are it" in "".join(material.notes)
    assert material.dropped["in the train rows, and held back, too"] == 4 and len(material.validation) + len(material.train) == 36


def test_a_dialogue_that_three_people_summarised_is_three_rows(tmp_path):
    """DialogSum's own files: dialogsum.train.jsonl has a summary, dialogsum.test.jsonl summary1 to summary3 with topic1 to topic3."""
    train = [{"fname": f"train_{i}", "dialogue": f"A: {i}", "summary": f"It is {i}.", "topic": "n"} for i in range(20)]
    jsonl(tmp_path / "dialogsum.train.jsonl", train)
    three = [{"fname": f"test_{i}", "dialogue": f"B: {i}", **{f"{name}{j}": f"{j} says {i}." for name in ("summary", "topic") for j in (1, 2, 3)}}
             for i in range(2)]  # fmt: skip
    jsonl(tmp_path / "dialogsum.test.jsonl", three)
    test = gather("summarization", tmp_path).test
    assert list(test) == [{"dialogue": f"B: {i}", "summary": f"{j} says {i}."} for i in range(2) for j in (1, 2, 3)]
    assert test.where(4).endswith("dialogsum.test.jsonl, line 2")
    alone = gather("summarization", tmp_path / "dialogsum.test.jsonl", {"summary": "summary2"}, wanted=())
    assert [row["summary"] for row in alone.part("all")] == ["2 says 0.", "2 says 1."]


def test_a_test_without_a_column_of_labels_is_none(tmp_path):
    """GLUE's SST-2: test.tsv has index and sentence, and the labels are kept secret."""
    lines = [f"text {number}\t{number % 2}" for number in range(40)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines[:30]), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "\n".join(lines[30:]), encoding="utf-8")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tsecret\n1\thidden\n", encoding="utf-8")
    material = gather("sentiment", tmp_path)
    assert len(material.test) == 10 and material.dropped["no label"] == 2 and "the validation rows are it" in "".join(material.notes)


def test_a_source_for_one_part_and_no_parts_at_all(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", distinct(30))
    other = jsonl(tmp_path / "b.jsonl", [{"text": "other", "label": 1}, {"text": "more", "label": 0}])
    material = gather("sentiment", path, parts={"validation": other}, wanted=("train", "validation"))
    assert (len(material.train), len(material.validation)) == (30, 2) and "test" not in material.parts
    assert len(gather("sentiment", path, wanted=()).part("all")) == 30
    with pytest.raises(LoraLabError, match=r"has no test rows \(it has: train \(30\), validation \(2\)\)"):
        material.part("test")


def test_too_few_rows_are_not_divided(tmp_path):
    with pytest.raises(LoraLabError, match="too few to hold some back"):
        gather("sentiment", jsonl(tmp_path / "a.jsonl", distinct(2)))


def test_a_limit_takes_each_classs_share_in_whatever_order_the_rows_stand(tmp_path):
    """Every n-th row of a file that alternates would be of one class. A few rows are among the more, and a rare class is there."""
    rows = [{"text": f"text {number}", "label": "rare" if number == 50 else ("no", "yes")[number % 2]} for number in range(120)]
    whole = gather("sentiment", jsonl(tmp_path / "a.jsonl", rows), wanted=())
    few, more = ([row["text"] for row in whole.first(all=count).part("all")] for count in (8, 60))
    labels = Counter(row["label"] for row in whole.first(all=60).part("all"))
    assert labels == {0: 30, 1: 1, 2: 29} or labels == {0: 29, 1: 1, 2: 30}
    assert {*few} < {*more} and more == sorted(more, key=lambda text: int(text.split()[1]))
    again = gather("sentiment", jsonl(tmp_path / "b.jsonl", rows[::-1]), wanted=()).first(all=8)
    assert {row["text"] for row in again.part("all")} == {*few}


def test_rows_without_classes_are_limited_by_their_texts_and_of_one_text_first_one(tmp_path):
    """The bundled reviews are positive, neutral, negative, and again: each third would be of one kind."""
    kinds = Counter(row["instruction"].split()[2] for row in gather("reviews", "reviews", wanted=()).first(all=48).part("all"))
    assert {*kinds} == {"positive", "neutral", "negative"} and min(kinds.values()) >= 8
    thrice = [{**row, "summary": f"{row['summary']} {number}"} for row in dialogues(9) for number in range(3)]
    some = gather("summarization", jsonl(tmp_path / "d.jsonl", thrice), wanted=()).first(all=9).part("all")
    assert len({row["dialogue"] for row in some}) == 9


def test_a_class_that_nothing_is_trained_of_is_noted(tmp_path):
    """Two rows of one are the test's and the validation's."""
    rows = [*distinct(40), {"text": "rare", "label": 2}, {"text": "rare, too", "label": 2}]
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", rows))
    assert "no training row is positive: all 2 are held back, so it cannot be learned" in material.notes
    assert not any("no training row" in note for note in gather("sentiment", jsonl(tmp_path / "b.jsonl", distinct(40))).notes)


def test_a_source_of_its_own_without_a_usable_row_is_refused(tmp_path):
    """A tenth of the training rows would stand in its place."""
    other = jsonl(tmp_path / "other.jsonl", [{"text": "", "label": 1}, {"text": "x", "label": "unheard of"}])
    with pytest.raises(LoraLabError, match="no row of .*other.jsonl can be used: 1 no text, 1 the label 'unheard of' is none of the classes"):
        gather("sentiment", jsonl(tmp_path / "a.jsonl", distinct()), classes=Classes(("0", "1"), {"0": 0, "1": 1}), parts={"test": other})


def test_what_is_made_of_the_training_rows_is_known(tmp_path):
    path, other = jsonl(tmp_path / "a.jsonl", distinct()), jsonl(tmp_path / "b.jsonl", [{"text": "c", "label": 0}, {"text": "d", "label": 1}])
    assert {*gather("sentiment", path).made} == {"test", "validation"}
    assert gather("sentiment", path, parts={"test": other}).made == ("validation",)
    assert gather("sentiment", path, parts={"validation": other}, wanted=("train", "validation")).made == ()


# Rows -------------------------------------------------------------------------------------------------------------------------


def test_numbers_of_reviews_have_the_names_that_are_given(tmp_path):
    rows = [{"product": f"hat {number}", "review": f"fits {number}", "rating": 1 + number % 2} for number in range(4)]
    path = jsonl(tmp_path / "r.jsonl", rows)
    asked = [row["instruction"] for row in gather("reviews", path, labels=["bad", "good"], wanted=()).part("all")]
    assert asked == ["Write a bad review of the following product.", "Write a good review of the following product."] * 2
    with pytest.raises(LoraLabError, match="the label is a number, expected a word such as positive \\(--labels says"):
        gather("reviews", path)


def test_names_of_classes_are_refused_where_there_are_none(tmp_path):
    for task, rows in (("summarization", dialogues()), ("instruction", instructions()), ("reviews", instructions())):
        with pytest.raises(LoraLabError, match=f"--labels a b: these rows of --task {task} have no classes"):
            gather(task, jsonl(tmp_path / "r.jsonl", rows), labels=["a", "b"])


def test_what_cannot_be_learned_from_is_dropped_and_counted_by_reason(tmp_path):
    rows = [*distinct(20), {"text": " ", "label": 1}, {"text": None, "label": 0}, {"text": 3, "label": 0}, {"text": "x", "label": ""}]
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", rows), {"label": "label", "text": "text"}, wanted=())
    assert dict(material.dropped) == {"no text": 2, "the text is no text but a int": 1, "no label": 1} and len(material.part("all")) == 20


CHATS = {
    "OpenAI": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "ShareGPT": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
}


@pytest.mark.parametrize("turns", CHATS.values(), ids=CHATS)
def test_chats_of_both_kinds_become_messages(tmp_path, turns):
    column = "messages" if "role" in turns[0] else "conversations"
    bad = [{column: turns[:1]}, {column: "nonsense"}, {column: [{"role": "nobody", "content": "x"}]}]
    material = gather("instruction", jsonl(tmp_path / "a.jsonl", [{column: turns}, *bad]), wanted=())
    assert list(material.part("all")) == [{"messages": CHATS["OpenAI"]}]
    assert sum(material.dropped.values()) == 3 and "no chat of user and assistant" in material.dropped


def test_chats_with_one_system_message_are_divided_by_their_questions(tmp_path):
    """Else all of them would be the same text, and none left for training."""
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {number // 2}"},
                          {"role": "assistant", "content": f"Answer {number}"}]} for number in range(40)]  # fmt: skip
    material = gather("instruction", jsonl(tmp_path / "a.jsonl", rows))
    asked = [{row["messages"][1]["content"] for row in material.part(part)} for part in PARTS]
    assert sum(map(len, asked)) == 20 == len(set.union(*asked)) and len(material.train) >= 30


def test_half_a_character_is_no_text(tmp_path):
    """JSON can spell half of a surrogate pair, and no tokenizer takes it."""
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", [*distinct(20), {"text": "half \ud83d", "label": 1}]), wanted=())
    assert material.dropped == {"the text holds half of a character": 1} and len(material.part("all")) == 20


def test_a_part_that_was_dropped_says_why(tmp_path):
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", distinct(20)))
    model, tokenizer = decoder()
    nothing = material.within(material.reader(model, tokenizer), model, 5)
    with pytest.raises(LoraLabError, match=r"no train rows \(it has: none; dropped: 16 longer than 5 tokens \(train\)"):
        nothing.part("train")


@pytest.mark.parametrize(("label", "word"), [("Positive", "positive"), ("neg", "negative"), ("Mixed", "mixed")])
def test_reviews_become_instructions(tmp_path, label, word):
    rows = [{"product": "A lamp", "review": "Bright.", "sentiment": label}]
    material = gather("reviews", table(tmp_path / "r.csv", rows), wanted=())
    instruction = f"Write a {word} review of the following product."
    assert list(material.part("all")) == [{"instruction": instruction, "input": "A lamp", "output": "Bright."}]


@pytest.mark.parametrize("write", [table, jsonl])
def test_no_review_is_asked_for_by_a_number(tmp_path, write):
    """"Write a 5 review" is no instruction, whether the file is CSV or JSON."""
    path = write(tmp_path / ("r.csv" if write is table else "r.jsonl"), [{"product": "A lamp", "review": "Bright.", "rating": 5}])
    with pytest.raises(LoraLabError, match="1 the label is a number, expected a word such as positive"):
        gather("reviews", path)


def test_rows_of_another_task_are_recognised(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{**row, "topic": "ab"[row["id"] % 2]} for row in dialogues()])
    with pytest.raises(LoraLabError, match=r"'topic' could be the label \(--label-column\).*DialogSum.*--task summarization\?"):
        gather("sentiment", path)  # by their values they would do
    with pytest.raises(LoraLabError, match=r"is not found.*--task summarization\?"):
        gather("instruction", path)
    assert gather("sentiment", path, {"text": "dialogue", "label": "topic"}, wanted=()).classes.names == ("a", "b")
    with pytest.raises(LoraLabError, match="--task sumarization: expected one of .*did you mean 'summarization'"):
        gather("sumarization", path)


def test_parts_with_other_columns_and_sources_without_a_usable_row_are_refused(tmp_path):
    jsonl(tmp_path / "parts" / "train.jsonl", distinct(20))
    jsonl(tmp_path / "parts" / "test.jsonl", [{"sentence": "x", "label": 0}])
    with pytest.raises(LoraLabError, match=r"the test rows have no column 'text', theirs are \['sentence', 'label'\]"):
        gather("sentiment", tmp_path / "parts")
    with pytest.raises(LoraLabError, match="no row of .* can be used: 2 no summary"):
        gather("summarization", jsonl(tmp_path / "d.jsonl", [{"dialogue": "x", "summary": ""}] * 2))


def test_every_bundled_source_can_be_used_for_its_task():
    """Each brings its held-out rows, which are the test."""
    for task, source in (("sentiment", "sentiment"), ("summarization", "dialogues"), ("instruction", "instructions"), ("reviews", "reviews")):
        material, (train, held_out) = gather(task, source), load(source)
        assert len(material.test) == len(held_out) and not material.dropped, source
        assert len(material.train) + len(material.validation) == len(train) and len(material.validation) >= 10
    assert {*BUNDLED} == {"sentiment", "dialogues", "instructions", "reviews"}


# Preview ----------------------------------------------------------------------------------------------------------------------


def test_the_preview_says_what_was_understood(tmp_path):
    model, tokenizer = decoder(max_position_embeddings=64)
    rows = [*distinct(40), {"text": "long " * 30, "label": 1}, {"text": "", "label": 0}]
    material = gather("sentiment", jsonl(tmp_path / "a.jsonl", rows))
    reader = material.reader(model, tokenizer)
    said = preview(material.within(reader, model), reader)
    for expected in ("text and label (SST-2)", "text        'text', by its name", "classes     0 -> negative, 1 -> positive",
                     "validation  4 rows (2 negative, 2 positive), tokens: median 3", "1 no text", "1 longer than 64 tokens (",
                     "a tenth each of the rows is held back for test and validation", "    Review: text 0\n    Sentiment:[ negative]"):  # fmt: skip
        assert expected in said, expected


@pytest.mark.parametrize(("task", "rows", "model", "rendered"), [
    ("sentiment", opinions, encoder, "the first row as the model reads it, what it is to answer in brackets:\n    bad [negative]"),
    ("summarization", dialogues, decoder, "<|im_start|>user\n    Summarize the following dialogue.\n    \n    A: Is 0 good?\n    B: Yes.<|im_end|>"),
    ("summarization", dialogues, t5, "    summarize:\n    \n    A: Is 0 good?\n    B: Yes.[0 is good.]"),
    ("instruction", instructions, decoder, "<|im_start|>assistant\n    [0.]"),
])  # fmt: skip
def test_the_first_row_is_shown_as_this_model_reads_it(tmp_path, task, rows, model, rendered):
    model, tokenizer = model()
    material = gather(task, jsonl(tmp_path / "a.jsonl", rows()), wanted=())
    assert rendered in preview(material, material.reader(model, tokenizer))


def test_minus_one_is_a_class_where_other_labels_stand_beside_it(tmp_path):
    """Opinions of -1, 0 and 1; a part of nothing but -1 is a secret test."""
    rows = [{"text": f"text {number}", "label": number % 3 - 1} for number in range(60)]
    material = gather("sentiment", jsonl(tmp_path / "rows.jsonl", rows))
    assert material.classes.names == ("negative", "neutral", "positive") and not material.dropped
    assert {row["label"] for row in material.train} == {0, 1, 2}


def test_talks_that_begin_with_an_answer_begin_with_the_question(tmp_path):
    """ShareGPT's do."""
    talks = [{"conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": "Yes."}]}
             for i in range(4)]  # fmt: skip
    rows = gather("instruction", jsonl(tmp_path / "rows.jsonl", talks), wanted=()).part("all")
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"] and len(rows) == 4


def test_a_talk_that_the_template_refuses_is_dropped_and_counted(tmp_path):
    """One of many must not end the run; where all are refused, the first says why, and where it stands."""
    model, tokenizer = decoder()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'odd' %}{{ raise_exception('no odd talks') }}{% endif %}{{ m.role }}: {{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talks = [{"messages": [{"role": "user", "content": "odd" if i in (3, 5) else f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(8)]
    material = gather("instruction", jsonl(tmp_path / "rows.jsonl", talks), wanted=())
    fitting = material.within(material.reader(model, tokenizer), model)
    assert len(fitting.part("all")) == 6 and fitting.dropped["the chat template refused: no odd talks"] == 2
    odd = gather("instruction", jsonl(tmp_path / "odd.jsonl", [talks[3]]), wanted=())
    with pytest.raises(LoraLabError, match="odd.jsonl, line 1: .*no odd talks"):
        odd.within(odd.reader(model, tokenizer), model)


def test_a_system_message_may_have_a_column_of_its_own(tmp_path):
    """LLaMA-Factory's ShareGPT files."""
    talk = [{"from": "human", "value": "Question?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"conversations": talk, "system": "Be brief."}, {"conversations": [{"from": "system", "value": "Be long."}, *talk], "system": "No."},
            {"conversations": talk, "system": None}]  # fmt: skip
    found = gather("instruction", jsonl(tmp_path / "rows.jsonl", rows), wanted=()).part("all")
    assert [row["messages"][0] for row in found] == [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be long."},
                                                     {"role": "user", "content": "Question?"}]  # fmt: skip
