"""ROUGE equals Google's `rouge-score`, the stemmer NLTK's, the subsequence a plain table's."""

from __future__ import annotations

import random

import nltk.stem.porter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lora_lab import LoraLabError, data
from lora_lab.training.evaluation import Rouge, rouge
from lora_lab.training.evaluation.rouge_scores import KINDS, common_length, words
from lora_lab.training.evaluation.stemmer import STEP_2, STEP_3, STEP_4, stem

PORTER = nltk.stem.porter.PorterStemmer()
PIECES = ["the", "cat", "cats", "sat", "on", "a", "mat", "dog", "running", "\n", "\n\n", ".", "Été", "42"]
FEW = st.lists(st.sampled_from(PIECES), max_size=25).map(" ".join)


def theirs(prediction: str, reference: str, use_stemmer: bool) -> dict[str, tuple[float, float, float]]:
    return {kind: tuple(score) for kind, score in RougeScorer([*KINDS, "rouge3"], use_stemmer=use_stemmer).score(reference, prediction).items()}


def ours(prediction: str, reference: str, use_stemmer: bool) -> dict[str, tuple[float, float, float]]:
    scores = rouge([prediction], [reference], kinds=[*KINDS, "rouge3"], use_stemmer=use_stemmer)
    return {kind: (score.precision, score.recall, score.f1) for kind, score in scores.items()}


@settings(max_examples=150)
@given(FEW, FEW, st.booleans())
def test_every_score_is_rouge_scores(prediction, reference, use_stemmer):
    assert ours(prediction, reference, use_stemmer) == theirs(prediction, reference, use_stemmer)


@settings(max_examples=100)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_characters_are_tokenised_alike(prediction, reference):
    assert ours(prediction, reference, True) == theirs(prediction, reference, True)


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_on_real_texts_the_mean_is_the_mean_of_rouge_scores(use_stemmer):
    train, held_out = data.load("reviews")
    references = [row["output"] for row in held_out[:12]]
    predictions = [row["output"].replace(". ", ".\n") for row in train[:12]]
    scores, pairs = rouge(predictions, references, use_stemmer=use_stemmer), list(zip(predictions, references, strict=True))
    for kind in KINDS:
        expected = [theirs(*pair, use_stemmer)[kind] for pair in pairs]
        means = [sum(column) / len(pairs) for column in zip(*expected, strict=True)]
        assert [scores[kind].precision, scores[kind].recall, scores[kind].f1] == pytest.approx(means, rel=1e-12)
    assert 0.05 < scores["rougeL"].f1 < scores["rouge1"].f1 < 0.6


def test_of_several_references_the_best_counts_each_kind_by_itself():
    references = ["the cat sat on the mat", "mat the on sat cat the dog ran", "nothing"]
    scorer = RougeScorer([*KINDS], use_stemmer=False).score_multi(references, "the cat sat down")
    scores = rouge(["the cat sat down"], [references])
    assert {kind: (score.precision, score.recall, score.f1) for kind, score in scores.items()} == {kind: tuple(s) for kind, s in scorer.items()}


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcde"), max_size=70))
def test_the_bits_of_a_number_hold_the_table_of_subsequences(left, right):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert common_length(left, right) == table[-1][-1]


def made_up_words() -> list[str]:
    """Stems of every measure with every ending the stemmer knows, two deep; and every word of the bundled reviews."""
    endings = ["", "s", "es", "ies", "sses", "ed", "eed", "ied", "ing", "y", "e", "ll", "logi", "ion",
               *(suffix for suffix, _ in STEP_2 + STEP_3 + STEP_4)]  # fmt: skip
    stems = ["", "a", "b", "sky", "tr", "hop", "fil", "fall", "happ", "conflat", "siz", "troubl", "adopt", "syzyg", "yyy", "geo", "archaeo",
             "x1", "controll"]  # fmt: skip
    made = [stem + first + second for stem in stems for first in endings for second in endings]
    real = words(" ".join(row["output"] for row in data.load("reviews")[0]))
    return [*random.Random(0).sample(made, 6000), *real, *["skies", "dying", "news", "innings", "proceed", "is", "y"]]


def test_stems_are_nltks():
    """rouge-score stems with it; NLTK's own changes to Porter's algorithm included."""
    given = sorted({*made_up_words()})
    assert {word: stem(word) for word in given} == {word: PORTER.stem(word) for word in given}
    assert sum(stem(word) != word for word in given) > len(given) / 2


@settings(max_examples=200)
@given(st.text("aeiouybcdlnstxz", max_size=12))
def test_stems_of_anything_are_nltks(word):
    assert stem(word) == PORTER.stem(word)


def test_short_words_are_not_stemmed_in_a_score():
    assert words("its gas dies runs", use_stemmer=True) == ["its", "gas", "die", "run"]


def test_nothing_in_common_and_nothing_at_all_are_0():
    zero = Rouge(0.0, 0.0, 0.0)
    assert set(rouge(["", "x y", "?!"], ["a b", "", "?!"]).values()) == {zero}
    assert rouge(["a b"], ["A-b."])["rouge2"] == Rouge(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("predictions", "references", "kinds", "message"), [
    (["a"], ["a", "b"], KINDS, "1 predictions and 2 references"), ([], [], KINDS, "at least one"), ("ab", ["a", "b"], KINDS, "one text and 2"),
    (["a"], [[]], KINDS, "a prediction has no reference"), (["a"], ["a"], ["rouge-l"], "kinds has 'rouge-l'"), (["a"], ["a"], ["rouge0"], "rouge0"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(predictions, references, kinds, message):
    with pytest.raises(LoraLabError, match=message):
        rouge(predictions, references, kinds=kinds)
