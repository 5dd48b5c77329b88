"""Movie reviews and what became of them: the rows of notebook 05, and the long study beside it.

rotten_tomatoes (Pang & Lee 2005) is looked for in LORA_LAB_DATA, else in shared/data beside the checkout; where it is not, the bundled sentences
stand in. Its parts are those of benchmarks/sentiment.py, so that the notebook and the long study speak of the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab import data

from . import real_data

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # no package: its files import each other by their plain names

import sentiment_data  # noqa: E402
import sentiment_results  # noqa: E402

LABELS = sentiment_data.LABELS
STUDY = BENCHMARKS / "results" / "sentiment.jsonl"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Parts:
    """Rows {"text", "label"}, label 0 negative and 1 positive; any beginning of even length is balanced.  source: where they are from, to be told.

    validation is what anything is chosen on; test is read once for each method.
    """

    train: Rows
    validation: Rows
    test: Rows
    source: str


def load() -> Parts:
    """rotten_tomatoes, or the bundled sentences."""
    if real_data.path("rotten_tomatoes") is not None:
        found = sentiment_data.splits()
        parts = ([vars(review) for review in part] for part in (found.train, found.validation, found.test))
        return Parts(*parts, source="rotten_tomatoes, snippets of movie reviews (Pang & Lee 2005)")
    train, test = data.load("sentiment")
    assert test is not None
    rows = balanced(train)
    return Parts(rows[80:], rows[:80], balanced(test), source="the bundled sentences: rotten_tomatoes is not here (LORA_LAB_DATA says where it is)")


def balanced(rows: Sequence[dict[str, Any]]) -> Rows:
    """One of each class in turn, in their order.

    >>> [row["label"] for row in balanced([{"label": 1}, {"label": 1}, {"label": 0}, {"label": 0}])]
    [0, 1, 0, 1]
    """
    kinds = ([row for row in rows if row["label"] == label] for label in range(len(LABELS)))
    return [row for together in zip(*kinds, strict=False) for row in together]


def study(model: str) -> list[list[str]] | None:
    """The long study's results of a model, a line of headings and then one for each method; None where there are none yet."""
    results = sentiment_results.Results(STUDY)
    lines = sentiment_results.table(results, model, sentiment_results.METHODS, rows=2000).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [cells[0], *cells[2:]] if len(cells) > 2 else None
