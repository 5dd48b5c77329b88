"""Perplexity, classes, forgetting and samples: the formulas written out, and a model that is afterwards what it was."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from bert_tools import WORDS, pair, word_pieces
from t5_tools import pair as t5_pair
from tiny_workshop import chat_tokenizer, exact_model, our_llama, same_bits, text_rows, their_llama, token_rows, weights

import lora_lab
from lora_lab import LoraLabError
from lora_lab.training import TrainConfig
from lora_lab.training.evaluation import (
    F1,
    BeforeAfter,
    Samples,
    accuracy,
    answers,
    class_logits,
    f1,
    forgetting,
    perplexity,
    predict_classes,
    samples,
    writing,
)
from lora_lab.training.fitting import evaluate

ROWS = token_rows(9)
SHORT = {"max_new_tokens": 6, "progress": False}


def adapted(**changes: Any) -> Any:
    torch.manual_seed(1)
    return lora_lab.inject(our_llama(**changes), rank=2, init="random", dropout=0.3)


def untouched(model: Any) -> Any:
    """A check to call afterwards: weights, gradients, modes and the selection of adapters are what they were."""
    before, modes = weights(model), [module.training for module in model.modules()]
    selected = [layer.lora_active for layer in lora_lab.targets.lora_layers(model).values()]

    def check() -> None:
        assert same_bits(weights(model), before) and all(p.grad is None for p in model.parameters())
        assert [module.training for module in model.modules()] == modes
        assert [layer.lora_active for layer in lora_lab.targets.lora_layers(model).values()] == selected

    return check


# Perplexity -----------------------------------------------------------------------------------------------------------------


def test_perplexity_is_exp_of_the_mean_loss_over_labelled_tokens():
    """Not the mean over rows or batches, which have other numbers of labels."""
    model = exact_model().train()
    total = count = 0.0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0, :-1]
        chosen = labels[0, 1:] != -100
        total -= float(logits.log_softmax(-1)[chosen, labels[0, 1:][chosen]].sum())
        count += int(chosen.sum())
    model.train()
    check = untouched(model)
    for size in (1, 4, 50):
        assert perplexity(model, ROWS, batch_size=size, progress=False) == pytest.approx(math.exp(total / count), rel=1e-12)
    check()


def test_dropout_is_off_and_transformers_models_are_measured_too():
    model = adapted().train()
    assert perplexity(model, ROWS, progress=False) == perplexity(model, ROWS, progress=False)
    ours, theirs = our_llama(), their_llama()
    theirs.load_state_dict(ours.state_dict())
    assert perplexity(ours, ROWS, progress=False) == pytest.approx(perplexity(theirs, ROWS, progress=False), rel=1e-5)


def test_text_rows_are_encoded_and_encoder_decoders_have_a_perplexity():
    assert perplexity(our_llama(max_position_embeddings=128), text_rows(), chat_tokenizer(), progress=False) > 1
    mine, theirs = t5_pair()
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 1]}, {"input_ids": [5], "labels": [3]}]
    assert perplexity(mine, rows, progress=False) == pytest.approx(perplexity(theirs, rows, progress=False), rel=1e-4)


def test_a_model_that_knows_nothing_hesitates_between_all_words():
    """All logits equal: the perplexity is the vocabulary's size."""
    model = our_llama(torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, ROWS, progress=False) == pytest.approx(260, rel=1e-12)


