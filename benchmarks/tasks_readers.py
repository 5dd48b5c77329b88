"""How answers to the lectures' tasks are judged: as lora_lab's tasks do, and row by row, so that a table can say how sure it is.

    Summaries   ROUGE-L against a person's summary; numbers and names that nobody said
    Answers     the loss of a person's answer
    Reviews     whether a judge reads the review as it was asked for

and of each whether it ended by itself within the room it had, and how long it is.

The judge is no part of `evaluate --task reviews`: it takes another model, and rows with a sentiment that were kept from the generator. That command
has neither.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from shared_data import spread

import lora_lab
from lora_lab.data import Rows
from lora_lab.data.tables import Classes, Table
from lora_lab.tasks import Material, Reading
from lora_lab.tasks.sentiment import MOST_PROBED, NewHead
from lora_lab.tasks.summarization import Summarizer, wrong_facts
from lora_lab.tasks.writing import Writer
from lora_lab.training import best_choices, fit, rouge
from lora_lab.training.precision import storage_dtype

SAMPLES, ASKED, DIGITS = 4, 24, 4
SENTIMENTS = ("negative", "neutral", "positive")
JUDGE = {"epochs": 3, "micro_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 10}
Values = dict[str, list[Any]]  # measure -> of each row a number, or (sum, weight)


class Writes(Writer):
    """A reader of lora_lab's whose scores are kept for each row, with some of the texts, and the same of answers that need no model."""

    title: str  # of the answers that are people's own

    def __init__(self, plain: Writer, material: Material) -> None:
        super().__init__(plain.task, plain.tokenizer, plain.reading, plain.encodes, plain.ways())
        self.material = material

    def scores(self, model: Any, rows: Table, way: Any = None) -> dict[str, Any]:
        written = self.written(model, rows, way)
        texts, ended = [each.text for each in written], [int(each.ended and bool(each.text.strip())) for each in written]
        values = {**self.of_model(model, rows, way), **self.of_texts(texts, rows), "clean endings": ended, "words": words(texts)}
        return {"values": values, "references": self.references(rows), "samples": [[place, texts[place]] for place in spread(len(rows), SAMPLES)]}

    def of_model(self, model: Any, rows: Table, way: Any) -> Values:
        return {}

    def of_texts(self, texts: Sequence[str], rows: Table) -> Values:
        return {}

    def references(self, rows: Table) -> dict[str, Values]:
        """People's own answers end cleanly where they would have had room enough."""
        own = [self.own(row) for row in rows]
        room = self.reading.generation["max_new_tokens"]
        fits = [int(len(self.tokenizer.encode(text, add_special_tokens=False)) < room) for text in own]
        return {self.title: {**self.of_texts(own, rows), "clean endings": fits, "words": words(own)}}

    def own(self, row: dict[str, Any]) -> str:
        """What a person wrote."""
        return str(self.task.request(row, self.way.words)["output"])


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


class Summaries(Writes, Summarizer):
    title = "a person's summary"

    def score(self, model: Any, rows: Table, way: Any = None) -> float:
        """Learning rates are compared by the loss (the lower, the better), which chance moves least; wordings by the summaries that they bring, of
        some rows, as writing takes long."""
        return -self.loss(model, rows) if way is None else super().score(model, rows.only(spread(len(rows), ASKED)), way)

    def of_texts(self, texts: Sequence[str], rows: Table) -> Values:
        common = [rouge([text], [row["summary"]], kinds=["rougeL"])["rougeL"].f1 for text, row in zip(texts, rows, strict=True)]
        return {"ROUGE-L": [round(each, DIGITS) for each in common], "wrong facts": [*map(len, wrong_facts(texts, rows))]}

    def references(self, rows: Table) -> dict[str, Values]:
        copied = [row["dialogue"] for row in rows]
        return {"the dialogue itself": {**self.of_texts(copied, rows), "words": words(copied)}, **super().references(rows)}


class Answers(Writes):
    title = "a person's answer"

    def of_model(self, model: Any, rows: Table, way: Any) -> Values:
        """The loss is the mean over tokens, so of each row its sum and their number."""
        tokens = [sum(label >= 0 for label in example["labels"]) for example in self.examples(rows)]
        means = [self.loss(model, rows.only([index]), way) for index in range(len(rows))]
        return {"loss": [(round(mean * count, DIGITS), count) for mean, count in zip(means, tokens, strict=True)]}


class Reviews(Writes):
    title = "a customer's review"

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.material.part("judge"), self.reading)

    def of_texts(self, texts: Sequence[str], rows: Table) -> Values:
        """Nothing is nothing that was asked for."""
        wanted, found = [asked_for(row) for row in rows], self.judge.reads([text or " " for text in texts])
        return {"read as asked": [int(bool(text.strip()) and left == right) for text, left, right in zip(texts, wanted, found, strict=True)]}


def asked_for(row: dict[str, Any]) -> str:
    """
    >>> asked_for({"instruction": "Write a positive review of this product."})
    'positive'
    """
    return next(name for name in SENTIMENTS if name in row["instruction"])


class Judge:
    """Says of a review whether it is negative, neutral or positive: a sentence encoder, LoRA and a head on it, taught by real reviews.

    It knows the sentiments that it was taught.
    """

    def __init__(self, rows: Table, reading: Reading) -> None:
        model, tokenizer = encoder(storage_dtype(reading.precision))
        kinds = {*map(asked_for, rows)}
        self.names = tuple(name for name in SENTIMENTS if name in kinds)
        self.reader = NewHead(tokenizer, Reading(reading.precision, 32), Classes(self.names, {name: i for i, name in enumerate(self.names)}))
        taught = Rows([{"text": row["output"], "label": self.names.index(asked_for(row))} for row in rows])
        torch.manual_seed(0)
        begun = self.reader.prepared(model, [taught[place] for place in spread(len(taught), MOST_PROBED)])
        self.model = lora_lab.inject(begun, modules_to_save=["classifier"])
        fit(self.model, self.reader.examples(taught), {**JUDGE, "precision": reading.precision, "progress": reading.progress})

    def reads(self, texts: Sequence[str]) -> list[str]:
        return [self.names[choice] for choice in best_choices(self.reader.answered(self.model, [{"text": text} for text in texts], None))]


def encoder(dtype: torch.dtype) -> Any:
    return lora_lab.models.load("all-minilm-l6-v2", dtype=dtype, task="feature-extraction")
