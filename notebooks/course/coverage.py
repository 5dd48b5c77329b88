"""Where the course treats the lectures' claims: a notebook names their rows in brackets, [A15] or [B7, B7b], in its text or in a cell.

Rows A1 to A23 are of "Instruction Finetuning", B1 to B12 and B7b of "Lecture 10.5: Finetuning"; `memory_math.claims()` has the numbers of each.
"""

from __future__ import annotations

import re
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1]
CLAIMS = (*(f"A{number}" for number in range(1, 24)), *(f"B{number}" for number in range(1, 8)), "B7b", *(f"B{number}" for number in range(8, 13)))
NAMED = re.compile(r"\[([AB]\d+b?(?:, ?[AB]\d+b?)*)\]")


def named_in(source: str) -> list[str]:
    """The rows that a text names, each once, in the order of the first time.

    >>> named_in("86 % fewer [A15], and again [A15]; two tables [B7, B7b]; no claim: x[A1:], [a2]")
    ['A15', 'B7', 'B7b']
    """
    return list(dict.fromkeys(name for group in NAMED.findall(source) for name in re.split(", ?", group)))


def treated(folder: Path = NOTEBOOKS) -> dict[str, list[str]]:
    """Each claim -> the numbers of the notebooks that name it."""
    found: dict[str, list[str]] = {claim: [] for claim in CLAIMS}
    for source in sorted(folder.glob("[0-9][0-9]-*.py")):
        for name in named_in(source.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(source.name[:2])
    return found
