"""What tasks have in common whose answer is a text: summaries, answers to instructions, reviews.

A row becomes an instruction with an input and an output, and that what the model was taught to read (data/templates.py, data/seq2seq.py). Rows that
are shown first are earlier turns of the same talk; only the last answer is learned, and only it counts for the loss.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ..data import Rows, messages_of, prompt_of, question_of
from ..data.formats import Row, each_encoded
from ..data.seq2seq import encode_answers
from ..data.templates import IGNORE, Example, encode_rows, has_chat_template
from ..training.evaluation import Written, clean_endings, perplexity, write
from ..training.evaluation.passes import prompt_ids
from .base import Reader, Reading, Scores, Way


class Asks(Protocol):
    """What a reader needs of its task."""

    def request(self, row: Row, words: str) -> Row:
        """The row as instruction, input and output, or as messages."""


class Writer(Reader):
    """Judged by how probable the right answer is, which costs no writing."""

    quality = "loss"
    higher_is_better = False
    has_words = False

    def __init__(self, task: Asks, tokenizer: Any, reading: Reading, encodes: bool, ways: Sequence[Way]) -> None:
        super().__init__(tokenizer, reading)
        self.task, self.encodes, self._ways, self.way = task, encodes, [*ways], ways[0]

    def ways(self) -> list[Way]:
        return self._ways

    def asked(self, row: Row, way: Way | None = None) -> Row:
        """The row, answer included, behind those that are shown first."""
        way = way or self.way
        own = self.task.request(row, way.words)
        if not way.shots:
            return own
        turns = [turn for each in (*way.shots, row) for turn in messages_of(self.task.request(each, way.words))]
        if self.encodes or has_chat_template(self.tokenizer):
            return {"messages": turns}
        return {"instruction": "\n\n".join(turn["content"] for turn in turns[:-1]), "output": turns[-1]["content"]}

    def examples(self, rows: Sequence[Row]) -> Any:
        return self._encoded(rows, self.way)

    def shown(self, row: Row) -> str:
        asked = self.asked(row)
        question = question_of(asked) if self.encodes else prompt_of(asked, self.tokenizer)
        return f"{question}[{messages_of(asked)[-1]['content']}]"

    def scores(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> Scores:
        written = self.written(model, rows, way)
        return {"loss": self.loss(model, rows, way), "clean endings": clean_endings(written), **self.judged(written, rows)}

    def score(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> float:
        return self.loss(model, rows, way)

    def judged(self, written: Sequence[Written], rows: Sequence[Row]) -> Scores:
        """What else the texts say."""
        return {}

    def loss(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> float:
        """The mean over the tokens of the answers, in nats."""
        return math.log(perplexity(model, self._encoded(rows, way or self.way), self.tokenizer, batch_size=self.reading.batch_size,
                                   precision=self.reading.precision, progress=self.reading.progress))  # fmt: skip

    def written(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> list[Written]:
        return write(model, [self.asked(row, way) for row in rows], self.tokenizer, batch_size=self.reading.batch_size,
                     progress=self.reading.progress, **self.reading.generation)  # fmt: skip

    def questions(self, rows: Sequence[Row], way: Way | None = None) -> list[list[int]]:
        return prompt_ids([self.asked(row, way) for row in rows], self.tokenizer, self.encodes)

    def longest(self, rows: Sequence[Row], way: Way | None = None) -> int:
        return max(len(example["input_ids"]) for example in self._encoded(rows, way or self.way))

    def few(self, rows: Sequence[Row], count: int, seed: int) -> Way:
        """Of the shorter half of the rows: what is shown is read again with every question."""
        lengths = [sum(len(str(cell)) for cell in row.values()) for row in rows]
        shorter = [row for row, length in zip(rows, lengths, strict=True) if length <= statistics.median(lengths)]
        return Way(self.way.words, tuple(random.Random(f"{seed} shots").sample(shorter, min(count, len(shorter)))))

    def _encoded(self, rows: Sequence[Row], way: Way) -> Rows:
        def encode(row: Row, where: str) -> Example:
            encoded = (encode_answers if self.encodes else encode_rows)(_Found(self.asked(row, way), where), self.tokenizer)[0]
            return last_answer(encoded) if way.shots and not self.encodes else encoded

        return Rows(each_encoded(rows, encode))


class _Found(Rows):
    """A row by itself that is called by where it was found."""

    def __init__(self, row: Row, place: str) -> None:
        super().__init__([row])
        self.place = place

    def where(self, index: int) -> str:
        return self.place


def last_answer(example: Example) -> Example:
    """Of a talk with several answers the labels of the last.

    >>> last_answer({"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, 4, 5, -100]})["labels"]
    [-100, -100, -100, 4, 5, -100]
    """
    labels = example["labels"]
    end = max(index for index, label in enumerate(labels) if label != IGNORE)
    start = next((index + 1 for index in range(end, -1, -1) if labels[index] == IGNORE), 0)
    return {**example, "labels": [label if start <= index <= end else IGNORE for index, label in enumerate(labels)]}
