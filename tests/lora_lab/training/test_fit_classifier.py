"""`fit` on sequence classifiers: what a row is, how rows weigh, and that classes, numbers and pairs of texts are learned."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from bert_tools import SMALL, WORDS, ours, theirs, word_pieces
from tiny_workshop import QUIET, same_bits, weights

import lora_lab
from lora_lab import LoraLabError, data
from lora_lab.data.batching import collate_classes
from lora_lab.data.classification import encode_labelled
from lora_lab.data.objectives import ClassificationObjective, objective_of
from lora_lab.training import fit
from lora_lab.training.fitting import evaluate

GOOD, BAD = ["good", "very good", "so good"], ["bad", "very bad", "so bad"]


def classifier(labels: int = 2, family: str = "Bert", **changes: Any) -> Any:
    torch.manual_seed(1)
    return ours(theirs(f"{family}ForSequenceClassification", num_labels=labels, vocab_size=len(WORDS), **changes))


def film_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """"the cat film ran very good": the word of judgement says the class, the others are noise."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        label = generator.randrange(2)
        noise = [generator.choice(["the", "cat", "dog", "film", "ran", "sat", "on", "a", "mat"]) for _ in range(generator.randrange(6))]
        cut = generator.randint(0, len(noise))
        rows.append({"text": " ".join([*noise[:cut], generator.choice((BAD, GOOD)[label]), *noise[cut:]]), "label": label})
    return rows


def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    examples = encode_labelled(rows, word_pieces(), None, 2)
    batch = collate_classes(examples, 0)
    with torch.no_grad():
        return float((model(**batch).logits.argmax(-1) == batch["labels"]).float().mean())


# Learning -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_separable_task_is_learned(family, method):
    """From chance to nearly all of the held-out rows, by a new head and either adapters or all weights."""
    torch.manual_seed(0)
    model = classifier(family=family)
    if method == "lora":
        lora_lab.inject(model, rank=4, modules_to_save=["classifier"])
    before, held_out = accuracy(model, film_rows(60, seed=9)), film_rows(60, seed=9)
    settings = {"epochs": 8, "learning_rate": 3e-3 if method == "full" else 1e-2, "micro_batch_size": 16, **QUIET}
    result = fit(model, film_rows(240), settings, tokenizer=word_pieces(), eval_data=held_out)
    assert before < 0.75
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.eval_losses[-1] < result.eval_losses[0]
    assert accuracy(model, held_out) > 0.9


def test_numbers_and_several_classes_are_learned():
    for labels, label_of in ((1, lambda row: 2.0 * row["label"] - 1.0), (3, lambda row: [row["label"], 1 - row["label"], 1])):
        rows = [{**row, "label": label_of(row)} for row in film_rows(80)]
        result = fit(classifier(labels), rows, {"max_steps": 60, "learning_rate": 3e-3, **QUIET}, tokenizer=word_pieces())
        assert sum(result.losses[-5:]) < 0.3 * sum(result.losses[:5])


def test_transformers_classifier_and_tokenizer_are_trained_alike(tmp_path):
    word_pieces().save(tmp_path)
    reference = theirs("BertForSequenceClassification", num_labels=2, vocab_size=len(WORDS)).double()
    mine, settings = ours(reference).double(), {"max_steps": 5, "learning_rate": 1e-2, **QUIET}
    losses = [fit(model, film_rows(20), settings, tokenizer=tokenizer).losses
              for model, tokenizer in ((mine, word_pieces()), (reference, transformers.AutoTokenizer.from_pretrained(tmp_path)))]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] != losses[0][0]


# How rows weigh -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["classes", "numbers", "several"])
def test_micro_batches_weigh_by_their_rows_however_long_they_are(problem):
    """A mean over tokens would let long texts count for more; an average of averages, the rows of a small last batch."""
    labels = {"classes": 2, "numbers": 1, "several": 2}[problem]
    as_label = {"classes": int, "numbers": lambda y: y - 0.3, "several": lambda y: [y, 1.0 - y]}[problem]
    rows = [{**row, "label": as_label(row["label"])} for row in film_rows(7)]
    start = classifier(labels).double()
    settings = {"max_steps": 1, "learning_rate": 0.1, "optimizer": "sgd", "max_grad_norm": None, **QUIET}
    models = [copy.deepcopy(start) for _ in range(2)]
    results = [fit(model, rows, {**settings, "micro_batch_size": size, "grad_accum_steps": steps}, tokenizer=word_pieces())
               for model, size, steps in zip(models, (7, 3), (1, 3), strict=True)]  # fmt: skip
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-12)
    whole, parts, before = (weights(model) for model in (*models, start))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-12
    assert max(float((whole[name] - before[name]).abs().max()) for name in whole) > 1e-4
    assert results[0].label_tokens == results[1].label_tokens == 7


