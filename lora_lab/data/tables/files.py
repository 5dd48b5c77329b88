"""A user's file as a table.

    .csv           the delimiter is the one of , ; tab | that the first row has most of; fields in quotes may hold line breaks (RFC 4180)
    .tsv, .txt     tabs. A quotation mark is one of the text, unless every field that begins with one is quoted as a whole. A .txt without tabs
                   is a text a line
    .json, .jsonl  objects, in an array or one a line
    .parquet       see parquet.py

The first row of the others is the columns' names, unless a cell of it is a number, empty, long, there twice, or one of the few values of its column:
then the columns are called column 1, column 2, ... (The first cell may be empty, as pandas writes its row numbers, and the last ones, as spreadsheets
do.)
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import LoraLabError
from ..formats import Row, Rows, numbered_values, text_lines
from .parquet import ENDING, parquet_rows

SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ENDING)
DELIMITERS = (",", ";", "\t", "|")
LONGEST_NAME = 60  # characters of a column's name; a longer first cell is a text
FEW_VALUES = 50  # in a column of labels
QUOTED = re.compile(r'"(?:[^"]|"")*"')
Numbered = tuple[int, list[str]]  # the line that a row begins on, and its fields


class Table(Rows):
    """Rows that may come from several files. places: file and line of each row."""

    def __init__(self, rows: Iterable[Row], places: Iterable[tuple[str, int]]) -> None:
        super().__init__([*rows])
        self.places = [*places]

    def where(self, index: int) -> str:
        file, number = self.places[index]
        return f"{file}, {'row' if file.lower().endswith(ENDING) else 'line'} {number}"

    def only(self, indices: Iterable[int]) -> Table:
        """These rows, in this order."""
        chosen = [*indices]
        return Table([self[i] for i in chosen], [self.places[i] for i in chosen])

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in the order they come."""
        return [*dict.fromkeys(name for row in self for name in row)]

    @classmethod
    def joined(cls, tables: Iterable[Table]) -> Table:
        parts = [*tables]
        return cls([row for table in parts for row in table], [place for table in parts for place in table.places])


def read_table(path: Path) -> Table:
    """The rows of one file, a dict of cells each. Raises LoraLabError, with file and line, for what cannot be read, and for no rows."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoraLabError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    rows = [*_rows(path, suffix)]
    if not rows:
        raise LoraLabError(f"{path} holds no rows")
    return Table([row for _, row in rows], [(str(path), line) for line, _ in rows])


def _rows(path: Path, suffix: str) -> Iterator[tuple[int, Row]]:
    if suffix == ENDING:
        return parquet_rows(path)
    return _objects(path) if suffix in (".json", ".jsonl") else _named([*_fields(path, suffix)], path)


def read_lines(path: Path, **cells: Any) -> Table:
    """A text a line. cells: others that all rows have."""
    lines = [(number, line.strip()) for number, line in enumerate(text_lines(path), start=1) if line.strip()]
    return Table([{"text": line, **cells} for _, line in lines], [(str(path), number) for number, _ in lines])


def _objects(path: Path) -> Iterator[tuple[int, Row]]:
    for line, value in numbered_values(path):
        if not isinstance(value, dict):
            raise LoraLabError(f"{path}, line {line}: a row is a {type(value).__name__}, expected an object with a field for each column")
        yield line, {sys.intern(str(name)): cell for name, cell in value.items()}


# Fields -----------------------------------------------------------------------------------------------------------------------


def _fields(path: Path, suffix: str) -> Iterator[Numbered]:
    """The fields of each row; all rows have as many."""
    lines = [*text_lines(path)]
    if suffix == ".csv":
        return _checked(_quoted(lines, path, _delimiter(lines, path)), path)
    if suffix == ".txt" and not any("\t" in line for line in lines):
        return iter([(1, ["text"]), *((number, [line.strip()]) for number, line in enumerate(lines, start=1) if line.strip())])
    plain = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start=1) if line.strip()]
    if len({len(fields) for _, fields in plain}) == 1:
        return iter(_unquoted(plain))
    return _checked(_quoted(lines, path, "\t"), path)


def _delimiter(lines: Sequence[str], path: Path) -> str:
    """The first row's most frequent one; quoted fields do not count."""
    first = QUOTED.sub("", next((line for line in lines if line.strip()), ""))
    return max(DELIMITERS, key=first.count)


def _quoted(lines: Sequence[str], path: Path, delimiter: str) -> Iterator[Numbered]:
    """Without lines that are blank. A text may be as long as the file: the parser's own limit is 128 KiB."""
    reader, begins, rows = csv.reader(lines, delimiter=delimiter, strict=True), 1, list[Numbered]()
    limit = csv.field_size_limit(max(csv.field_size_limit(), sum(map(len, lines))))
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                rows.append((begins, fields))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise LoraLabError(f"{path}, line {begins}: {error} (a text with a quotation mark stands in quotation marks, the inner ones twice)") from None
    finally:
        csv.field_size_limit(limit)
    return iter(rows)


def _unquoted(rows: list[Numbered]) -> list[Numbered]:
    """Without the quotation marks around whole fields, where these are all there are."""
    marked = [field for _, fields in rows for field in fields if field.startswith('"')]
    if not all(QUOTED.fullmatch(field) for field in marked):
        return rows
    return [(line, [field[1:-1].replace('""', '"') if field.startswith('"') else field for field in fields]) for line, fields in rows]


def _checked(rows: Iterator[Numbered], path: Path) -> Iterator[Numbered]:
    expected = 0
    for line, fields in rows:
        expected = expected or len(fields)
        if len(fields) != expected:
            raise LoraLabError(f"{path}, line {line}: {len(fields)} fields, the first row has {expected}: is there a delimiter or a quotation mark "
                               "in a text that is not in quotation marks?")  # fmt: skip
        yield line, fields


# Names ------------------------------------------------------------------------------------------------------------------------


def _named(rows: list[Numbered], path: Path) -> Iterator[tuple[int, Row]]:
    if not rows:
        return
    first, rest = [cell.strip() for cell in rows[0][1]], rows[1:]
    first = [cell or f"column {number}" if number in (1, *_last_empty(first)) else cell for number, cell in enumerate(first, start=1)]
    if not _is_header(first, [fields for _, fields in rest]):
        first, rest = [f"column {number}" for number in range(1, len(first) + 1)], rows
    names = [sys.intern(name) for name in first]
    for line, fields in rest:
        yield line, dict(zip(names, fields, strict=True))


def _last_empty(cells: list[str]) -> range:
    """The numbers of the empty cells that end a row, the first being 1.

    >>> list(_last_empty(["text", "", "label", "", ""]))
    [4, 5]
    """
    filled = max((number for number, cell in enumerate(cells, start=1) if cell), default=0)
    return range(filled + 1, len(cells) + 1)


def _is_header(first: list[str], rest: list[list[str]]) -> bool:
    if len({*first}) < len(first) or any(not name or len(name) > LONGEST_NAME or is_number(name) for name in first):
        return False
    values = [{fields[place].strip() for fields in rest} for place in range(len(first))]
    return not any(name in column and len(column) <= FEW_VALUES for name, column in zip(first, values, strict=True))


def is_number(text: str) -> bool:
    """
    >>> is_number("-1"), is_number("4.0"), is_number("four"), is_number("nan")
    (True, True, False, False)
    """
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", text.strip()) is not None
