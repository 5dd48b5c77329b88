"""Rows that stay in their file: for data that do not fit into memory.

`open_rows` reads a JSONL file once, checks every row, and keeps where each begins; a row is read again when it is asked for. What `fit` encodes of
them waits in a temporary file in the same way, some ten bytes a token, so that memory holds 32 bytes a row, and in training about 90 more for the
batches of an epoch. TMPDIR says where the temporary file goes (where /tmp is memory, somewhere else); each process writes its own. A `mixture`
encodes into memory, each row once.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from ..files import saving
from .formats import PlacedSequence, Row, check_format, parsed, placed_lines, text_lines


class RowsOnDisk(PlacedSequence):
    """The rows of a JSONL file, in its order: a plain sequence, for `fit` and all else that takes rows. `where(i)` is "file, line n"."""

    def __init__(self, path: Path, places: Iterable[tuple[int, int]]) -> None:
        """places: the byte that each row begins at, and its line."""
        self.path, self._begins, self._lines = path, array("q"), array("q")
        self._state = _state(path)
        for begin, line in places:
            self._begins.append(begin)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._begins)

    def row(self, index: int) -> Row:
        """Raises LoraLabError where the file is no longer what was read."""
        begin, line = self._begins[index], self._lines[index]
        if _state(self.path) != self._state:
            raise LoraLabError(f"{self.path} has changed since its rows were opened: open them anew")
        with self.path.open("rb") as file:
            file.seek(begin)
            row: Row = parsed(file.readline().decode("utf-8-sig"), self.path, line)
            return row

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"

    def each(self, encode: Callable[[Row, str], Any]) -> Any:
        """``encode(row, where)`` of every row, on disk as they are; the file goes with what is returned."""
        return Encoded(encode(row, self.where(index)) for index, row in enumerate(self))


class Encoded(RowsOnDisk):
    """What became of rows, in a temporary file of its own."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lora-lab-rows-")
        path = Path(self._folder.name) / "encoded.jsonl"
        with saving("encoded rows", path):
            path.touch()
            super().__init__(path, _written(path, values))
        self._state = _state(path)


def _written(path: Path, values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Write the values, a line each; yields the place of each."""
    begin = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        for line, value in enumerate(values, start=1):
            yield begin, line
            begin += file.write(json.dumps(value, separators=(",", ":")) + "\n")


def _checked(path: Path) -> Iterator[tuple[int, int]]:
    """The places of the rows in a file, each of which is in one of the formats."""
    for number, (begin, line) in enumerate(placed_lines(path), start=1):
        if line.strip():
            check_format(parsed(line.rstrip("\r\n"), path, number), f"{path}, line {number}")
            yield begin, number


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise LoraLabError(f"{path} cannot be read: {error.strerror or error}") from None
    return found.st_size, found.st_mtime_ns


def open_rows(path: str | Path) -> RowsOnDisk:
    """The rows of a .jsonl file in one of the formats of `load`, which stay on disk.

    Raises LoraLabError, with file and line, for a missing or empty file, broken JSON, a row in none of the formats, or an array, which has to be
    read as a whole (`load` does).
    """
    path = Path(path)
    if next((line for line in text_lines(path) if line.strip()), "").lstrip().startswith("["):
        raise LoraLabError(f"{path} is one JSON array, which has to be read as a whole: expected an object a line (JSONL), or use load")
    rows = RowsOnDisk(path, _checked(path))
    if not len(rows):
        raise LoraLabError(f"{path} holds no rows: expected one JSON object a line")
    return rows
