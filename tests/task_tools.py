"""Tiny models in folders, and small files of rows, for --task and everything behind it."""

from __future__ import annotations

import csv
import json

from bert_tools import SMALL, WORDS, word_pieces
from t5_tools import PLAIN
from tiny_workshop import chat_tokenizer, livelier, our_llama, plain_tokenizer

from lora_lab.comparison import Workbench
from lora_lab.models import BertConfig, BertModel, T5ForConditionalGeneration
from lora_lab.models.loading import save
from lora_lab.models.t5_config import T5Config
from lora_lab.tasks import Reading, gather

GOOD = ("good", "very good", "so good", "a good cat", "the good dog", "good film")
BAD = ("bad", "very bad", "so bad", "a bad cat", "the bad dog", "bad film")


def encoder():
    """A BERT without a head, and a tokenizer with a few words."""
    sizes = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 40, "architectures": ["BertModel"]}
    return livelier(BertModel(BertConfig.from_dict(sizes)), 1).eval(), word_pieces()


def decoder(**changes):
    return our_llama(**{"max_position_embeddings": 512, **changes}), chat_tokenizer()


def plain_decoder():
    return our_llama(max_position_embeddings=512), plain_tokenizer()


def t5():
    """An encoder-decoder that reads and writes bytes."""
    sizes = {**PLAIN, "vocab_size": 260, "eos_token_id": 257, "pad_token_id": 0, "architectures": ["T5ForConditionalGeneration"]}
    return livelier(T5ForConditionalGeneration(T5Config.from_dict(sizes)), 1).eval(), plain_tokenizer()


def saved(folder, model, tokenizer):
    save(model, folder, tokenizer)
    return folder


def workbench(tmp_path, make=decoder, task="sentiment", rows=None, **settings):
    """For comparisons: the model that `make` makes, 60 opinions, two steps of four rows."""
    model, tokenizer = make()
    material = gather(task, jsonl(tmp_path / "rows.jsonl", rows or opinions(60)))
    reader = material.reader(model, tokenizer, Reading(generation={"max_new_tokens": 3}))
    given = {"training": {"max_steps": 2, "micro_batch_size": 4}, "rank": 2, "num_virtual_tokens": 3, "shots": (1,), **settings}
    return Workbench(lambda dtype: make()[0].to(dtype), material, reader, **given)


def opinions(count=30):
    """Texts of two classes that a model of a few words can tell apart."""
    return [{"text": f"{(BAD, GOOD)[number % 2][number // 2 % 6]} {'the cat sat on a mat'[: number % 20]}".strip(), "label": number % 2}
            for number in range(count)]  # fmt: skip


def dialogues(count=12):
    return [{"id": number, "dialogue": f"A: Is {number} good?\nB: Yes.", "summary": f"{number} is good."} for number in range(count)]


def instructions(count=12):
    return [{"instruction": f"Say {number}.", "input": "", "output": f"{number}."} for number in range(count)]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows, delimiter=",", header=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        if header:
            writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return path
