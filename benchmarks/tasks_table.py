"""The table that the results of tasks.py make: what the answers come to, and between which values 95 % of the means of other such rows would lie.

The interval is the bootstrap's over the test rows (Efron 1979); behind ± is the standard deviation over the seeds of the training. What LoRA changes
is compared row by row, as both models answered the same ones.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from tasks_data import LORA, TASKS, UNTUNED, Means
from tasks_readers import Values

from lora_lab.comparison.results import Record, Results

DRAWS = 2000
NAMES = {"zero-shot": UNTUNED, "lora": LORA}  # of methods
PERCENT = ("ROUGE-L", "clean endings", "read as asked")
Group = dict[str, list[Record]]  # method -> its records, a seed each


def groups(results: Results, task: str) -> list[Group]:
    """The test runs of a task, those of equal rows and settings together."""
    found: dict[str, Group] = {}
    for record in results.of(source=task, stage="test"):
        same = {name: value for name, value in record["setting"].items() if name not in ("method", "choice", "seed")}
        found.setdefault(json.dumps(same, sort_keys=True), {}).setdefault(record["setting"]["method"], []).append(record)
    return [*found.values()]


def table(group: Group) -> str:
    """Markdown."""
    lines = [*values_of(group)]
    measures = [*dict.fromkeys(measure for _, seeds in lines for values in seeds for measure in values)]
    rows = [["", *(f"{name} (%)" if name in PERCENT else name for name in measures)], ["---"] * (1 + len(measures))]
    rows += [[name, *(cell(measure, [values[measure] for values in seeds if measure in values]) for measure in measures)] for name, seeds in lines]
    if len(both := [seeds for name, seeds in lines if name in (UNTUNED, LORA)]) == 2:
        rows.append([f"{LORA} less {UNTUNED}", *(difference(measure, *both) for measure in measures)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def values_of(group: Group) -> Iterator[tuple[str, list[Values]]]:
    """(name, the values of each seed) of each line: the answers that need no model, and the methods'."""
    for name, values in next(iter(group.values()))[0]["test"]["references"].items():
        yield name, [values]
    for method, name in NAMES.items():
        if method in group:
            yield name, [record["test"]["values"] for record in group[method]]


def means(group: Group) -> Means:
    return {name: {measure: statistics.mean(mean(values[measure]) for values in seeds) for measure in seeds[0]} for name, seeds in values_of(group)}


def told(task: str, group: Group) -> str:
    """The table, what it was made with, and what was to come of it."""
    setting = next(iter(group.values()))[0]["setting"]
    rows = ", ".join(f"{count} {part}" for part, count in setting["rows"].items())
    made = f"{task}: {setting['model']}, rows: {rows}; {choices(group)}; {json.dumps(setting['training'])}, {json.dumps(setting['generation'])}"
    asked = [f"{'met' if met else 'MISSED'}: {what}" for what, met in TASKS[task].required(means(group))] if {*NAMES} <= {*group} else []
    return "\n".join([made, "", table(group), "", *asked])


def choices(group: Group) -> str:
    """What was chosen; of LoRA also what a run takes, with its test."""
    said = [f"{NAMES[method]}: {records[0]['setting']['choice']}" for method, records in group.items()]
    seconds = [record["core_seconds"] for record in group.get("lora", ())]
    return "; ".join(said) + (f", {statistics.mean(seconds):.0f} core-seconds with the test" if seconds else "")


# Cells ------------------------------------------------------------------------------------------------------------------------


def cell(measure: str, seeds: Sequence[list[Any]]) -> str:
    """
    >>> cell("read as asked", [[1, 0, 1, 1]]), cell("loss", [[(6.0, 3), (2.0, 1)]] * 2), cell("loss", [])
    ('75.0 (25.0 to 100.0)', '2.00 ± 0.00 of 2 (2.00 to 2.00)', '')
    """
    if not seeds:
        return ""
    each = [mean(rows) for rows in seeds]
    spread = f" ± {shown(measure, statistics.stdev(each))} of {len(each)}" if len(each) > 1 else ""
    low, high = interval(seeds)
    return f"{shown(measure, statistics.mean(each))}{spread} ({shown(measure, low)} to {shown(measure, high)})"


def difference(measure: str, before: Sequence[Values], after: Sequence[Values]) -> str:
    """
    >>> difference("words", [{"words": [5, 9]}], [{"words": [4, 8]}])
    '-1.00 (-1.00 to -1.00)'
    """
    columns = [[values[measure] for values in seeds] for seeds in (before, after)]
    change = statistics.mean(map(mean, columns[1])) - statistics.mean(map(mean, columns[0]))
    low, high = interval(columns[1], less=columns[0])
    return f"{shown(measure, change, '+')} ({shown(measure, low, '+')} to {shown(measure, high, '+')})"


def shown(measure: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if measure in PERCENT else f"{value:{sign}.2f}"


def mean(rows: list[Any]) -> float:
    sums, weights = parts(rows)
    return float(sums.sum() / weights.sum())


def parts(rows: list[Any]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(sum, weight) of each row; a plain number weighs 1."""
    numbers = numpy.asarray(rows, dtype=float)
    return (numbers[:, 0], numbers[:, 1]) if numbers.ndim == 2 else (numbers, numpy.ones(len(numbers)))


def interval(seeds: Sequence[list[Any]], less: Sequence[list[Any]] = ()) -> tuple[float, float]:
    """95 % of the means (less the other means) of as many rows, drawn with replacement, of all seeds."""
    drawn = numpy.random.default_rng(0).integers(0, len(seeds[0]), (DRAWS, len(seeds[0])))
    low, high = numpy.percentile(of_draws(seeds, drawn) - (of_draws(less, drawn) if less else 0.0), [2.5, 97.5])
    return float(low), float(high)


def of_draws(seeds: Sequence[list[Any]], drawn: numpy.ndarray) -> numpy.ndarray:
    """[draws], the mean of the seeds' means of each draw."""
    each = [(sums[drawn].sum(1) / weights[drawn].sum(1)) for sums, weights in map(parts, seeds)]
    return numpy.mean(each, axis=0)
