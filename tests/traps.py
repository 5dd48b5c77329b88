"""What an index of traps has for each: the traps of other libraries, and the tests that would notice them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trap:
    """wrong: what goes wrong. source: who met it. tests: what would notice it here. why: what else is to be said, or why no test can."""

    wrong: str
    source: str
    tests: tuple[str, ...] = ()
    why: str = ""
