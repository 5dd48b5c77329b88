"""Write a positive, a neutral, a negative review of a product: as instructions, or from a table of reviews with their labels and products."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data.formats import Row
from ..data.tables.columns import Columns, Role, Shape
from ..data.tables.files import is_number
from ..data.tables.labels import SPOKEN, Classes, written
from .base import INSTRUCTIONS, LABEL, Cells, Reader, Reading, Task, Unusable, digest, text_in
from .instruction import instructed, writer_of

PRODUCT = Role("product", (("product", "product_title", "product_name", "item"), ("description", "title", "name")))
REVIEW = Role("text", (("review", "review_text", "review_body"), ("text", "content", "body")))


class Reviews(Task):
    name = "reviews"
    shapes = (INSTRUCTIONS, Shape("product, review and label", (PRODUCT, REVIEW, LABEL)))

    def row(self, cells: Cells, classes: Classes | None) -> Row:
        if "instruction" in cells:
            return instructed(cells)
        instruction = f"Write a {_wanted(cells, classes)} review of the following product."
        return {"instruction": instruction, "input": text_in(cells, "product"), "output": text_in(cells, "text")}

    def key(self, row: Row) -> str:
        """The review of the product. Products may be in several parts: in some data sets an input is a department, and most rows share one."""
        return digest(row["input"], row["output"])

    def request(self, row: Row, words: str) -> Row:
        return row

    def reader(self, model: nn.Module, tokenizer: Any, columns: Columns, classes: Classes | None, reading: Reading) -> Reader:
        return writer_of(self, model, tokenizer, reading)


def _wanted(cells: Cells, classes: Classes | None) -> str:
    """The label as a word of the instruction. Raises Unusable for a number that has no name: what it stands for is not known."""
    label = written(cells.get("label"))
    if classes is not None and label in classes.of:
        return classes.names[classes.of[label]].lower()
    if is_number(label):
        raise Unusable("the label is a number, expected a word such as positive (--labels says what the numbers are called)")
    return SPOKEN.get(label, text_in(cells, "label").lower())
