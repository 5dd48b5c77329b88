"""What rows are to a model, and in what its progress shows.

    text and answer            any language model                learned as they are; shown in what it writes
    text and label             a language model, with --choices  the text in a template, a word for each label; shown in accuracy and text
                               a classifier                      learned as they are; shown in accuracy
                               an encoder without a head         the same, with a new head that trains along
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.commands.shared import load_model, with_tokenizer
from lora_lab.errors import LoraLabError

ANSWER: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}  # a word for a label
TEXT: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1}


@dataclass(frozen=True)
class Effect:
    """texts: what a model writes after the questions.  accuracy: on held-out rows, NaN where there are none, or no labels."""

    questions: list[str]
    texts: list[str]
    accuracy: float


@dataclass(frozen=True)
class Lesson:
    """rows: for `fit`.  held_out: as they were given, or None.  kind: "text", "words" (for labels) or "classes".

    choices, template: of words.  new_head: the base's head began anew, and trains along.
    """

    model: Any
    tokenizer: Any
    rows: Any
    held_out: Any
    kind: str
    choices: Sequence[str] = ()
    template: str = "{text}"
    new_head: bool = False

    def learned(self, rows: Any) -> Any:
        """The rows as `fit` takes them."""
        from lora_lab.data import verbalize
        from lora_lab.models.base import is_encoder_decoder

        if rows is None or self.kind != "words":
            return rows
        return verbalize(rows, self.tokenizer, self.template, self.choices, encodes=is_encoder_decoder(self.model))

    def read(self, row: Any) -> list[int]:
        """The tokens of a row in the template's place."""
        from lora_lab.data import filled
        from lora_lab.data.verbalizing import read_ids
        from lora_lab.models.base import is_encoder_decoder

        return read_ids(filled(self.template, row), self.tokenizer, is_encoder_decoder(self.model))

    def effect(self, model: Any, samples: int, config: Any) -> Effect:
        """What the model does now, with the same random numbers in every call. samples: rows that it answers.  config: of the training."""
        from lora_lab.data import filled, question_of
        from lora_lab.training import answers

        rows = list(self.held_out or self.rows)[:samples] if self.kind != "classes" else []
        shown = [filled(self.template, row) if self.kind == "words" else question_of(row) for row in rows]
        asked = [self.read(row) for row in rows] if self.kind == "words" else rows
        settings = ANSWER if self.kind == "words" else TEXT
        texts = answers(model, asked, self.tokenizer, seed=config.seed, **settings) if asked else []
        return Effect(shown, texts, self.accuracy(model, config.precision, config.micro_batch_size))

    def accuracy(self, model: Any, precision: str, batch_size: int) -> float:
        from lora_lab.data.verbalizing import place_of
        from lora_lab.training import accuracy, best_choices, predict_classes, score_choices

        if self.held_out is None or self.kind == "text":
            return math.nan
        settings: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
        if self.kind == "classes":
            return accuracy(predict_classes(model, self.held_out, self.tokenizer, **settings), [row["label"] for row in self.held_out])
        asked, end = [self.read(row) for row in self.held_out], self.tokenizer.eos_token_id is not None  # answers are taught with their end
        scores = score_choices(model, asked, self.tokenizer, self.choices, end=end, **settings)
        labels = [place_of(row.get("label"), self.choices, self.held_out.where(index)) for index, row in enumerate(self.held_out)]
        return accuracy(best_choices(scores), labels)


def lesson_of(options: argparse.Namespace, rows: Any, held_out: Any, precision: str) -> Lesson:
    """The model of --model, and what these rows are to it. Raises LoraLabError where nothing can be learned from them."""
    labelled = any("label" in row for row in rows)
    model, tokenizer = load_model(options, precision)
    kind, new_head = _kind(model, labelled), False
    if kind == "words" and not options.choices:
        raise LoraLabError("the rows have a label and this model writes text: --choices names the answer that stands for each label, in their order")
    if kind != "words" and options.choices:
        raise LoraLabError(f"--choices {' '.join(options.choices)!r}: words for labels are for text/label rows that a language model reads")
    if kind == "new head":
        kind, new_head, (model, tokenizer) = "classes", True, _with_head(options, rows, held_out, precision)
    with_tokenizer(options, tokenizer)
    return Lesson(model, tokenizer, rows, held_out, kind, options.choices or (), options.template, new_head)


def _kind(model: Any, labelled: bool) -> str:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "classes"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "words" if labelled else "text"
    if not labelled:
        raise LoraLabError(f"a {name} reads text and writes none: it can learn from rows of text and label")
    return "new head"


def _with_head(options: argparse.Namespace, rows: Any, held_out: Any, precision: str) -> Any:
    """(model, tokenizer), the head with an output for each class that occurs."""
    import torch

    from lora_lab import models
    from lora_lab.training.precision import storage_dtype

    labels = [row.get("label") for row in [*rows, *(held_out or ())]]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise LoraLabError("a new head is for classes, numbers from 0 on: the rows have other labels. Give a model folder that has a head for them")
    if len({*labels}) < 2:
        raise LoraLabError(f"all rows have the label {labels[0]}: expected two classes at least, for there is nothing to tell apart")
    torch.manual_seed(options.seed)
    return models.load(options.model, dtype=storage_dtype(precision), device=options.device, task="sequence-classification",
                       num_labels=max(labels) + 1)  # fmt: skip
