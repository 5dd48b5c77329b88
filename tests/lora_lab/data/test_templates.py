"""Rows to labelled token ids, compared with ids written down by hand (the tokenizer's id of a byte is the byte)."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_workshop import BOS, CHATML, END, EOS, START, chat_tokenizer, ids, plain_tokenizer, transformers_tokenizer

from lora_lab import LoraLabError, data
from lora_lab.data.templates import IGNORE

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 2?"}, {"role": "assistant", "content": "3"},
                     {"role": "user", "content": "and 4?"}, {"role": "assistant", "content": "7"}]}  # fmt: skip
CHAT_TOKENIZERS = {"ours": chat_tokenizer, "transformers'": transformers_tokenizer}
PLAIN_TOKENIZERS = {"ours": plain_tokenizer, "transformers'": lambda: transformers_tokenizer(None)}


def example(row, tokenizer):
    return data.encode_rows([row], tokenizer)[0]


def learned(encoded):
    """The ids that have a label; each label is the id at its own place (the model shifts)."""
    assert all(label in (IGNORE, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    return [label for label in encoded["labels"] if label != IGNORE]


# Chat templates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CHAT_TOKENIZERS.values(), ids=CHAT_TOKENIZERS)
def test_an_instruction_becomes_a_chat_whose_answer_and_end_are_learned(make):
    prompt = [START, *ids("user\nAdd.\n\n1 2"), END, *ids("\n"), START, *ids("assistant\n")]
    encoded = example(ROW, make())
    assert encoded["input_ids"] == [*prompt, *ids("3"), END, *ids("\n")]
    assert encoded["labels"] == [IGNORE] * len(prompt) + [*ids("3"), END, IGNORE]  # generation has stopped before the line break


@pytest.mark.parametrize("make", CHAT_TOKENIZERS.values(), ids=CHAT_TOKENIZERS)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(make):
    first = [START, *ids("system\nBe brief."), END, *ids("\n"), START, *ids("user\n1 2?"), END, *ids("\n"), START, *ids("assistant\n")]
    second = [*ids("\n"), START, *ids("user\nand 4?"), END, *ids("\n"), START, *ids("assistant\n")]
    encoded = example(CHAT, make())
    assert encoded["input_ids"] == [*first, *ids("3"), END, *second, *ids("7"), END, *ids("\n")]
    assert encoded["labels"] == [*[IGNORE] * len(first), *ids("3"), END, *[IGNORE] * len(second), *ids("7"), END, IGNORE]


@pytest.mark.parametrize("make", CHAT_TOKENIZERS.values(), ids=CHAT_TOKENIZERS)
@pytest.mark.parametrize("answer", ["3", " 3 \n", "Zwölf – 12\u2028!", "a\n\nb", "<|im_end|> is a token"])
def test_the_labelled_tokens_decode_to_the_answer_and_its_end(make, answer):
    tokenizer = make()
    encoded = example({**ROW, "output": answer}, tokenizer)
    assert tokenizer.decode(learned(encoded), skip_special_tokens=False) == answer + "<|im_end|>"


def test_the_whole_row_is_the_template_rendered_at_once():
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(example(CHAT, tokenizer)["input_ids"], skip_special_tokens=False) == tokenizer.apply_chat_template(CHAT["messages"])


def test_a_turn_after_the_last_answer_is_left_out():
    more = {"messages": [*CHAT["messages"], {"role": "user", "content": "and 5?"}]}
    assert example(more, chat_tokenizer()) == example(CHAT, chat_tokenizer())


def test_without_an_end_token_all_that_the_template_writes_for_an_answer_is_learned():
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    tokenizer = chat_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert tokenizer.decode(learned(example(ROW, tokenizer))) == "3\n"


def test_the_prompt_for_generation_is_the_beginning_of_the_training_row():
    """Otherwise the model is trained on one prompt and asked with another."""
    for tokenizer in (chat_tokenizer(), transformers_tokenizer(), plain_tokenizer(), transformers_tokenizer(None)):
        prompt = tokenizer.encode(data.prompt_of(ROW, tokenizer), add_special_tokens=False)
        encoded = example(ROW, tokenizer)
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert set(encoded["labels"][: len(prompt)]) == {IGNORE} and encoded["labels"][len(prompt)] != IGNORE


def test_the_prompt_needs_no_answer():
    assert data.prompt_of({"instruction": "Add.", "input": "1 2"}, chat_tokenizer()) == data.prompt_of(ROW, chat_tokenizer())
    asked = data.prompt_of({"messages": CHAT["messages"][:-1]}, chat_tokenizer())
    assert asked == data.prompt_of(CHAT, chat_tokenizer()) and asked.endswith("<|im_start|>assistant\n")


REWRITES = "{% for message in messages %}{% if loop.last %}[{{ message['content'] }}]{% else %}({{ message['content'] }}){% endif %}{% endfor %}"
THINKS = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")


@pytest.mark.parametrize("template", [REWRITES, THINKS], ids=["rewrites turns", "opens a thought"])
def test_a_template_whose_prompt_is_no_beginning_of_the_whole_is_refused_by_line(template, tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"instruction": "a", "output": "b"}\n')
    rows, _ = data.load(tmp_path / "rows.jsonl")
    with pytest.raises(LoraLabError, match=r"rows\.jsonl, line 2: the chat template rewrites earlier turns"):
        data.encode_rows(rows, chat_tokenizer(template))


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


@pytest.mark.parametrize("make", CHAT_TOKENIZERS.values(), ids=CHAT_TOKENIZERS)
def test_a_row_that_the_template_refuses_is_named_with_its_line(make, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n" + json.dumps(CHAT))
    rows, _ = data.load(tmp_path / "rows.jsonl")
    with pytest.raises(LoraLabError, match=r"rows\.jsonl, line 3: .*no system role here"):
        data.encode_rows(rows, make(NO_SYSTEM))


# Alpaca's prompt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PLAIN_TOKENIZERS.values(), ids=PLAIN_TOKENIZERS)
@pytest.mark.parametrize("given", ["1 2", ""], ids=["input", "no input"])
def test_without_a_chat_template_rows_take_alpacas_form(make, given):
    """Taori et al. 2023, Stanford Alpaca, README: two prompts, with and without input."""
    paired = ", paired with an input that provides further context" if given else ""
    prompt = (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
              f"### Instruction:\nAdd.\n\n{'### Input:' + chr(10) + given + chr(10) + chr(10) if given else ''}### Response:\n")  # fmt: skip
    encoded = example({**ROW, "input": given}, make())
    assert encoded["input_ids"] == [BOS, *ids(prompt), *ids("3"), EOS]
    assert encoded["labels"] == [IGNORE] * (1 + len(prompt)) + [*ids("3"), EOS]


def test_braces_in_a_row_are_only_braces():
    tokenizer = plain_tokenizer()
    text = tokenizer.decode(example({"instruction": "{instruction} {0}", "input": "{", "output": "}{x}"}, tokenizer)["input_ids"])
    assert "\n{instruction} {0}\n" in text and "\n{\n" in text and text.endswith("\n}{x}")


def test_messages_need_a_chat_template():
    with pytest.raises(LoraLabError, match="no chat template"):
        data.encode_rows([CHAT], plain_tokenizer())


# Encoded rows and checks ----------------------------------------------------------------------------------------------------


def test_encoded_rows_pass_through_and_lists_tensors_and_missing_labels_are_taken():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": torch.tensor([5, 6])}]
    assert data.encode_rows(rows, None) == [rows[0], {"input_ids": [5, 6], "labels": [5, 6]}]


def test_a_row_longer_than_allowed_is_named_with_file_line_and_both_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "a", "output": "' + "b" * 30 + '"}\n')
    rows, _ = data.load(tmp_path / "rows.jsonl")
    lengths = [len(encoded["input_ids"]) for encoded in data.encode_rows(rows, chat_tokenizer())]
    assert data.encode_rows(rows, chat_tokenizer(), max_length=max(lengths))
    with pytest.raises(LoraLabError, match=rf"rows\.jsonl, line 3: the row has {lengths[1]} tokens, .*{lengths[1] - 1}"):
        data.encode_rows(rows, chat_tokenizer(), max_length=lengths[1] - 1)


BAD_ROWS = {
    "no label": ({"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}, "row 1: no token of the row has a label"),
    "a label on the first token only": ({"input_ids": [5, 6], "labels": [5, IGNORE]}, "row 1: no token of the row has a label"),
    "no tokens": ({"input_ids": [], "labels": []}, "row 1: no token of the row has a label"),
    "fewer labels": ({"input_ids": [5, 6], "labels": [6]}, "row 1: 2 input_ids but 1 labels"),
    "text as ids": ({"input_ids": "five", "labels": "five"}, "row 1: input_ids and labels are 'five'"),
    "no labels at all": ({"input_ids": [5, 6], "labels": None}, "row 1: input_ids and labels are None"),
    "two rows in one": ({"input_ids": [[5, 6], [7, 8]]}, r"row 1: input_ids and labels are \[\[5"),
    "a number": (7, "row 1: a row is a int"),
    "text without tokenizer": (ROW, "row 1 is text, so a tokenizer is needed"),
    "no output": ({"instruction": "a"}, "row 1: the row has no 'output'"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_learned_from_is_named(row, message):
    with pytest.raises(LoraLabError, match=f"^{message}"):
        data.encode_rows([{"input_ids": [5, 6], "labels": [5, 6]}, row], None)


def test_no_rows_is_an_error():
    with pytest.raises(LoraLabError, match="holds no rows"):
        data.encode_rows([], chat_tokenizer())


def test_padding_that_an_encoded_row_brings_along_is_neither_seen_nor_learned():
    """Rows of a padding tokenizer carry an attention_mask; labels default to the ids."""
    (example,) = data.encode_rows([{"input_ids": [0, 0, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1]}], None)
    assert example == {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}
    with pytest.raises(LoraLabError, match="row 0: 2 input_ids but 2 labels and 3 attention_mask"):
        data.encode_rows([{"input_ids": [7, 8], "attention_mask": [1, 1, 1]}], None)


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), plain_tokenizer()], ids=["chat", "plain"])
def test_an_input_that_is_null_is_no_input(tokenizer):
    null, absent = ({"instruction": "ab", "output": "cd", **more} for more in ({"input": None}, {}))
    assert data.encode_rows([null], tokenizer) == data.encode_rows([absent], tokenizer)
    assert data.prompt_of(null, tokenizer) == data.prompt_of(absent, tokenizer)
