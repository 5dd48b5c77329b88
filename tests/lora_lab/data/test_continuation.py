"""The tokens of an answer are those of the whole text, also where a tokenizer marks what it takes for a beginning."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from tiny_workshop import chat_tokenizer, our_llama
from tokenizers import decoders, normalizers, pre_tokenizers

from lora_lab.data import continuation, encode_rows, verbalize
from lora_lab.models import Tokenizer
from lora_lab.training import score_choices

CHAT = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz[]/INST?.", "ye", "yes", "▁yes", "▁n", "▁no"]
MERGES = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("▁", "n"), ("▁n", "o")]


def llama_like(metaspace: str | None = None) -> Tokenizer:
    """Llama 2's way with blanks: of its published tokenizer.json (Prepend, Replace), or of transformers 5 (Metaspace)."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: place for place, word in enumerate(WORDS)}, MERGES, unk_token="<unk>"))
    if metaspace is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, CHAT)


KINDS = pytest.mark.parametrize("metaspace", [None, "first"])


@KINDS
def test_an_answer_has_the_tokens_of_the_whole_text(metaspace: str | None) -> None:
    tokenizer = llama_like(metaspace)
    talk = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "no"}]  # fmt: skip
    (row,) = encode_rows([{"messages": talk}], tokenizer)
    whole = tokenizer.encode(tokenizer.apply_chat_template(talk), add_special_tokens=False)
    assert row["input_ids"] == whole
    learned = [WORDS[label] for label in row["labels"] if label != -100]
    assert learned == ["▁yes", "</s>", "▁no", "</s>"]


@KINDS
def test_a_class_is_the_word_behind_the_template(metaspace: str | None) -> None:
    tokenizer = llama_like(metaspace)
    (row,) = verbalize([{"text": "fine", "label": 1}], tokenizer, "{text} so", [" no", " yes"], end=False)
    assert row["input_ids"] == tokenizer.encode("fine so yes", add_special_tokens=False)
    assert [WORDS[label] for label in row["labels"] if label != -100] == ["▁yes"]
    model = our_llama(vocab_size=len(WORDS))
    by_text = score_choices(model, ["fine so"], tokenizer, [" no", " yes"], progress=False)
    by_ids = score_choices(model, ["fine so"], tokenizer, [[WORDS.index("▁no")], [WORDS.index("▁yes")]], progress=False)
    torch.testing.assert_close(by_text, by_ids)


def test_a_tokenizer_without_such_marks_is_asked_as_before() -> None:
    tokenizer = chat_tokenizer()
    assert not continuation.marks_beginnings(tokenizer) and continuation.marks_beginnings(llama_like())
    assert continuation.continuing_ids(tokenizer, " yes") == tokenizer.encode(" yes", add_special_tokens=False)
    assert continuation.continuing_ids(llama_like(), "") == []
