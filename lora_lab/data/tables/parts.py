"""Rows for training, for choosing and for the test, and no text in two of them.

A source that nobody has divided is divided by a hash of its texts: the same rows are the test's in every command and for every seed, and nothing that
was trained on is found there again. What the source itself calls test stays as it is; its training rows that stand there, too, are dropped.

    all                     ->  eight, one and one tenth for training, validation and test, of each class
    train, test             ->  a tenth of the training rows becomes the validation rows
    train, validation       ->  the same, and the validation rows are the test's (a test without labels is none: SST-2)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ...errors import LoraLabError
from ..formats import Row
from .files import Table
from .folders import ALL, TEST, TRAIN, VALIDATION, Parts

TENTH = 10
PARTS = (TRAIN, VALIDATION, TEST)
Dropped = Counter[str]  # reason -> rows


def divided(parts: Parts, key: Callable[[Row], str], group: Callable[[Row], Any] | None = None,
            wanted: Collection[str] = PARTS) -> tuple[Parts, Dropped, list[str], list[str]]:  # fmt: skip
    """({"train": ..., "validation": ..., "test": ...}, what was dropped and why, what was decided, the parts that were taken from the training rows).
    A source that is a test alone stays that.

    key: rows with the same are never in two parts.  group: of each its tenth, such as the row's class.
    wanted: parts to make where they are missing; none at all: {"all": every row}.
    Raises LoraLabError for too few rows to divide.
    """
    dropped, notes, made = Dropped(), list[str](), list[str]()
    parts = {part: table for part, table in parts.items() if len(table)}
    if not wanted:
        return {ALL: Table.joined(parts.values())}, dropped, notes, made
    if ALL in parts:
        parts = {TRAIN: parts.pop(ALL), **parts}
    if TRAIN in parts:
        parts = _without_leaks({**parts, TRAIN: _once(parts[TRAIN], key, dropped)}, key, dropped)
        parts, made = _completed(parts, key, group, wanted, notes)
    return _without_leaks(parts, key, dropped), dropped, notes, made  # one text may have been in two groups


def _completed(parts: Parts, key: Callable[[Row], str], group: Callable[[Row], Any] | None, wanted: Collection[str],
               notes: list[str]) -> tuple[Parts, list[str]]:  # fmt: skip
    """With the parts that are missing, taken from the training rows; and which those are."""
    if TEST not in parts and VALIDATION in parts and TEST in wanted:
        notes.append("there is no test: the validation rows are it")
        parts = {TRAIN: parts[TRAIN], TEST: parts[VALIDATION]}
    missing, count = [part for part in (TEST, VALIDATION) if part in wanted and part not in parts], len(parts[TRAIN])
    for part in missing:
        train, taken = _apart(parts[TRAIN], count, key, group)
        parts = {**parts, TRAIN: train, part: taken}
    if missing:
        each = " each" if len(missing) > 1 else ""
        notes.append(f"a tenth{each} of the rows is held back for {' and '.join(missing)}, by a hash of the texts")
    return parts, missing


def _once(table: Table, key: Callable[[Row], str], dropped: Dropped) -> Table:
    """Without rows that say the same twice."""
    seen, kept = set[str](), []
    for index, row in enumerate(table):
        said = key(row) + "\0" + repr(sorted(row.items(), key=lambda cell: cell[0]))
        if said not in seen:
            kept.append(index)
        seen.add(said)
    _count(dropped, "there twice", len(table) - len(kept))
    return table.only(kept)


def _apart(table: Table, of: int, key: Callable[[Row], str], group: Callable[[Row], Any] | None) -> tuple[Table, Table]:
    """(the rest, about a tenth of `of` rows): of each group the first by the hash of their keys, and all that have the last one's key."""
    taken: list[int] = []
    for members in _grouped(table, group):
        order = sorted(members, key=lambda index: (_hash(key(table[index])), index))
        count = max(1, round(len(members) * of / len(table) / TENTH))
        while count < len(order) and key(table[order[count]]) == key(table[order[count - 1]]):
            count += 1
        taken += order[:count]
    rest = sorted({*range(len(table))} - {*taken})
    if not rest:
        raise LoraLabError(f"{len(table)} rows are too few to hold some back for validation and a test: expected ten at least of each class, or a "
                           "source with parts of its own")  # fmt: skip
    return table.only(rest), table.only(sorted(taken))


def some_of(rows: Sequence[Row], most: int | None, key: Callable[[Row], str], group: Callable[[Row], Any] | None = None) -> list[int]:
    """The places of `most` rows, in the file's order: by the hash of their keys, as every n-th of a file that alternates would be of one kind.

    Each group keeps its share, and has one at least where `most` are enough for that. Of rows with one key the first come before the second ones.

    >>> some_of([{"text": str(n), "label": n % 2} for n in range(8)], 4, lambda row: row["text"], lambda row: row["label"])
    [0, 1, 3, 4]
    """
    if most is None or most >= len(rows):
        return [*range(len(rows))]
    order: list[tuple[float, int, int]] = []
    for members in _grouped(rows, group):
        earlier, ranks = Counter[str](), list[tuple[int, str, int]]()
        for index in members:
            ranks.append((earlier[said := key(rows[index])], _hash(said), index))
            earlier[said] += 1
        order += [(rank / len(members), -len(members), index) for rank, (_, _, index) in enumerate(sorted(ranks))]
    return sorted(index for _, _, index in sorted(order)[:most])


def _grouped(rows: Sequence[Row], group: Callable[[Row], Any] | None) -> list[list[int]]:
    """The places of each group's rows."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(None if group is None else group(row), []).append(index)
    return [*groups.values()]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _without_leaks(parts: Parts, key: Callable[[Row], str], dropped: Dropped) -> Parts:
    """The test's texts are not validated on, and neither's trained on."""
    held: set[str] = set()
    kept: Parts = {}
    for part in reversed(PARTS):
        if part not in parts:
            continue
        table = parts[part]
        clean = [index for index, row in enumerate(table) if key(row) not in held]
        _count(dropped, f"in the {part} rows, and held back, too", len(table) - len(clean))
        kept[part] = table.only(clean)
        held |= {key(row) for row in table}
    return {part: kept[part] for part in PARTS if part in kept}


def _count(dropped: Dropped, reason: str, rows: int) -> None:
    if rows:
        dropped[reason] += rows
