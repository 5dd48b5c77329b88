"""What the notebooks of this course share: models, figures, tables, and checks of the exercises.

It is importable in a notebook because Jupyter puts the notebook's folder on Python's path; it is no installed package.
"""

from __future__ import annotations

from typing import Any

from . import figures, models, tables
from .models import fast, pick

__all__ = ["fast", "figures", "holds", "models", "pick", "tables", "told"]


def holds(claim: str, truth: Any, *, real_only: bool = False) -> None:
    """Print whether what the text says came true in this run; `notebooks/build.py` refuses a notebook with a claim that did not.

    real_only: the claim is about the real model, and the one of a million random weights need not keep it.

    >>> holds("B A has rank 2", 2 == 2)
    ✓ B A has rank 2
    >>> holds("the loss fell", 3.0 < 2.0)
    ✗ NOT HERE: the loss fell
    """
    if truth:
        print(f"✓ {claim}")
    elif real_only and fast():
        print(f"– {claim}: seen with the real model only")
    else:
        print(f"✗ NOT HERE: {claim}")


def told(claim: str, truth: Any) -> None:
    """The same of a claim that nobody can know beforehand: it is told as it came out.

    >>> told("examples help", 0.1 > 0.2)
    – not in this run: examples help
    """
    print(f"✓ {claim}" if truth else f"– not in this run: {claim}")
