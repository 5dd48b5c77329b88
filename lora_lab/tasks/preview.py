"""What was understood of a user's data, before anything is learned from it."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter

from .base import Reader
from .material import Material, told

WIDTH, LINES, INDENT = 110, 14, "    "


def preview(material: Material, reader: Reader) -> str:
    """Which shape, which column is what, the parts, classes and lengths, what was dropped and why, and the first row as the model reads it.

    Tokens are told once they are counted: `material.within(reader, model)`.
    """
    lines = [f"{material.source}: {material.columns.shape.title}"]
    lines += [f"  {role:<12}{column!r}, {material.columns.why.get(role, '')}" for role, column in material.columns.of.items()]
    if material.classes is not None:
        lines.append(f"  classes     {material.classes.table()}")
    lines += [f"  {part:<12}{_part(part, material)}" for part, rows in material.parts.items() if rows]
    lines += [f"  dropped     {told(material.dropped)}"] if material.dropped else []
    lines += [f"  note        {note}" for note in material.notes]
    first = next(rows for part, rows in material.parts.items() if rows and (part in material.lengths or not material.lengths))
    return "\n".join([*lines, "  the first row as the model reads it, what it is to answer in brackets:", _shortened(reader.shown(first[0]))])


def _part(part: str, material: Material) -> str:
    rows, counts = material.parts[part], ""
    if material.classes is not None:
        each = Counter(row["label"] for row in rows)
        counts = " (" + ", ".join(f"{each[number]:,} {name}" for number, name in enumerate(material.classes.names)) + ")"
    return f"{len(rows):,} rows{counts}" + (f", {percentiles(material.lengths[part])}" if part in material.lengths else "")


def percentiles(tokens: list[int]) -> str:
    """
    >>> percentiles([5, 7, 6, 60])
    'tokens: median 6, 95 % up to 60, longest 60'
    """
    ordered = sorted(tokens)
    most = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return f"tokens: median {statistics.median_low(ordered)}, 95 % up to {most}, longest {ordered[-1]}"


def _shortened(text: str) -> str:
    """Wrapped; of a long text the beginning and the end."""
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, WIDTH) or [""]]
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], f"... {len(lines) - LINES + 1} lines ...", *lines[1 - LINES // 2 :]]
    return "\n".join(INDENT + line for line in lines)
