"""Movie reviews in fixed parts: rotten_tomatoes, 5,331 positive and 5,331 negative snippets (Pang & Lee 2005, CC BY 4.0).

    test           the last tenth of each file, 1,066 rows; looked at once for each setting that was chosen without it
    validation     400 of the others: what learning rates, templates and everything else is chosen on
    train          the rest, in an order in which any beginning of even length is balanced

No text is in two parts. The data are looked for in LORA_LAB_DATA, else beside the checkout.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from shared_data import folder_of

LABELS = ("negative", "positive")
FILES = ("rt-polarity.neg", "rt-polarity.pos")
VALIDATION, TEST_SHARE = 400, 10


@dataclass(frozen=True)
class Review:
    """label: 0 negative, 1 positive."""

    text: str
    label: int


@dataclass(frozen=True)
class Splits:
    train: list[Review]
    validation: list[Review]
    test: list[Review]

    def first(self, held_out: int | None) -> Splits:
        """With so many rows of validation and of test at most."""
        return Splits(self.train, self.validation[:held_out], self.test[:held_out])


def splits(folder: Path | None = None, validation: int = VALIDATION) -> Splits:
    """folder: that holds rotten_tomatoes. The same every time, whatever the seeds of the runs."""
    folder = folder_of("rotten_tomatoes") if folder is None else folder / "rotten_tomatoes"
    pools, tests = [], []
    for label, name in enumerate(FILES):
        lines = [line.strip() for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]
        held = len(lines) - len(lines) // TEST_SHARE
        tests.append([Review(text, label) for text in lines[held:]])
        pools.append([Review(text, label) for text in dict.fromkeys(lines[:held])])
    test = alternating(tests)
    seen = {review.text for review in test}
    for label, pool in enumerate(pools):
        pool[:] = [review for review in pool if review.text not in seen]
        random.Random(f"rotten_tomatoes {label}").shuffle(pool)
    each = validation // len(LABELS)
    return Splits(alternating([pool[each:] for pool in pools]), alternating([pool[:each] for pool in pools]), test)


def alternating(parts: list[list[Review]]) -> list[Review]:
    """One of each in turn, as many as the shortest has.

    >>> [review.text for review in alternating([[Review("a", 0), Review("b", 0)], [Review("c", 1), Review("d", 1)]])]
    ['a', 'c', 'b', 'd']
    """
    return [review for together in zip(*parts, strict=False) for review in together]
