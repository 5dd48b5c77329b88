"""Which column is what: by its name, else by what is in it; and where that is not plain, an error that names the option that decides.

A shape is what the rows of some data sets have in common: "text and label (SST-2)". Its roles are what the columns are to a task, each with the names
it usually has, in tiers: a name of the second counts where there is none of the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import LoraLabError, did_you_mean
from .files import Table

MOST_CLASSES, LONGEST_LABEL = 20, 40  # of a column that is a label by its values: different ones, characters
CLEARLY = 2  # times as long is the text


@dataclass(frozen=True)
class Role:
    """tiers: the usual names, as `plain` makes them.  needed: rows without it are no rows.  by_values: "longest" text, or "classes"."""

    name: str
    tiers: tuple[tuple[str, ...], ...]
    needed: bool = True
    by_values: str | None = None

    @property
    def option(self) -> str:
        return f"--{self.name}-column"


@dataclass(frozen=True)
class Shape:
    title: str
    roles: tuple[Role, ...]

    def __str__(self) -> str:
        return f"{self.title}: {', '.join(role.name if role.needed else f'({role.name})' for role in self.roles)}"


@dataclass(frozen=True)
class Columns:
    """of: role -> column.  why: role -> how that is known."""

    shape: Shape
    of: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, role: str) -> str:
        return self.of[role]


def columns_of(table: Table, shapes: Sequence[Shape], given: Mapping[str, str] | None = None) -> Columns:
    """The shape that the table has, and the column of each of its roles.

    shapes: those that will do.  given: role -> column, what the user has decided.
    Raises LoraLabError, naming the table's columns and the option that decides, where no shape fits, or more than one, or a role has two columns.
    """
    given = dict(given or {})
    _check_given(table, shapes, given)
    found = [_by_name(table, shape, given) for shape in shapes if {*given} <= {role.name for role in shape.roles}]
    whole = [each for each in found if not _missing(each)]
    if len(whole) > 1:
        differing = " or ".join(dict.fromkeys(_telling(each, whole) for each in whole))
        raise LoraLabError(f"the columns {table.columns} are {' and also '.join(each.shape.title for each in whole)}: {differing} decides")
    if not whole:
        whole = [each for each in (_by_values(table, partial) for partial in found) if not _missing(each)]
    if not whole:
        raise LoraLabError(_nothing_fits(table, found))
    return whole[0]


def plain(name: str) -> str:
    """A column's name as the tiers have it.

    >>> plain("Review Text"), plain("section_text"), plain("Class-Name ")
    ('review_text', 'section_text', 'class_name')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _check_given(table: Table, shapes: Sequence[Shape], given: Mapping[str, str]) -> None:
    known = {role.name: role for shape in shapes for role in shape.roles}
    for name, column in given.items():
        if name not in known:
            raise LoraLabError(f"--{name}-column {column}: rows of this task have {', '.join(known)}")
        if column not in table.columns:
            raise LoraLabError(f"{known[name].option} {column}: the columns are {table.columns}{did_you_mean(column, table.columns)}")


def _missing(columns: Columns) -> list[Role]:
    return [role for role in columns.shape.roles if role.needed and role.name not in columns.of]


# By name ----------------------------------------------------------------------------------------------------------------------


def _by_name(table: Table, shape: Shape, given: Mapping[str, str]) -> Columns:
    of, why = dict(given), dict.fromkeys(given, "as given")
    for role in shape.roles:
        if role.name not in of and (column := _named(table, role, {*of.values()})):
            of[role.name], why[role.name] = column, "by its name"
    return Columns(shape, of, why)


def _named(table: Table, role: Role, taken: set[str]) -> str | None:
    """The column of the first tier that has one. Raises LoraLabError where it has two."""
    for tier in role.tiers:
        if matching := [column for column in table.columns if plain(column) in tier and column not in taken]:
            if len(matching) > 1:
                raise LoraLabError(f"the columns {' and '.join(map(repr, matching))} could each be the {role.name}: {role.option} decides")
            return matching[0]
    return None


def _telling(columns: Columns, others: Sequence[Columns]) -> str:
    """The option for a role that only this shape has."""
    elsewhere = [role.name for other in others if other is not columns for role in other.shape.roles]
    own = next((role for role in columns.shape.roles if role.needed and role.name not in elsewhere), columns.shape.roles[0])
    return f"{own.option} {columns.of[own.name]}"


# By values --------------------------------------------------------------------------------------------------------------------


def _by_values(table: Table, partial: Columns) -> Columns:
    """With the roles whose values tell. Raises LoraLabError where two columns could be one role."""
    of, why = dict(partial.of), dict(partial.why)
    rest = [role for role in _missing(partial) if role.by_values]
    if len(rest) < len(_missing(partial)):
        return partial
    for role in sorted(rest, key=lambda role: role.by_values == "longest"):  # labels first: what is left is text
        free = [column for column in table.columns if column not in of.values()]
        matching = [column for column in free if _is_label(table, column)] if role.by_values == "classes" else _longest(table, free)
        if len(matching) > 1:
            raise LoraLabError(f"the columns {' and '.join(map(repr, matching))} could each be the {role.name} (of {table.columns}): "
                               f"{role.option} decides")  # fmt: skip
        if matching:
            of[role.name], why[role.name] = matching[0], "by its values"
    return Columns(partial.shape, of, why)


def _is_label(table: Table, column: str) -> bool:
    """Few short values that come again and again."""
    values = [str(row[column]) for row in table if row.get(column) not in (None, "")]
    different = {*values}
    return 1 < len(different) <= min(MOST_CLASSES, len(values) // 2) and max(map(len, different)) <= LONGEST_LABEL


def _longest(table: Table, columns: Sequence[str]) -> list[str]:
    """The column of texts that are clearly longer than the others'; several where none is."""
    lengths = {column: _mean_length(table, column) for column in columns}
    texts = [column for column in columns if lengths[column] > 0]
    longest = max((lengths[column] for column in texts), default=0.0)
    return [column for column in texts if lengths[column] * CLEARLY > longest]


def _mean_length(table: Table, column: str) -> float:
    """0 of a column that holds anything but text."""
    values = [row.get(column) for row in table]
    if not all(isinstance(value, str) or value is None for value in values):
        return 0.0
    return sum(len(value or "") for value in values) / len(values)


def _nothing_fits(table: Table, found: Sequence[Columns]) -> str:
    needs = [f"{each.shape}, of which {' and '.join(f'{role.name} ({role.option})' for role in _missing(each))} is not found" for each in found]
    return f"the columns are {table.columns}; expected {'; or '.join(needs) or 'columns that go together'}"
