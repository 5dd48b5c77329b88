"""The runs of a comparison: in memory, or in a file, a JSON line each, so that a comparison of hours can be stopped and goes on where it was.

A line is {"setting": what was asked for, "validation": quality, "test": scores or null, ...}. A run is found again by its whole setting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from ..files import saving

Setting = dict[str, Any]
Record = dict[str, Any]


class Results:
    """path: None keeps nothing. A line that was cut short by an interruption is no result."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for line in _lines(path):
            if (record := _record(line)) is not None:
                self.records[key(record["setting"])] = record

    def __contains__(self, setting: Setting) -> bool:
        return key(setting) in self.records

    def __getitem__(self, setting: Setting) -> Record:
        return self.records[key(setting)]

    def add(self, record: Record) -> None:
        """Written before it counts; behind a line that was cut short on a line of its own."""
        if self.path is not None:
            with saving("a result", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    cut_short = file.tell() > 0 and not self.path.read_bytes().endswith(b"\n")
                    file.write(b"\n" * cut_short + json.dumps(record).encode() + b"\n")
        self.records[key(record["setting"])] = record

    def of(self, **wanted: Any) -> list[Record]:
        """The records whose setting has these values."""
        return [record for record in self.records.values() if all(record["setting"].get(name) == value for name, value in wanted.items())]


def key(setting: Setting) -> str:
    """
    >>> key({"b": 1, "a": 2}) == key({"a": 2, "b": 1})
    True
    """
    return json.dumps(setting, sort_keys=True)


def _lines(path: Path | None) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise LoraLabError(f"{path} cannot be read: {error}") from None


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("setting"), dict) else None
