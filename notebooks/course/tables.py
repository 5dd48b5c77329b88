"""Tables for notebooks: HTML where there is a browser, aligned text elsewhere.

    Table(["method", "loss"], [["LoRA", 3.61], ["full", 3.58]])
    predicted_measured({"a step of LoRA": (1.07e9, 1.09e9)})
    before_after({"Write a review.": ("old text", "new text")})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_lab.training.evaluation import Samples

CELL = "border: 1px solid #d9d9d9; padding: 0.3em 0.7em; vertical-align: top"
MIB = 2**20


@dataclass(frozen=True)
class Table:
    """headings: of the columns.  rows: their cells; numbers stand right, floats with four significant digits.

    >>> Table(["method", "trains"], [["LoRA", 4608], ["full", 32768]])
    method  trains
    LoRA     4,608
    full    32,768
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __repr__(self) -> str:
        lines = [[str(heading) for heading in self.headings], *([text_of(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(self._line(line, widths) for line in lines)

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        sides = [str.rjust if right else str.ljust for right in self._right()]
        return "  ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()

    def _right(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(is_number(cell) for cell in column) for column in zip(*self.rows, strict=True)] or [False] * len(self.headings)

    def _repr_html_(self) -> str:
        sides = ["right" if right else "left" for right in self._right()]
        head = _row("th", self.headings, sides)
        return f'<table style="border-collapse: collapse">\n{head}\n' + "\n".join(_row("td", row, sides) for row in self.rows) + "\n</table>\n"


def predicted_measured(pairs: Mapping[str, tuple[float, float]], unit: str = "MiB", bytes_per_unit: float = MIB) -> Table:
    """{what: (predicted, measured)} in bytes, and how far the prediction is off."""
    rows = [[what, f"{predicted / bytes_per_unit:,.1f}", f"{measured / bytes_per_unit:,.1f}", f"{predicted / measured - 1:+.1%}"]
            for what, (predicted, measured) in pairs.items()]  # fmt: skip
    return Table(["", f"predicted, {unit}", f"measured, {unit}", "off by"], rows)


def before_after(texts: Mapping[str, Sequence[str]], headings: Sequence[str] = ("before", "after")) -> Samples:
    """{request: (text, text, ...)} as a table with these columns beside the request."""
    columns = {heading: [answers[place] for answers in texts.values()] for place, heading in enumerate(headings)}
    return Samples(list(texts), columns)


def text_of(cell: Any) -> str:
    """
    >>> text_of(134515008), text_of(0.85938), text_of("LoRA"), text_of(12.0)
    ('134,515,008', '0.8594', 'LoRA', '12')
    """
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"


def is_number(cell: Any) -> bool:
    """A number, or a text that is one but for signs, commas and a unit of one letter.

    >>> is_number(3), is_number("+1.2%"), is_number("LoRA"), is_number("-")
    (True, True, False, False)
    """
    if isinstance(cell, str):
        cell = cell.replace(",", "").replace("%", "").replace("×", "").strip()
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return not isinstance(cell, bool)


def _row(tag: str, cells: Sequence[Any], sides: Sequence[str]) -> str:
    made = (f'<{tag} style="{CELL}; text-align: {side}">{escape(text_of(cell))}</{tag}>' for cell, side in zip(cells, sides, strict=True))
    return f"<tr>{''.join(made)}</tr>"
