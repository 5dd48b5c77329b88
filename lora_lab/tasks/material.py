"""The rows of a task: found in a user's files, checked, divided into three parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.formats import Row
from ..data.tables import Classes, Columns, Table, classes_of, columns_of, divided, read_parts, some_of
from ..data.tables.folders import ALL, TEST, TRAIN, VALIDATION
from ..data.tables.labels import in_the_order_of, without_secret
from ..data.tables.parts import PARTS, Dropped
from ..errors import LoraLabError, did_you_mean
from ..models.base import longest_row
from ..models.progress import watched
from .base import Reader, Reading, Task, Unusable
from .instruction import Instruction
from .reviews import Reviews
from .sentiment import Sentiment
from .summarization import Summarization

COUNTED = 256  # rows whose tokens are counted at once
TASKS: dict[str, Task] = {each.name: each for each in (Sentiment(), Summarization(), Instruction(), Reviews())}


@dataclass(frozen=True)
class Material:
    """parts: "train", "validation" and "test", those that there are.  dropped: reason -> rows.  notes: what was decided about the parts.

    lengths: part -> tokens of each row, once a reader has counted them (`within`).  made: the parts that were taken from the training rows.
    """

    task: Task
    source: str
    columns: Columns
    classes: Classes | None
    parts: dict[str, Table]
    dropped: Dropped = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    lengths: dict[str, list[int]] = field(default_factory=dict)
    made: tuple[str, ...] = ()

    @property
    def train(self) -> Table:
        return self.part(TRAIN)

    @property
    def validation(self) -> Table:
        return self.part(VALIDATION)

    @property
    def test(self) -> Table:
        return self.part(TEST)

    def part(self, name: str) -> Table:
        """Raises LoraLabError where the source has none."""
        if not self.parts.get(name):
            there = ", ".join(f"{part} ({len(rows)})" for part, rows in self.parts.items() if rows) or "none"
            why = f"; dropped: {told(self.dropped)}" if self.dropped else ""
            raise LoraLabError(f"{self.source} has no {name} rows (it has: {there}{why})")
        return self.parts[name]

    def reader(self, model: nn.Module, tokenizer: Any, reading: Reading | None = None, words: str | None = None) -> Reader:
        """How this kind of model is asked. words: an instruction, or a template with {text} in it, in place of the usual one."""
        reader = self.task.reader(model, tokenizer, self.columns, self.classes, reading or Reading())
        if words is not None:
            reader.ask_in(words)
        return reader

    def first(self, **limits: int | None) -> Material:
        """With so many rows of a part at most, as `some` chooses them."""
        return self._only({part: self._some(rows, limits.get(part)) for part, rows in self.parts.items()})

    def some(self, rows: Table, most: int | None) -> Table:
        """So many of these rows, by a hash of what may not be in two parts, each class with its share."""
        return rows.only(self._some(rows, most))

    def _some(self, rows: Table, most: int | None) -> list[int]:
        return some_of(rows, most, self.task.key, (lambda row: row["label"]) if self.task.labelled else None)

    def within(self, reader: Reader, model: nn.Module, max_length: int | None = None, only: str | None = None) -> Material:
        """Without the rows that are longer than the model's context, or than max_length: the model cannot read them.  only: of this part."""
        limit = longest_row(model, max_length)
        dropped, refused = self.dropped.copy(), list[LoraLabError]()
        tokens = {part: _counted(reader, rows, dropped, refused) for part, rows in self.parts.items() if only in (None, part)}
        fits = {part: [place for place, each in enumerate(counts) if each and (limit is None or max(each) <= limit)]
                for part, counts in tokens.items()}  # fmt: skip
        for part, counts in tokens.items():
            if long := sum(each is not None for each in counts) - len(fits[part]):
                dropped[f"longer than {limit} tokens ({part})"] += long
        lengths = {part: [sum(each or ()) for each in counts] for part, counts in tokens.items()}
        if refused and not any(map(any, tokens.values())):
            raise refused[0]
        return replace(self, dropped=dropped, lengths=lengths)._only(fits)

    def _only(self, places: Mapping[str, Sequence[int]]) -> Material:
        """With these rows of each part that is named."""
        parts = {part: rows.only(places[part]) if part in places else rows for part, rows in self.parts.items()}
        return replace(self, parts=parts, lengths={part: [counts[i] for i in places[part]] for part, counts in self.lengths.items()})