def test_the_losses_are_those_of_the_textbook():
    rows, model = film_rows(5), classifier().double()
    batch = collate_classes(encode_labelled(rows, word_pieces(), None, 2), 0)
    expected = F.cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    result = fit(model, rows, {"max_steps": 1, "learning_rate": 1e-9, "micro_batch_size": 2, "grad_accum_steps": 3, **QUIET},
                 tokenizer=word_pieces(), eval_data=rows)  # fmt: skip
    assert result.losses[0] == pytest.approx(expected.item(), rel=1e-9)
    assert result.eval_losses == pytest.approx([expected.item()] * 2, rel=1e-6)
    assert result.tokens == int(batch["attention_mask"].sum())


def test_evaluation_has_no_dropout():
    model = classifier(hidden_dropout_prob=0.5, classifier_dropout=0.5).train()
    examples = encode_labelled(film_rows(5), word_pieces(), None, 2)
    config = lora_lab.training.TrainConfig(progress=False)
    assert evaluate(model, examples, config) == evaluate(model, examples, config)
    assert model.training and model.dropout.training


def test_the_same_seed_is_the_same_run_and_padding_is_little():
    model = classifier(hidden_dropout_prob=0.1)
    runs = [fit(twin := copy.deepcopy(model), film_rows(20), {"max_steps": 4, "micro_batch_size": 4, **QUIET}, tokenizer=word_pieces()) and
            weights(twin) for _ in range(2)]  # fmt: skip
    assert same_bits(*runs)
    assert not same_bits(runs[0], weights(model))


# Rows ---------------------------------------------------------------------------------------------------------------------------


