"""The table that the results of the sentiment study make.

They are lines of lora_lab's comparisons: {"setting": what was asked for, "validation": accuracy, "test": accuracy or null, ...}. Machine, versions
and precision stand in the line and are no part of the setting: whoever has the file needs not run what is in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from sentiment_methods import METHODS

from lora_lab.comparison.results import Record, Results, Setting

__all__ = ["Record", "Results", "Setting", "table"]

COLUMNS = ("method", "trained", "bytes per task", "core-seconds", "validation", "test", "chosen")


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
