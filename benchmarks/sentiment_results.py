"""The results of the sentiment study: a JSON line for each run, found again by its whole setting; and the table they make.

A line is {"setting": what was asked for, "validation": accuracy, "test": accuracy or null, ...}. Machine, versions and precision stand in the
line and are no part of the setting: whoever has the file needs not run what is in it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentiment_methods import METHODS

Setting = dict[str, Any]
Record = dict[str, Any]
COLUMNS = ("method", "trained", "bytes per task", "core-seconds", "validation", "test", "chosen")


def key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


class Results:
    """A file of results. A line that was cut short by an interruption is no result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if (record := read_line(line)) is not None:
                self.records[key(record["setting"])] = record

    def __contains__(self, setting: Setting) -> bool:
        return key(setting) in self.records

    def __getitem__(self, setting: Setting) -> Record:
        return self.records[key(setting)]

    def append(self, record: Record) -> None:
        """Written and flushed before it counts; behind a line that was cut short on a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            cut_short = file.tell() > 0 and not self.path.read_bytes().endswith(b"\n")
            file.write(b"\n" * cut_short + json.dumps(record).encode() + b"\n")
        self.records[key(record["setting"])] = record

    def of(self, **wanted: Any) -> list[Record]:
        """The records whose setting has these values."""
        return [record for record in self.records.values() if all(record["setting"].get(name) == value for name, value in wanted.items())]


def read_line(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "setting" in record else None


# The table ------------------------------------------------------------------------------------------------------------------------


def table(results: Results, model: str, methods: Iterable[str], **wanted: Any) -> str:
    """Markdown, a line for each method that has test results, in the methods' order. wanted: values of settings, such as rows=2000."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for method in methods:
        if records := results.of(model=model, method=method, stage="test", **wanted):
            rows.append(row(method, records))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(method: str, records: list[Record]) -> tuple[str, ...]:
    first, seconds = records[0], statistics.mean(record["seconds"] for record in records)
    validation, test = ([record[split] for record in records] for split in ("validation", "test"))
    chosen = ", ".join(f"{name} {text(value)}" for name, value in first["setting"]["choice"].items())
    return (METHODS[method].title, f"{first['trained']:,}", f"{first['bytes']:,}", f"{seconds:.0f}", spread(validation), spread(test), chosen)


def spread(shares: list[float]) -> str:
    """Mean and sample standard deviation in per cent, and of how many; one result has no deviation.

    >>> spread([0.8, 0.82, 0.84]), spread([0.5])
    ('82.0 ± 2.0 (3)', '50.0')
    """
    percent = [100 * share for share in shares]
    return f"{percent[0]:.1f}" if len(percent) == 1 else f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f} ({len(percent)})"


def text(value: Any) -> str:
    """A value in a cell: no line breaks, no bars.

    >>> text("Review: {x}\\nSentiment:"), text(0.07)
    ('`Review: {x}⏎Sentiment:`', '0.07')
    """
    return f"`{value}`".replace("\n", "⏎").replace("|", "\\|") if isinstance(value, str) else f"{value:g}"
