"""Texts with a label as a language model reads and answers them."""

from __future__ import annotations

import math

import pytest
import tokenizers
from tiny_workshop import BOS, END, EOS, chat_tokenizer, ids, our_llama, plain_tokenizer

from lora_lab import LoraLabError
from lora_lab.data import Rows, filled, verbalize
from lora_lab.data.objectives import objective_of
from lora_lab.data.seq2seq import encode_answers
from lora_lab.data.verbalizing import one_begins_another, read_ids
from lora_lab.training import TrainConfig, evaluate, score_choices

TOKENIZER, TEMPLATE, ANSWERS = chat_tokenizer(), "Review: {text}\nSentiment:", [" bad", " good"]
ROWS = [{"text": "dull {text}", "label": 0}, {"text": "fine", "label": 1}]


def test_only_the_answer_and_its_end_have_labels():
    first, second = verbalize(ROWS, TOKENIZER, TEMPLATE, ANSWERS)
    read = ids("Review: dull {text}\nSentiment:")
    assert first == {"input_ids": read + ids(" bad") + [END], "labels": [-100] * len(read) + ids(" bad") + [END]}
    assert second["labels"][-6:] == [*ids(" good"), END]
    assert verbalize(ROWS, TOKENIZER, TEMPLATE, ANSWERS, end=False)[0]["input_ids"] == read + ids(" bad")


def test_the_loss_is_what_score_choices_scores():
    """Training and scoring tokenise alike: the mean loss is minus the log-probability of the answers, per token."""
    model = our_llama(max_position_embeddings=128)
    scores = score_choices(model, [filled(TEMPLATE, row) for row in ROWS], TOKENIZER, ANSWERS, end=True, progress=False)
    rows = verbalize(ROWS, TOKENIZER, TEMPLATE, ANSWERS)
    tokens = len(" bad") + len(" good") + 2
    expected = -float(scores[0, 0] + scores[1, 1]) / tokens
    loss = evaluate(model, objective_of(model).encode(rows, TOKENIZER, None), TrainConfig(progress=False))
    assert math.isclose(loss, expected, rel_tol=1e-5)


def beginning_tokenizer():
    """As Llama's: every text begins with <s>, unless it is told not to."""
    tokenizer = plain_tokenizer()
    tokenizer.backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def test_a_text_begins_as_the_tokenizer_begins_every_text():
    """Once, also where the template says so itself; never where the tokenizer does not do so unasked."""
    for template, tokenizer, begin in ((TEMPLATE, beginning_tokenizer(), [BOS]), ("<s>" + TEMPLATE, beginning_tokenizer(), [BOS]),
                                       (TEMPLATE, plain_tokenizer(), [])):  # fmt: skip
        read = read_ids(filled(template, ROWS[1]), tokenizer)
        assert read == [*begin, *ids("Review: fine\nSentiment:")]
        assert verbalize(ROWS, tokenizer, template, ANSWERS)[1]["input_ids"] == [*read, *ids(" good"), EOS]


@pytest.mark.parametrize(("answers", "expected"), [
    ([" billing", " billing dispute"], True), ([" billing dispute", " billing"], True), ([" bad", " good"], False), ([" no", " none", " x"], True),
])  # fmt: skip
def test_answers_of_which_one_begins_another_are_known(answers, expected):
    assert one_begins_another(answers, TOKENIZER) == expected


def test_a_label_is_a_number_or_the_answer_itself():
    rows = [{"text": "x", "label": "good"}, {"text": "x", "label": 1}]
    first, second = verbalize(rows, TOKENIZER, TEMPLATE, ANSWERS)
    assert first == second


def test_an_encoder_decoder_answers_apart():
    """Its labels are the answer, and always end."""
    rows = verbalize(ROWS, TOKENIZER, TEMPLATE, ANSWERS, encodes=True)
    assert rows[1] == {"input_ids": TOKENIZER.encode("Review: fine\nSentiment:"), "labels": [*ids(" good"), END]}
    assert encode_answers(rows, None) == list(rows)


def test_both_texts_of_a_pair_have_their_places():
    assert filled("{text} / {text_pair}", {"text": "{text_pair}", "text_pair": "{text}"}) == "{text_pair} / {text}"


def test_rows_keep_their_lines():
    rows = verbalize(Rows(ROWS, "reviews.jsonl", [3, 7]), TOKENIZER, TEMPLATE, ANSWERS)
    assert rows.where(1) == "reviews.jsonl, line 7"


MISTAKES = {
    "no text": ([{"label": 0}], TEMPLATE, "row 0: the row has the fields"),
    "no label": ([{"text": "x"}], TEMPLATE, "row 0: its answer None is none of the choices"),
    "a label without an answer": ([*ROWS, {"text": "x", "label": 2}], TEMPLATE, "row 2: its answer 2 is none of"),
    "no place for the text": (ROWS, "Sentiment:", "has no {text}"),
    "no rows": ([], TEMPLATE, "holds no rows"),
}


@pytest.mark.parametrize(("rows", "template", "message"), MISTAKES.values(), ids=MISTAKES)
def test_rows_that_cannot_be_asked_are_named(rows, template, message):
    with pytest.raises(LoraLabError, match=message):
        verbalize(rows, TOKENIZER, template, ANSWERS)