def test_a_perplexity_beyond_float64_is_infinite_and_a_loss_that_is_none_is_refused():
    model = our_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, ROWS, progress=False) == math.inf
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(LoraLabError, match="the loss is not a number"):
        perplexity(model, ROWS, progress=False)


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size": 0}, "batch_size=0"), ({"precision": "fp8"}, "precision='fp8'"), ({"rows": []}, "holds no rows"),
    ({"max_length": 4}, r"row 0: the row has \d+ tokens.*4"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(LoraLabError, match=message):
        perplexity(our_llama(), **{"rows": ROWS, "progress": False, **change})
    with pytest.raises(LoraLabError, match="names classes and has no perplexity"):
        perplexity(pair("BertForSequenceClassification")[0], ROWS)


def test_no_examples_have_no_loss():
    with pytest.raises(LoraLabError, match="no examples to evaluate on"):
        evaluate(our_llama(), [], TrainConfig(progress=False))


# Classes --------------------------------------------------------------------------------------------------------------------


def texts(count: int = 11) -> list[dict[str, Any]]:
    generator = random.Random(3)
    return [{"text": " ".join(generator.choices(WORDS[5:], k=generator.randint(1, 9)))} for _ in range(count)]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_predicted_classes_are_the_largest_logits_row_by_row(family):
    torch.manual_seed(3)  # the rows are not all of one class
    model, theirs = (each.double() for each in pair(f"{family}ForSequenceClassification", vocab_size=len(WORDS)))
    rows, tokenizer, expected = texts(), word_pieces(), []
    for row in rows:
        with torch.no_grad():
            expected.append(theirs(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0])
    model.train()
    check = untouched(model)
    found = class_logits(model, rows, tokenizer, batch_size=3, progress=False)
    check()
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    for each in (model, theirs):
        assert predict_classes(each, rows, tokenizer, batch_size=4, progress=False) == [int(row.argmax()) for row in expected]
    assert len({*predict_classes(model, rows, tokenizer, progress=False)}) > 1


def test_several_classes_and_numbers_are_what_their_losses_take_them_for():
    model, _ = pair("BertForSequenceClassification", vocab_size=len(WORDS))
    rows, tokenizer = texts(), word_pieces()
    logits = class_logits(model, rows, tokenizer, progress=False)
    several = [{**row, "label": [1, 0, 1]} for row in rows]
    assert predict_classes(model, several, tokenizer, progress=False) == (logits > 0).int().tolist()
    for problem, expected in (("regression", logits.tolist()), ("multi_label_classification", (logits > 0).int().tolist())):
        model.config = dataclasses.replace(model.config, problem_type=problem)
        assert predict_classes(model, rows, tokenizer, progress=False) == expected
    number, _ = pair("BertForSequenceClassification", vocab_size=len(WORDS), num_labels=1)
    assert predict_classes(number, rows, tokenizer, progress=False) == class_logits(number, rows, tokenizer, progress=False)[:, 0].tolist()


def test_classes_need_a_head_rows_and_numbers():
    model, _ = pair("BertForSequenceClassification", vocab_size=len(WORDS))
    with pytest.raises(LoraLabError, match="a LlamaForCausalLM has no head for classes"):
        predict_classes(our_llama(), texts(), chat_tokenizer())
    with pytest.raises(LoraLabError, match="holds no rows"):
        predict_classes(model, [], word_pieces())
    with pytest.raises(LoraLabError, match=r"row 1: the row has the fields \['label', 'words'\]"):
        predict_classes(model, [*texts(1), {"words": "a"}], word_pieces())
    torch.nn.init.constant_(model.classifier.weight, math.nan)
    with pytest.raises(LoraLabError, match="the logits of row 0 are not numbers"):
        predict_classes(model, texts(), word_pieces())


def test_f1_is_the_harmonic_mean_of_precision_and_recall_of_each_class():
    """scikit-learn's f1_score, written out; a class that is only predicted counts, with 0."""
    labels, predictions = [0, 0, 1, 1, 1, 2, 4], [0, 1, 1, 1, 2, 2, 3]
    per_class = {}
    for name in (0, 1, 2, 3, 4):
        right = sum(p == y == name for p, y in zip(predictions, labels, strict=True))
        precision, recall = right / max(predictions.count(name), 1), right / max(labels.count(name), 1)
        per_class[name] = 2 * precision * recall / (precision + recall) if right else 0.0
    result = f1(predictions, labels)
    assert result.per_class == pytest.approx(per_class)
    assert result.macro == pytest.approx(sum(per_class.values()) / 5)
    assert result.micro == pytest.approx(4 / 7) == accuracy(predictions, labels)
    assert f1(torch.tensor(predictions), torch.tensor(labels)) == result
    words = [["zero", "one", "two", "three", "four"][name] for name in labels]
    assert f1(words, words) == F1(1.0, 1.0, dict.fromkeys(("four", "one", "two", "zero"), 1.0))


def test_of_several_classes_at_once_each_decision_counts_and_all_of_a_row_must_be_right():
    """scikit-learn: accuracy_score is the share of exact matches, micro pools the decisions, a class nobody names has F1 0."""
    labels, predictions = [[1, 0, 0], [1, 1, 0], [0, 1, 0]], [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    result = f1(predictions, labels)
    assert accuracy(predictions, labels) == pytest.approx(1 / 3)
    assert result.per_class == pytest.approx({0: 2 * 2 / (3 + 2), 1: 2 * 1 / (1 + 2), 2: 0.0})
    assert result.micro == pytest.approx(2 * 3 / (4 + 4))
    assert result.macro == pytest.approx((0.8 + 2 / 3) / 3)


@pytest.mark.parametrize(("predictions", "labels", "message"), [
    ([1], [1, 2], "1 predictions and 2 labels"), ([], [], "at least one"), ([[1, 0]], [1], "lists of 2, numbers"),
    ([[1, 0]], [[1, 0, 0]], "lists of 2, lists of 3"), (["1"], [1], "numbers, words"),
])  # fmt: skip
def test_lists_that_cannot_be_compared_are_refused(predictions, labels, message):
    """Words against numbers would be an accuracy of 0."""
    for score in (accuracy, f1):
        with pytest.raises(LoraLabError, match=message):
            score(predictions, labels)


# Before and after -----------------------------------------------------------------------------------------------------------


def test_forgetting_measures_the_base_and_the_adapted_model_on_the_same_rows():
    model, other = exact_model(), token_rows(5, seed=8)

    def metric(each: Any) -> float:
        return perplexity(each, other, progress=False)

    check = untouched(model)
    result = forgetting(model, metric)
    check()
    assert result.before == metric(our_llama(torch.float64)) and result.after == metric(model)
    assert result.before != result.after and result.change == result.after - result.before
    assert forgetting(model, metric, before=12.5) == BeforeAfter(12.5, result.after)


def test_the_selection_comes_back_where_the_metric_fails():
    model = exact_model()
    check = untouched(model)
    with pytest.raises(ZeroDivisionError):
        forgetting(model, lambda m: 1 / 0)
    check()


def test_before_is_asked_for_where_nothing_can_be_switched_off():
    for model, message in ((our_llama(), "it has no adapters; otherwise give before="),
                           (lora_lab.use(exact_model(), None), r"the adapters \['default'\] are all off")):  # fmt: skip
        with pytest.raises(LoraLabError, match=message):
            forgetting(model, lambda m: 0.0)
        with pytest.raises(LoraLabError, match=message):
            samples(model, ["a"], chat_tokenizer(), **SHORT)
    assert str(BeforeAfter(0.0, 0.25)) == "0 -> 0.25 (+0.25)"


# Samples --------------------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_prompts_order_and_do_not_depend_on_the_batches():
    """Batches are of like length, and each row has its own stream of random numbers."""
    model, tokenizer = adapted(max_position_embeddings=128), chat_tokenizer()
    prompts = ["Longest of them all.", "A", "Bcd", {"instruction": "Say one."}, [65, 66]]
    texts = [answers(model, prompts, tokenizer, batch_size=size, seed=4, temperature=1.0, **SHORT) for size in (1, 2, 50)]
    assert texts[0] == texts[1] == texts[2] and len({*texts[0]}) == 5
    row = lora_lab.data.prompt_of({"instruction": "Say one."}, tokenizer)
    alone = lora_lab.models.generate(model, [tokenizer.encode(row)], tokenizer, max_new_tokens=6, temperature=1.0, seed=7).texts
    assert alone == texts[0][3:4]


def test_a_question_that_comes_again_is_answered_once_unless_it_is_sampled(monkeypatch):
    """DialogSum asks for three people's summaries of each test dialogue."""
    model, tokenizer, asked = adapted(max_position_embeddings=128), chat_tokenizer(), []

    def counting(model, prompts, *args, **kwargs):
        asked.append(len(prompts))
        return lora_lab.models.generate(model, prompts, *args, **kwargs)

    monkeypatch.setattr(writing, "generate", counting)
    prompts = ["ab", "c", "ab", "ab"]
    texts = answers(model, prompts, tokenizer, **SHORT)
    assert sum(asked) == 2 and texts == [answers(model, [prompt], tokenizer, **SHORT)[0] for prompt in prompts] and texts[0] != texts[1]
    asked.clear()
    drawn = answers(model, prompts, tokenizer, temperature=5.0, **SHORT)
    assert sum(asked) == 4 and drawn[0] != drawn[2] != drawn[3]


def test_samples_are_the_base_and_the_adapter_under_the_same_random_numbers():
    model, tokenizer = adapted(), chat_tokenizer()
    check = untouched(model)
    shown = samples(model, ["ab", "c"], tokenizer, temperature=1.0, seed=2, **SHORT)
    check()
    base = answers(our_llama(), ["ab", "c"], tokenizer, temperature=1.0, seed=2, **SHORT)
    after = answers(model, ["ab", "c"], tokenizer, temperature=1.0, seed=2, **SHORT)
    assert shown == Samples(["ab", "c"], {"before": base, "after": after}) and base != after
    again = samples(our_llama(), ["ab", "c"], tokenizer, before=["x", "y"], temperature=1.0, seed=2, **SHORT)
    assert again.columns == {"before": ["x", "y"], "after": base}
    with pytest.raises(LoraLabError, match="before has 1 texts for 2 prompts"):
        samples(model, ["ab", "c"], tokenizer, before=["x"], **SHORT)


def test_several_adapters_have_a_column_each():
    model, tokenizer = adapted(), chat_tokenizer()
    first = answers(model, ["ab"], tokenizer, **SHORT)
    torch.manual_seed(7)
    lora_lab.inject(model, rank=3, init="random", adapter="second")
    second = answers(model, ["ab"], tokenizer, **SHORT)
    check = untouched(model)
    shown = samples(model, ["ab"], tokenizer, adapters={"base": None, "one": "default", "two": "second"}, **SHORT)
    check()
    assert shown.columns == {"base": answers(our_llama(), ["ab"], tokenizer, **SHORT), "one": first, "two": second}
    assert len({shown.columns[name][0] for name in shown.columns}) == 3
    with pytest.raises(LoraLabError, match="did you mean 'second'"):
        samples(model, ["ab"], tokenizer, adapters={"x": "secnd"})


def test_encoder_decoders_are_asked_in_plain_words():
    mine, theirs = t5_pair()
    rows = [[5, 6, 7, 1], [9, 1]]
    tokenizer = type("Ids", (), {"decode": lambda self, ids, **_: " ".join(map(str, ids)), "pad_token_id": 0, "eos_token_id": 1})()
    assert answers(mine, rows, tokenizer, **SHORT) == answers(theirs, rows, tokenizer, **SHORT)


def test_tables_hold_every_word_and_escape_what_is_not_text():
    shown = Samples(["a <b>|", "two\nlines"], {"before": ["x " * 60, ""], "after": ["<script>&", "1\n2"]})
    table = shown.table(60)
    assert shown.table(120) == str(shown) and max(map(len, table.splitlines())) <= 60
    assert table.count("x") == 60 and "(nothing)" in table and "> two\n> lines" in table
    html = shown.html()
    assert html == shown._repr_html_() and "<script" not in html and "&lt;script&gt;&amp;" in html and html.count("<tr>") == 3
    lines = shown.markdown().splitlines()
    assert lines[0] == "| prompt | before | after |" and lines[3] == "| two<br>lines |  | 1<br>2 |"
    assert lines[2].startswith("| a &lt;b&gt;\\| | x x")


@pytest.mark.parametrize(("prompts", "message"), [
    ("ab", "expected a list"), ([], "at least one"), ([""], "prompt 0 is empty"), ([["x"]], "prompt 0 is"), ([5], "prompt 0 is 5"),
    ([{"text": "x"}], r"prompt 0 has the fields \['text'\]"),
])  # fmt: skip
def test_prompts_that_are_none_are_refused(prompts, message):
    with pytest.raises(LoraLabError, match=message):
        answers(our_llama(), prompts, chat_tokenizer())
    with pytest.raises(LoraLabError, match="prompt 0 is text, so a tokenizer is needed"):
        answers(our_llama(), ["a"], None)
