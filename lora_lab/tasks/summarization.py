"""What was said, in a sentence or two: {"dialogue": "...", "summary": "..."}. Articles and their summaries, too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.formats import Row
from ..data.tables.columns import Columns, Role, Shape, plain
from ..data.tables.files import Table
from ..data.tables.labels import Classes
from ..errors import LoraLabError
from ..training.evaluation import Written, ordinary_words, rouge, unsupported_facts
from .base import Cells, Reader, Reading, Scores, Task, Way, digest, model_kind, text_in
from .writing import Writer

DIALOGUES = ("dialogue", "dialog", "conversation", "chat", "transcript")
TEXT = Role("text", (DIALOGUES, ("article", "document", "text", "content", "source")))
SUMMARY = Role("summary", (("summary", "highlights", "abstract", "section_text", "tldr"), ("target", "headline")))
NUMBERED = re.compile(r"summary_?\d+")
KINDS = ("rouge1", "rouge2", "rougeL")


class Summarization(Task):
    name = "summarization"
    shapes = (Shape("dialogue and summary (DialogSum, SAMSum)", (TEXT, SUMMARY)),)

    def table(self, table: Table, columns: Mapping[str, str]) -> Table:
        """DialogSum's test dialogues have summaries by three people, "summary1" to "summary3" (Chen et al. 2021, arXiv:2105.06762): a row for each.

        The hub's copy is in the same form. A score is then the mean over the people; its spread takes their rows for independent ones.
        """
        numbered = [name for name in table.columns if NUMBERED.fullmatch(name)]
        if "summary" in table.columns or "summary" in columns or not numbered:
            return table
        return Table.joined(_each_summary(table, index, numbered) for index in range(len(table)))

    def row(self, cells: Cells, classes: Classes | None) -> Row:
        return {"dialogue": text_in(cells, "text"), "summary": text_in(cells, "summary")}

    def key(self, row: Row) -> str:
        return digest(row["dialogue"])

    def request(self, row: Row, words: str) -> Row:
        return {"instruction": words, "input": row["dialogue"], "output": row["summary"]}

    def reader(self, model: nn.Module, tokenizer: Any, columns: Columns, classes: Classes | None, reading: Reading) -> Reader:
        if (kind := model_kind(model)) not in ("causal", "encoder-decoder"):
            raise LoraLabError(f"a {type(model).__name__} reads text and writes none: summaries need a causal language model or an encoder-decoder")
        what = "dialogue" if plain(columns["text"]) in DIALOGUES else "text"
        words = [f"Summarize the following {what}.", f"Write a summary of the following {what} in one or two sentences.", "What is this about?"]
        if kind == "encoder-decoder":
            words = ["summarize:", words[0]]  # T5's own first (Raffel et al. 2020, arXiv:1910.10683, section 2.4)
        return Summarizer(self, tokenizer, reading, kind == "encoder-decoder", [Way(each) for each in words])


def _each_summary(table: Table, index: int, names: Sequence[str]) -> Table:
    rest = {name: cell for name, cell in table[index].items() if name not in names}
    rows = [{**rest, "summary": table[index][name]} for name in names if table[index].get(name)] or [rest]  # which is counted as without one
    return Table(rows, [table.places[index]] * len(rows))


class Summarizer(Writer):
    """Judged by what the summaries have in common with the right ones, and by the wrong facts in them that can be seen: the mean of a summary."""

    quality = "rougeL"
    higher_is_better = True
    has_words = True

    def judged(self, written: Sequence[Written], rows: Sequence[Row]) -> Scores:
        return _judged([each.text for each in written], rows)

    def score(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> float:
        return self.judged(self.written(model, rows, way), rows)[self.quality]

    def without_model(self, rows: Sequence[Row]) -> tuple[str, Scores] | None:
        return "the text itself", _judged([row["dialogue"] for row in rows], rows)


def _judged(texts: Sequence[str], rows: Sequence[Row]) -> Scores:
    common = rouge(texts, [row["summary"] for row in rows], kinds=KINDS)
    return {**{kind: score.f1 for kind, score in common.items()}, "wrong facts": sum(map(len, wrong_facts(texts, rows))) / len(rows)}


def wrong_facts(texts: Sequence[str], rows: Sequence[Row]) -> list[list[str]]:
    """Of a summary for each row, the numbers and names that the dialogue has not."""
    ordinary = ordinary_words(text for row in rows for text in (row["dialogue"], row["summary"]))
    return [unsupported_facts(text, row["dialogue"], ordinary) for text, row in zip(texts, rows, strict=True)]
