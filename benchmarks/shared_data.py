"""Larger data sets, which the repository does not bring along: looked for in LORA_LAB_DATA, else in shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path


def folder_of(name: str) -> Path:
    """Of one data set. Raises SystemExit where it is not there."""
    folder = Path(os.environ.get("LORA_LAB_DATA") or Path(__file__).parents[2] / "shared" / "data") / name
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: set LORA_LAB_DATA to the folder that holds {name}")
    return folder


def spread(count: int, most: int | None) -> list[int]:
    """`most` of so many places, evenly.

    >>> spread(10, 4), spread(3, 5)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if most is None or most >= count:
        return [*range(count)]
    return [place * count // most for place in range(most)]