def gather(name: str, source: str | Path, columns: Mapping[str, str] | None = None, labels: Sequence[str] | None = None, *,
           classes: Classes | None = None, parts: Mapping[str, str | Path] | None = None, wanted: Collection[str] = PARTS) -> Material:  # fmt: skip
    """The rows of a source for a task.

    name: of TASKS.  source: a bundled name, a file, a folder, or a hub data set.  columns: role -> column, where it is not plain.
    labels: what the classes are called.  classes: those of an earlier run, which keep their order.
    parts: "validation" or "test" -> a source of its own.  wanted: the parts to make where the source has none; none at all: "all" rows.
    Raises LoraLabError, naming what was found and the option that decides, for what cannot be read or is not plain.
    """
    if name not in TASKS:
        raise LoraLabError(f"--task {name}: expected one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    task, tables = TASKS[name], read_parts(source)
    for part, own in (parts or {}).items():
        tables = _with_part(tables, part, own)
    tables = {part: task.table(table, columns or {}) for part, table in tables.items()}
    found = _columns(task, tables, columns or {})
    classes = _classes(task, found, tables, labels, classes)
    dropped: dict[str, Dropped] = {part: Counter() for part in tables}
    rows = {part: _usable(table, task, found, classes, dropped[part]) for part, table in tables.items()}
    _check_usable(source, parts or {}, rows, dropped)
    tables, more, notes, made = divided(rows, task.key, (lambda row: row["label"]) if task.labelled else None, wanted)
    classes = classes if task.labelled else None
    counts = sum((*dropped.values(), more), Dropped())
    return Material(task, str(source), found, classes, tables, counts, (*notes, *_absent(classes, tables)), made=tuple(made))


def told(dropped: Mapping[str, int]) -> str:
    """
    >>> told({"no label": 3, "there twice": 1})
    '3 no label, 1 there twice'
    """
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def _with_part(tables: dict[str, Table], part: str, source: str | Path) -> dict[str, Table]:
    """With the rows of another source as this part; of a source that has parts of its own, the one of that name."""
    others = read_parts(source)
    return {**tables, part: others.get(part) or Table.joined(others.values())}


def _columns(task: Task, tables: Mapping[str, Table], given: Mapping[str, str]) -> Columns:
    """Of the training rows; the other parts must have them, too."""
    first = next((tables[part] for part in (TRAIN, ALL) if part in tables), next(iter(tables.values())))
    try:
        found = columns_of(first, task.shapes, given)
    except LoraLabError as error:
        raise LoraLabError(f"{error}{_other_task(task, first)}") from None
    guessed = {role: column for role, column in found.of.items() if found.why[role] == "by its values"}
    if guessed and (hint := _other_task(task, first)):
        said = " and ".join(f"{column!r} could be the {role} (--{role}-column)" for role, column in guessed.items())
        raise LoraLabError(f"by its values {said}{hint}")
    for part, table in tables.items():
        lacking = [column for role, column in found.of.items() if column not in table.columns and _needed(found, role)]
        secret = part == TEST and VALIDATION in tables and lacking == [found.of.get("label")]  # as in GLUE: its rows are dropped
        if lacking and not secret:
            raise LoraLabError(f"the {part} rows have no column {lacking[0]!r}, theirs are {table.columns}")
    return found


def _classes(task: Task, columns: Columns, tables: Mapping[str, Table], names: Sequence[str] | None, earlier: Classes | None) -> Classes | None:
    """names: as the user calls them. Raises LoraLabError for names where there are no classes."""
    if names is not None and "label" not in columns.of:
        raise LoraLabError(f"--labels {' '.join(names)}: these rows of --task {task.name} have no classes")
    if names is None and (earlier is not None or not task.labelled):
        return earlier
    found = classes_of(without_secret([row.get(columns["label"]) for row in table] for table in tables.values()), names)
    return found if earlier is None else in_the_order_of(earlier, found)


def _check_usable(source: str | Path, parts: Mapping[str, str | Path], rows: Mapping[str, Table], dropped: Mapping[str, Dropped]) -> None:
    """Raise LoraLabError for a source without a row that can be used: rows of another would stand in its place."""
    for part, own in parts.items():
        if not rows[part]:
            raise LoraLabError(f"no row of {own} can be used: {told(dropped[part])}")
    if not any(map(len, rows.values())):
        raise LoraLabError(f"no row of {source} can be used: {told(sum(dropped.values(), Dropped()))}")


def _absent(classes: Classes | None, parts: Mapping[str, Table]) -> list[str]:
    """A note on each class that nothing is trained of."""
    if classes is None or not parts.get(TRAIN):
        return []
    trained = {row["label"] for row in parts[TRAIN]}
    held = Counter(row["label"] for rows in parts.values() for row in rows)
    return [f"no training row is {name}" + (f": all {held[number]} are held back, so it cannot be learned" if held[number] else "")
            for number, name in enumerate(classes.names) if number not in trained]  # fmt: skip


def _needed(columns: Columns, name: str) -> bool:
    return any(role.name == name and role.needed for role in columns.shape.roles)


def _other_task(task: Task, table: Table) -> str:
    """A hint, where the rows are plainly those of another task."""
    for other in TASKS.values():
        for shape in other.shapes if other is not task else ():
            names = {role.name for role in shape.roles if role.needed}
            try:
                found = columns_of(table, [shape])
            except LoraLabError:
                continue
            if all(found.why[name] == "by its name" for name in names):
                return f"; but these rows are {shape.title}: --task {other.name}?"
    return ""


def _usable(table: Table, task: Task, columns: Columns, classes: Classes | None, dropped: Dropped) -> Table:
    rows, kept = list[Row](), list[int]()
    for index, row in enumerate(table):
        cells = {role: row.get(column) for role, column in columns.of.items()}
        try:
            rows.append(task.row(cells, classes))
            kept.append(index)
        except Unusable as reason:
            dropped[str(reason)] += 1
    return Table(rows, [table.places[index] for index in kept])


def _counted(reader: Reader, rows: Table, dropped: Dropped, refused: list[LoraLabError]) -> list[tuple[int, int] | None]:
    """The tokens of each row; None of one that cannot be put to the model, such as a talk that its template refuses: counted in `dropped`, and why
    added to `refused`."""
    starts = range(0, len(rows), COUNTED)
    shown = watched(starts, "count tokens", reader.reading.progress)
    return [each for start in shown for each in _counted_together(reader, rows.only(range(len(rows))[start : start + COUNTED]), dropped, refused)]


def _counted_together(reader: Reader, rows: Table, dropped: Dropped, refused: list[LoraLabError]) -> list[tuple[int, int] | None]:
    """The same, where one of them is refused one by one."""
    try:
        return [_tokens(example) for example in reader.examples(rows)]
    except LoraLabError:
        counts = list[tuple[int, int] | None]()
        for index in range(len(rows)):
            try:
                counts.append(_tokens(reader.examples(rows.only([index]))[0]))
            except LoraLabError as refusal:
                counts.append(None)
                refused.append(refusal)
                dropped[str(refusal).removeprefix(f"{rows.where(index)}: ")] += 1
        return counts


def _tokens(example: Mapping[str, Any]) -> tuple[int, int]:
    """Of what is read, and of an answer that does not stand behind it: an encoder-decoder's."""
    labels = example.get("labels", ())
    return len(example["input_ids"]), 0 if len(labels) == len(example["input_ids"]) else len(labels)