def test_rows_are_texts_pairs_or_ids():
    rows = [{"text": "a good film", "label": 1}, {"text": "a film", "text_pair": "very bad", "label": 0},
            {"input_ids": [2, 7, 3], "label": 1}, {"input_ids": [2, 7, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "label": 1},
            {"input_ids": [2, 7, 3, 8], "token_type_ids": [0, 0, 0, 1], "label": 0}, {"text": "so", "text_pair": None, "label": 0}]  # fmt: skip
    examples = encode_labelled(rows, word_pieces(), 16, 2)
    words = {word: index for index, word in enumerate(WORDS)}
    assert examples[0] == {"input_ids": [words[word] for word in ("[CLS]", "a", "good", "film", "[SEP]")], "label": 1}
    assert examples[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert examples[2] == examples[3] == {"input_ids": [2, 7, 3], "label": 1}
    assert examples[4]["token_type_ids"] == [0, 0, 0, 1]
    assert examples[5] == {"input_ids": [2, words["so"], 3], "label": 0}
    assert encode_labelled([{"text": "so", "text_pair": "", "label": 0}], word_pieces(), 16, 2) == [examples[5]]  # as transformers takes it
    batch = collate_classes(examples, 0)
    assert batch["token_type_ids"][0].tolist() == [0] * 7
    assert batch["attention_mask"].sum(1).tolist() == [5, 7, 3, 3, 4, 3]
    assert batch["labels"].tolist() == [1, 0, 1, 1, 0, 0] and batch["labels"].dtype == torch.long
    assert "token_type_ids" not in collate_classes(examples[:1], 0)


@pytest.mark.parametrize(
    ("labels", "problem", "label", "expected"),
    [(3, None, 2, torch.tensor([2])), (1, None, 2, torch.tensor([2.0])), (1, None, 0.5, torch.tensor([0.5])),
     (3, None, [1, 0, 1], torch.tensor([[1.0, 0.0, 1.0]])), (2, "regression", [0.5, 2], torch.tensor([[0.5, 2.0]])),
     (1, "multi_label_classification", [1], torch.tensor([[1.0]]))],
)  # fmt: skip
def test_labels_become_what_transformers_loss_takes(labels, problem, label, expected):
    batch = collate_classes(encode_labelled([{"input_ids": [5], "label": label}], None, None, labels, problem), 0)
    assert torch.equal(batch["labels"], expected) and batch["labels"].dtype == expected.dtype


@pytest.mark.parametrize(
    ("row", "labels", "message"),
    [({"input_ids": [5]}, 2, "row 1: the row has no 'label'"), ({"input_ids": [5], "label": 2}, 2, "row 1: label 2, expected a class, 0 to 1"),
     ({"input_ids": [5], "label": -100}, 2, "label -100"), ({"input_ids": [5], "label": True}, 2, "label True"),
     ({"input_ids": [5], "label": 1.0}, 2, "label 1.0, expected a class"), ({"input_ids": [5], "label": "good"}, 2, "label 'good'"),
     ({"input_ids": [5], "label": [1, 0]}, 2, r"label \[1, 0\], expected a class"), ({"input_ids": [5], "label": None}, 2, "label None"),
     ({"input_ids": [], "label": 1}, 2, "row 1: the row has no tokens"), ({"label": 1}, 2, "expected text"),
     ({"text": 5, "label": 1}, 2, "'text' is a int"), ({"text": "good", "label": 1}, 2, "needed: fit.model, rows, tokenizer=tokenizer"),
     ({"input_ids": [5] * 25, "label": 1}, 2, "25 tokens, but max_length, or the model's context, is 24.*truncation=True"),
     ({"input_ids": [5, 6], "token_type_ids": [0], "label": 1}, 2, "2 input_ids but 1 token_type_ids"), ("text", 2, "a row is a str"),
     ({"input_ids": ["a"], "label": 1}, 2, "are .'a'., expected lists of whole numbers"),
     ({"input_ids": [5], "label": float("nan")}, 1, "label nan, expected a number")],
)  # fmt: skip
def test_a_row_that_cannot_be_learned_from_is_named_before_anything_changes(row, labels, message):
    model = classifier(labels)
    before = weights(model)
    with pytest.raises(LoraLabError, match=message):
        fit(model, [{"input_ids": [5], "label": 1}, row], QUIET)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("label", [[1], [1, 2, 3], [1, "x"], 1])
def test_a_row_for_several_classes_has_a_number_for_each(label):
    with pytest.raises(LoraLabError, match="row 1: label"):
        encode_labelled([{"input_ids": [5], "label": [1, 0]}, {"input_ids": [5], "label": label}], None, None, 2)


def test_no_rows_are_an_error():
    with pytest.raises(LoraLabError, match="no rows"):
        fit(classifier(), iter([]), QUIET)


def test_a_robertas_rows_end_where_its_positions_do():
    """514 positions are 512 tokens: two belong to the padding and what is before it."""
    model = classifier(family="Roberta")
    longest = SMALL["max_position_embeddings"] - 2
    fit(model, [{"input_ids": [5] * longest, "label": 1}], {"max_steps": 1, **QUIET})
    with pytest.raises(LoraLabError, match=f"{longest + 1} tokens.*is {longest}"):
        fit(model, [{"input_ids": [5] * (longest + 1), "label": 1}], {"max_steps": 1, **QUIET})


def test_labelled_rows_are_read_from_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in [*film_rows(3), {"text": "a", "text_pair": "dog", "label": [1, 0]}]))
    rows, _ = data.load(tmp_path / "rows.jsonl")
    assert len(rows) == 4
    with pytest.raises(LoraLabError, match=r"rows.jsonl, line 4: label \[1, 0\]"):
        fit(classifier(), rows, QUIET, tokenizer=word_pieces())
    for bad, message in (({"label": 1}, "line 1: the row has the fields .'label'., expected text"), ({"text": 3, "label": 1}, "'text' is a int")):
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
        with pytest.raises(LoraLabError, match=message):
            data.load(tmp_path / "bad.jsonl")


def test_the_task_is_known_by_the_models_class():
    ours_, theirs_ = (objective_of(model) for model in (classifier(3), theirs("BertForSequenceClassification", problem_type="regression")))
    assert isinstance(ours_, ClassificationObjective) and (ours_.labels, ours_.problem) == (3, None)
    assert isinstance(theirs_, ClassificationObjective) and (theirs_.labels, theirs_.problem) == (3, "regression")
    for name in ("BertForMaskedLM", "BertModel", "RobertaModel"):
        with pytest.raises(LoraLabError, match=f"a {name} has another task"):
            objective_of(ours(theirs(name)))
