"""The formats that instruction models were taught in, against the same talk as their authors' code writes it out."""

from __future__ import annotations

import pytest
from tiny_workshop import chat_tokenizer, our_llama, plain_tokenizer, transformers_tokenizer

from lora_lab import LoraLabError, data, training
from lora_lab.data.chat_templates import CHAT_TEMPLATES, chat_template
from lora_lab.data.templates import IGNORE

TALK = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."},
                     {"role": "user", "content": "Who's there?\nYou?"}, {"role": "assistant", "content": "Me."}]}  # fmt: skip
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *TALK["messages"]]}
ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
CURIOUS = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
           "user's questions.")  # fmt: skip
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# [s] and [/s] stand for the tokenizer's begin and end tokens
WRITTEN = {
    "vicuna": f"[s]{CURIOUS} USER: Hello! ASSISTANT: Hi.[/s]USER: Who's there?\nYou? ASSISTANT: Me.[/s]",
    "koala": "[s]BEGINNING OF CONVERSATION: USER: Hello! GPT: Hi.[/s]USER: Who's there?\nYou? GPT: Me.[/s]",
    "baize": "[s]The conversation between human and AI assistant.\n[|Human|] Hello!\n[|AI|] Hi.[/s]\n[|Human|] Who's there?\nYou?\n[|AI|] Me.[/s]\n",
    "llama-2-chat": "[s][INST] Hello! [/INST] Hi. [/s][s][INST] Who's there?\nYou? [/INST] Me. [/s]",
    "chatml": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nWho's there?\nYou?<|im_end|>\n"
              "<|im_start|>assistant\nMe.<|im_end|>\n",
    "dolly": f"[s]{TASK}\n\n### Instruction:\nHello!\n\n### Response:\nHi.[/s]\n\n### Instruction:\nWho's there?\nYou?\n\n### Response:\nMe.[/s]",
}  # fmt: skip
WITH_SYSTEM = {
    "vicuna": "[s]Be brief. USER: Hello! ASSISTANT: Hi.[/s]",
    "koala": "[s]Be brief. USER: Hello! GPT: Hi.[/s]",
    "baize": "[s]Be brief.\n[|Human|] Hello!\n[|AI|] Hi.[/s]\n",
    "llama-2-chat": "[s][INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello! [/INST] Hi. [/s]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n",
    "dolly": "[s]Be brief.\n\n### Instruction:\nHello!\n\n### Response:\nHi.[/s]",
    "alpaca": "[s]Be brief.\n\n### Instruction:\nHello!\n\n### Response:\nHi.[/s]",
}
MAKERS = {"ours": chat_tokenizer, "transformers'": transformers_tokenizer}


def expected(text: str) -> str:
    return text.replace("[s]", "<|im_start|>").replace("[/s]", "<|im_end|>")


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_talk_is_written_as_the_models_authors_write_it(make, name):
    assert make(chat_template(name)).apply_chat_template(TALK["messages"], tokenize=False) == expected(WRITTEN[name])


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_message_stands_where_the_format_has_its_own_words(name):
    assert chat_tokenizer(chat_template(name)).apply_chat_template(SYSTEM["messages"]).startswith(expected(WITH_SYSTEM[name]))


@pytest.mark.parametrize("row", [ROW, {**ROW, "input": ""}, {"instruction": "a\n\nb", "output": "c"}], ids=["input", "empty", "none"])
def test_alpacas_template_writes_what_rows_become_without_one(row):
    """So that whoever names it and whoever has a tokenizer without a template train on the same tokens."""
    named, bare = plain_tokenizer(), plain_tokenizer()
    named.chat_template = chat_template("alpaca")
    assert data.encode_rows([row], named) == data.encode_rows([row], bare)
    assert data.prompt_of(row, named) == data.prompt_of(row, bare)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_dolly_has_a_place_for_the_input(make):
    """databrickslabs/dolly, training/consts.py: PROMPT_WITH_INPUT_FORMAT, which begins with the same words, and has no ### before Input."""
    prompt = data.prompt_of(ROW, make(chat_template("dolly")))
    assert prompt == expected(f"[s]{TASK}\n\n### Instruction:\nAdd.\n\nInput:\n1 2\n\n### Response:\n")


@pytest.mark.parametrize("name", ["vicuna", "koala", "baize", "llama-2-chat", "chatml"])
def test_chats_read_the_input_below_the_instruction(name):
    assert "Add.\n\n1 2" in data.prompt_of(ROW, chat_tokenizer(chat_template(name)))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("row", [ROW, TALK, SYSTEM], ids=["row", "talk", "system"])
def test_answers_and_their_ends_alone_are_learned(make, name, row):
    """In every turn, and the prompt for generation is the beginning of what is learned."""
    tokenizer = make(chat_template(name))
    (example,) = data.encode_rows([row], tokenizer)
    learned = tokenizer.decode([label for label in example["labels"] if label != IGNORE], skip_special_tokens=False)
    answers = [message["content"] for message in data.messages_of(row) if message["role"] == "assistant"]
    assert [part.strip() for part in learned.split("<|im_end|>")] == [*answers, ""]
    prompt = tokenizer.encode(data.prompt_of(row, tokenizer), add_special_tokens=False)
    assert example["input_ids"][: len(prompt)] == prompt and example["labels"][len(prompt)] != IGNORE


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name not in ("chatml", "llama-2-chat")])
def test_a_tokenizer_without_a_begin_token_begins_with_the_words(name):
    tokenizer = chat_tokenizer(chat_template(name))
    del tokenizer.special["bos_token"]
    assert not tokenizer.apply_chat_template(TALK["messages"]).startswith(("<", "None"))


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "chatml"])
def test_a_role_without_a_place_is_refused(name):
    """ChatML names each role, so it has a place for all."""
    late = {"messages": [*TALK["messages"][:2], {"role": "tool", "content": "5"}, *TALK["messages"][2:]]}
    with pytest.raises(LoraLabError, match=r"row 0: .*there is a tool"):
        data.encode_rows([late], chat_tokenizer(chat_template(name)))


def test_a_model_trains_and_answers_in_a_format_of_another():
    tokenizer = chat_tokenizer(chat_template("koala"))
    model = our_llama(max_position_embeddings=128)
    result = training.fit(model, [ROW] * 4, {"max_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-3, "progress": False}, tokenizer=tokenizer)
    assert result.label_tokens == 4 * len(" 3x")  # the blank, the digit, and the end
    assert len(training.answers(model, [ROW], tokenizer, max_new_tokens=3, progress=False)) == 1


def test_an_unknown_format_is_named_with_those_there_are():
    with pytest.raises(LoraLabError, match=r"chat template 'vicunia': expected one of alpaca, .*did you mean 'vicuna'"):
        chat_template("vicunia")
