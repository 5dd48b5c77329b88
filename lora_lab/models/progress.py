"""How far something is, on stderr: nothing for two seconds, then a bar, which is gone at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

PATIENCE_SECONDS = 2.0
Item = TypeVar("Item")


def watched(items: Iterable[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items one after the other, under a bar called `what` where progress is wanted."""
    bar: Iterable[Item] = tqdm(items, what, delay=PATIENCE_SECONDS, leave=False, disable=not progress)
    return bar
