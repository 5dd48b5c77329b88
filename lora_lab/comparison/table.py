"""One table of a comparison: how well, at what cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import Method
from .results import Record
from .study import Study

PERCENT = ("accuracy", "F1 (macro)", "AUC", "rouge1", "rouge2", "rougeL", "clean endings")  # shares, told per hundred
MIB, LONGEST_CHOICE = 2**20, 60


def table(study: Study, names: Sequence[str]) -> list[list[str]]:
    """The heading and a line for each method that has been tested, and for the answer that needs no model."""
    reader, material = study.bench.reader, study.bench.material
    tested = {name: records for name in names if (records := tests_of(study, study.methods[name]))}
    without = reader.without_model(material.test)
    measures = list(next(iter(tested.values()))[0]["test"]) if tested else [reader.quality]
    measures.sort(key=lambda measure: measure != reader.quality)
    elsewhere = study.bench.elsewhere
    heading = ["method", *(f"{measure} (%)" if measure in PERCENT else measure for measure in measures), "trained", "MiB predicted", "MiB measured",
               "seconds", "bytes per task", "ms per answer", *([elsewhere.name] if elsewhere else []), "chosen"]  # fmt: skip
    lines = [heading]
    if without is not None:
        shown = [_share(measure, without[1][measure]) if measure in without[1] else "" for measure in measures]
        lines.append([without[0], *shown, *[""] * (len(heading) - 1 - len(measures))])
    return [*lines, *(_line(study.methods[name], records, measures, elsewhere.name if elsewhere else None) for name, records in tested.items())]


def tests_of(study: Study, method: Method) -> list[Record]:
    """The runs with the choice that the validation rows made."""
    choice = study.chosen(method)
    settings = [study.setting(method, "test", choice, seed) for seed in study.seeds_of(method)]
    return [study.results[setting] for setting in settings if setting in study.results]


def _line(method: Method, records: Sequence[Record], measures: Sequence[str], elsewhere: str | None) -> list[str]:
    first, rest = records[0], measures[1:]
    quality = spread_of(measures[0], [record["test"][measures[0]] for record in records])
    others = [_share(measure, statistics.mean(record["test"][measure] for record in records)) for measure in rest]
    forgot = [_forgot(records, elsewhere)] if elsewhere else []
    seconds, per_row = (statistics.mean(record[name] for record in records) for name in ("seconds", "seconds_per_row"))
    return [method.title, quality, *others, f"{first['trained']:,}", _mib(first["predicted_bytes"]), _mib(first["measured_bytes"]), f"{seconds:.0f}",
            f"{first['file_bytes']:,}", f"{1000 * per_row:.0f}", *forgot, _chosen(first["setting"]["choice"])]  # fmt: skip


def _forgot(records: Sequence[Record], elsewhere: str) -> str:
    """Before and after. Runs of an earlier command may have measured something else, or nothing."""
    if any(record["elsewhere_of"] != elsewhere for record in records):
        return "not measured"
    return f"{records[0]['elsewhere'][0]:.4g} -> {statistics.mean(record['elsewhere'][1] for record in records):.4g}"


def spread_of(measure: str, values: Sequence[float]) -> str:
    """Mean and sample standard deviation, and of how many seeds; one has no deviation.

    >>> spread_of("accuracy", [0.8, 0.82, 0.84]), spread_of("loss", [2.5])
    ('82.0 ± 2.0 (3)', '2.500')
    """
    mean = _share(measure, statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {_share(measure, statistics.stdev(values))} ({len(values)})"


def text(lines: Sequence[Sequence[str]]) -> str:
    """
    >>> print(text([["method", "loss"], ["LoRA", "2.5"]]))
    method  loss
    LoRA     2.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["<", *[">"] * (len(widths) - 1)]
    aligned[-1] = "<" if len(widths) > 2 else ">"  # what was chosen is text
    cells = [[f"{cell:{align}{width}}" for cell, align, width in zip(line, aligned, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same for a document: no bars in the cells."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows) + "\n"


def _share(measure: str, value: float) -> str:
    return f"{100 * value:.1f}" if measure in PERCENT else f"{value:.3f}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:,.0f}"


def _chosen(choice: Mapping[str, Any]) -> str:
    """
    >>> _chosen({"learning_rate": 0.001, "words": "a\\nb"})
    "learning rate 0.001, words 'a\\\\nb'"
    """
    said = {name: f"{value:g}" if isinstance(value, (int, float)) else _short(repr(value)) for name, value in choice.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_CHOICE else text[: LONGEST_CHOICE - 3] + "..."
