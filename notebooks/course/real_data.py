"""Larger data sets, which the repository does not bring along: looked for in LORA_LAB_DATA, else in shared/data beside the checkout.

A notebook shows numbers about them and none of their texts.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path


def path(*parts: str) -> Path | None:
    """path("dolly", "rows.jsonl") -> where it is, or None where it is not."""
    folder = Path(os.environ.get("LORA_LAB_DATA") or Path(__file__).parents[3] / "shared" / "data")
    found = folder.joinpath(*parts)
    return found if found.exists() else None


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a .csv, each as column -> text."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))
