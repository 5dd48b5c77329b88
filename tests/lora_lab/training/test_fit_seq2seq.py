"""`fit` on encoder-decoders, ours and transformers': their rows, their counts, and that they learn."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from t5_tools import EOS, VOCABULARY, pair, randomised, theirs
from tiny_workshop import QUIET, plain_tokenizer, same_bits, transformers_tokenizer, weights
from torch.testing import assert_close
from transformers import T5Model

import lora_lab
from lora_lab import LoraLabError, models
from lora_lab.__main__ import main
from lora_lab.data import collate, encode_answers, question_of
from lora_lab.data.objectives import Seq2SeqObjective, objective_of
from lora_lab.models import T5Config, T5ForConditionalGeneration
from lora_lab.training import evaluate, fit
from lora_lab.training.config import TrainConfig


def copy_rows(count: int = 24, seed: int = 0) -> list[dict[str, list[int]]]:
    """The answer is the question's first token, once or twice as its last word says: neither side is as long as the other."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        token, times, noise = generator.randint(2, 9), generator.randint(1, 2), generator.randint(1, 4)
        question = [token, *(generator.randint(20, VOCABULARY - 1) for _ in range(noise)), 10 + times, EOS]
        rows.append({"input_ids": question, "labels": [token] * times + [EOS]})
    return rows


def calm(model: Any) -> Any:
    return randomised(model, std=0.15)


# Rows -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"instruction": "Sum up.", "input": "a b", "output": "c"},
    {"messages": [{"role": "user", "content": "Sum up."}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
    {"messages": [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"},
                  {"role": "user", "content": "thanks"}]},
])  # fmt: skip
def test_a_text_row_is_a_question_in_plain_words_and_its_answer_with_the_end_token(row: dict[str, Any]) -> None:
    for tokenizer in (plain_tokenizer(), transformers_tokenizer(None)):
        example = encode_answers([row], tokenizer)[0]
        assert tokenizer.decode(example["input_ids"]) == question_of(row) == "Sum up.\n\na b"
        assert example["labels"] == [*tokenizer.encode("c"), tokenizer.eos_token_id]


