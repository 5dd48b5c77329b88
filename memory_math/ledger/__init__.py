"""The ledger: every number of the two lectures that this project was made from, and of the papers behind them, computed again.

    from memory_math import claims
    print(claims().where(verdict="wrong"))
    claims()["B9.1"].why

Each row says what is stated, what this package computes, and a verdict that is derived from the two; the rule is in rows.py. Nothing in
the column `computed` is typed in. Rows A1 to A23 are of "Instruction Finetuning" (slides, A. Kumar), B1 to B12 and B7b of "Lecture 10.5:
Finetuning" (15.773, MIT OpenCourseWare, spring 2024); the others are named by what they are about, and their source says where it is printed.
"""

from __future__ import annotations

from . import adapters, counts, lecture_a, lecture_a_use, lecture_b, lecture_b_lora, prompts, published, speeds
from .rows import VERDICTS, Claim, Claims, judge

__all__ = ["VERDICTS", "Claim", "Claims", "claims", "judge"]

SECTIONS = (
    *lecture_a.SECTIONS, *lecture_a_use.SECTIONS, *lecture_b.SECTIONS, *lecture_b_lora.SECTIONS, *counts.SECTIONS, *adapters.SECTIONS,
    *prompts.SECTIONS, *published.SECTIONS, *speeds.SECTIONS,
)  # fmt: skip


def claims() -> Claims:
    """Every row, computed now (about a second).

    >>> row = claims()["A15.1"]
    >>> row.claim, row.stated, row.computed, row.verdict
    ('weights of a 512 x 64 layer', 32768, 32768, 'exact')
    """
    return Claims(row for section in SECTIONS for row in section().rows)
