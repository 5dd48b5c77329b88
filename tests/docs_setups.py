"""What the pages' code finds there: small models in the place of real ones, and the names that a page takes as given."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from small_models import randomise
from task_tools import encoder, opinions, saved
from tiny_workshop import chat_tokenizer, our_llama, text_rows

import lora_lab
import memory_math
import prompt_tuning_lab as ptl
from lora_lab import data, models, training

CONTEXT = 2048  # of bytes: the bundled reviews are read a byte at a time


def small_model(folder: Path, name: str) -> Path:
    """The folder of a small model in the place of one in the catalogue."""
    place = folder / name
    if not (place / "config.json").is_file():
        model, tokenizer = encoder() if "minilm" in name else (our_llama(max_position_embeddings=CONTEXT), chat_tokenizer())
        saved(place, model, tokenizer)
    return place


def tiny() -> dict[str, Any]:
    """A small Llama and rows for it."""
    ids = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(1))
    return {**PACKAGES, "model": our_llama_of_512(), "tokenizer": chat_tokenizer(), "rows": text_rows(), "ids": ids, "fresh": our_llama_of_512}


def our_llama_of_512() -> Any:
    return our_llama(max_position_embeddings=512)


def troubled() -> dict[str, Any]:
    """Models in the states in which errors are met, and an adapter's folder."""
    names = tiny()
    lora_lab.inject(names["model"], rank=2, adapter="mine")
    lora_lab.save(names["model"], "adapters/mine")
    run = {"max_steps": 2, "learning_rate": 0.01, "save_every": 1, "output_dir": "runs/mine", "progress": False}
    training.fit(names["model"], names["rows"], run, tokenizer=names["tokenizer"])
    tied = lora_lab.inject(our_llama(tie_word_embeddings=True), 2, target_modules=["lm_head"])
    quantised = lora_lab.inject(lora_lab.quantize(our_llama(), "nf4"), 2)
    plain = our_llama_of_512()
    return {**names, "run": run, "plain": plain.requires_grad_(False), "narrow": our_llama(hidden_size=12), "tied": tied, "quantised": quantised,
            "merged": lora_lab.merge(lora_lab.inject(our_llama(), 2, init="random"))}  # fmt: skip


def peft() -> dict[str, Any]:
    """A model in a folder that both sides read."""
    models.save(our_llama(), "base")
    return {"ids": torch.randint(256, (2, 7)), "randomised": randomise}


def table() -> dict[str, Any]:
    """A user's file of opinions."""
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows({"text": row["text"], "label": ("negative", "positive")[row["label"]]} for row in opinions(60))
    return {}


def rows_file() -> dict[str, Any]:
    """rows.jsonl, where a page begins with a command."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows()), encoding="utf-8")
    return {}


PACKAGES = {"lora_lab": lora_lab, "memory_math": memory_math, "ptl": ptl, "data": data, "models": models, "training": training}
SETUPS = {setup.__name__: setup for setup in (tiny, troubled, peft, table, rows_file)}