def test_the_tokenizers_own_special_tokens_are_kept_and_no_end_comes_twice() -> None:
    """T5's tokenizer ends every text with its end token, the question too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = plain_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)])
    row = {"instruction": "Hi", "output": "you"}
    assert encode_answers([row], tokenizer) == [{"input_ids": [*b"Hi", end], "labels": [*b"you", end]}]


def test_a_whole_conversation_answers_with_its_last_answer() -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    example = encode_answers([row], plain_tokenizer())[0]
    assert (bytes(example["input_ids"]).decode(), bytes(example["labels"][:-1]).decode()) == ("one\n\ntwo\n\nthree", "four")


def test_padding_of_an_encoded_row_is_dropped() -> None:
    row = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [7, -100, 8]}
    assert encode_answers([row], None) == [{"input_ids": [5, 6], "labels": [7, -100, 8]}]


@pytest.mark.parametrize(("row", "message"), [
    ({"input_ids": [5, 6]}, "row 1: input_ids without labels"),
    ({"input_ids": [5, 6], "labels": [-100, -100]}, "row 1: no token of the row has a label"),
    ({"input_ids": [], "labels": [5]}, "row 1: no input_ids"),
    ({"input_ids": [5, 6], "labels": [5], "attention_mask": [1]}, "row 1: 2 input_ids but 1 attention_mask"),
    ({"input_ids": [5] * 10, "labels": [5]}, "row 1: the question has 10 tokens, but max_length.* is 9"),
    ({"input_ids": [5], "labels": [5] * 10}, "row 1: the answer has 10 tokens"),
    ({"input_ids": [5], "labels": "no"}, "row 1: input_ids and labels are 'no'"),
    ({"instruction": "Hi", "output": "you"}, "row 1 is text, so a tokenizer is needed"),
    ({"instruction": "Hi"}, "row 1: the row has no 'output'"),
])  # fmt: skip
def test_a_row_that_cannot_be_learned_is_an_error_that_names_it(row: dict[str, Any], message: str) -> None:
    model = T5ForConditionalGeneration(T5Config.from_dict({**theirs().config.to_dict()}))
    before = weights(model)
    with pytest.raises(LoraLabError, match=message):
        fit(model, [{"input_ids": [5], "labels": [6]}, row], {"max_steps": 1, "max_length": 9, **QUIET})
    assert same_bits(weights(model), before)


def test_each_side_is_padded_to_its_own_length_and_every_label_counts() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [2, -100]}], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, -100], [2, -100]]
    objective = Seq2SeqObjective()
    assert (objective.count(batch), objective.tokens(batch)) == (2, 4 + 2)


# Training ---------------------------------------------------------------------------------------------------------------------


def test_encoder_decoders_of_both_houses_are_recognised_and_others_refused() -> None:
    mine, reference = pair()
    assert type(objective_of(mine)) is type(objective_of(reference)) is Seq2SeqObjective
    with pytest.raises(LoraLabError, match="a T5Model has another task"):
        fit(T5Model(reference.config), copy_rows(), QUIET)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_the_mean_over_every_labelled_token_of_its_batches(accumulate: int) -> None:
    mine, _ = pair("1.1")
    rows, rate = copy_rows(6), 0.05
    batch = collate(rows, 0)
    loss = mine(**batch).loss
    loss.backward()
    expected = {name: p.detach() - rate * p.grad for name, p in mine.named_parameters()}
    result = fit(mine, rows, {"max_steps": 1, "micro_batch_size": 6 // accumulate, "grad_accum_steps": accumulate, "optimizer": "sgd",
                              "learning_rate": rate, "max_grad_norm": None, "schedule": "constant", **QUIET})  # fmt: skip
    assert result.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    labels = sum(len(row["labels"]) for row in rows)
    assert (result.label_tokens, result.tokens) == (labels, labels + sum(len(row["input_ids"]) for row in rows))
    for name, parameter in mine.named_parameters():
        assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["1.0", "1.1"])
def test_ours_and_transformers_learn_alike(shape: str) -> None:
    runs = []
    for model in pair(shape):
        torch.manual_seed(0)
        lora_lab.inject(calm(model), rank=4)
        runs.append(fit(model, copy_rows(), {"max_steps": 6, "micro_batch_size": 6, "learning_rate": 1e-2, **QUIET}, eval_data=copy_rows(6, seed=9)))
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=2e-3)
    assert runs[0].eval_losses == pytest.approx(runs[1].eval_losses, rel=2e-3)


def test_a_copy_task_is_learned_with_lora_and_answered() -> None:
    mine = lora_lab.inject(randomised(pair("1.1")[0], std=0.12), rank=8)
    held_out = copy_rows(8, seed=5)
    questions = [row["input_ids"] for row in held_out]

    def right() -> int:
        answers = models.generate(mine, questions, max_new_tokens=5).ids
        return sum(answer == row["labels"] for answer, row in zip(answers, held_out, strict=True))

    assert right() == 0
    result = fit(mine, copy_rows(200), {"max_steps": 120, "micro_batch_size": 16, "learning_rate": 1.5e-2, **QUIET}, eval_data=held_out)
    assert result.eval_losses[-1] < 0.4 * result.eval_losses[0]
    assert right() >= 6


def test_gradient_checkpointing_changes_no_loss() -> None:
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        mine = lora_lab.inject(pair("1.1", dropout_rate=0.1)[0], rank=2, dropout=0.1)
        runs.append(fit(mine, copy_rows(8), {"max_steps": 3, "micro_batch_size": 4, "gradient_checkpointing": checkpointing, **QUIET}).losses)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_held_out_rows_are_weighed_by_their_labels() -> None:
    mine, _ = pair()
    rows = copy_rows(7)
    examples = encode_answers(rows, None)
    total = sum(float(mine(**collate([row], 0)).loss.detach()) * len(row["labels"]) for row in examples)
    loss = evaluate(mine, examples, TrainConfig(micro_batch_size=3, progress=False))
    assert loss == pytest.approx(total / sum(len(row["labels"]) for row in examples), rel=1e-5)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_learns_also_where_wo_adds_more_than_float16_holds(precision: str, adapted: bool) -> None:
    mine = calm(pair("1.1")[0])
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            parameter.mul_(100_000.0 if name.endswith("wo.weight") else 4.0 if name.endswith("wi_1.weight") else 1.0)
    if adapted:
        lora_lab.inject(mine, rank=4, target_modules="attention")
    dtypes: list[dict[str, torch.dtype]] = []
    mine.register_forward_pre_hook(lambda *_: dtypes.append({name: p.dtype for name, p in mine.named_parameters()}))
    before = weights(mine)
    result = fit(mine, copy_rows(), {"max_steps": 12, "micro_batch_size": 12, "learning_rate": 5e-3, "precision": precision, **QUIET})
    assert result.skipped_steps <= 2 and result.losses[-1] < 0.9 * result.losses[0]
    frozen = {name: dtype for name, dtype in dtypes[0].items() if name.endswith("wo.weight")}
    wide = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert {*frozen.values()} == {wide if adapted else torch.float32}
    assert {name: p.dtype for name, p in mine.named_parameters()} == {name: p.dtype for name, p in before.items()}


# From the command line ---------------------------------------------------------------------------------------------------------


def test_the_commands_train_and_ask_a_t5(tmp_path: Any, capsys: Any) -> None:
    source = {**theirs("1.1", vocab_size=260).config.to_dict(), "eos_token_id": 257, "architectures": ["T5ForConditionalGeneration"]}
    model = randomised(T5ForConditionalGeneration(T5Config.from_dict(source)), std=0.1)
    models.save(model, tmp_path / "model", plain_tokenizer())
    rows = [{"instruction": f"Say {word}", "output": word} for word in ("one", "two", "six")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = ["--model", str(tmp_path / "model"), "--precision", "fp32"]
    assert main(["finetune", *base, "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "adapter"), "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"({2 * sum(len(row['output']) + 1 for row in rows)} with a label)" in printed
    asked = [*base, "--adapter", str(tmp_path / "adapter"), "--prompt", "Say one", "--max-new-tokens", "3", "--temperature", "0"]
    assert main(["generate", *asked]) == 0
    again, tokenizer = models.load(tmp_path / "model")
    lora_lab.load(again, tmp_path / "adapter")
    expected = models.generate(again, ["Say one"], tokenizer, max_new_tokens=3, repetition_penalty=1.1).texts[0]
    assert expected and capsys.readouterr().out.strip() == expected.strip()
