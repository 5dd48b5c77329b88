"""A run's log as curves and as a few lines of text; several runs over each other.

    runs = [read_run("adapters/a"), read_run("adapters/b")]
    print(summary(runs))
    write(runs, "report.html")                  one file that needs nothing else; .svg gives the curves alone
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from memory_math.svg import column, number_text

from ..checks import is_number
from ..errors import LoraLabError
from ..files import saving, write_file
from .line_chart import Line, Point, line_chart

LOG = "log.jsonl"
BARS = "▁▂▃▄▅▆▇█"
GIB = 2**30
SMOOTHED_OVER = 25  # a curve that jumps is drawn as the mean over a 25th of its steps


@dataclass(frozen=True)
class RunLog:
    """name: as it was asked for.  steps, evaluations: the log's lines of either kind."""

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def points(self, key: str) -> list[Point]:
        """(step, value) of each line that has a number under `key`."""
        lines = self.evaluations if key == "eval_loss" else self.steps
        return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float)) and not isinstance(line[key], bool)]

    def speed(self) -> list[Point]:
        """(step, tokens per second) of each step."""
        counted = [(line["step"], line["tokens"], line["seconds"]) for line in self.steps if "tokens" in line and "seconds" in line]
        pairs = zip([(0, 0, 0.0), *counted], counted, strict=False)
        return [(step, (tokens - before) / (now - then)) for (_, before, then), (step, tokens, now) in pairs if now > then]

    def memory(self) -> list[Point]:
        return [(step, peak / GIB) for step, peak in self.points("peak_bytes") if peak]


def read_run(path: str | Path) -> RunLog:
    """The log of a run: of its folder, or the file itself. A last line that a stopped process left half is ignored.

    Raises LoraLabError where there is no log, none of a run, or a line that cannot be read.
    """
    file = Path(path) / LOG if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraLabError(f"no log of a run at {str(path)!r} ({error}): expected the output folder of a training, or its {LOG}") from None
    run, whole = RunLog(str(path)), lines[:-1]  # behind the last line break stands nothing, or half a line
    for number, line in enumerate(whole, start=1):
        entry = _entry(line, f"{file}, line {number}")
        (run.evaluations if "eval_loss" in entry else run.steps).append(entry)
    if not run.steps and not run.evaluations:
        raise LoraLabError(f"{file} holds no step yet: there is nothing to show")
    return run


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LoraLabError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise LoraLabError(f"{where}: expected an object with a 'step', as training writes them")
    if odd := [name for name, value in entry.items() if not (value is None or isinstance(value, bool) or is_number(value))]:
        raise LoraLabError(f"{where}: {odd[0]!r:.40} is {entry[odd[0]]!r:.80}, expected a number, as training writes them")
    return entry


# Curves ---------------------------------------------------------------------------------------------------------------------


def charts(runs: Sequence[RunLog]) -> list[str]:
    """One SVG for the loss, and one for each other curve that a run has logged; a colour for each run."""
    losses = [line for colour, run in enumerate(runs) for line in _loss_lines(run, colour, alone=len(runs) == 1)]
    drawn = [line_chart("loss" if len(runs) == 1 else "loss (with dots: held out)", losses)]
    for title, points_of, noisy in CURVES:
        named = [(run.name if len(runs) > 1 else "", points_of(run), colour) for colour, run in enumerate(runs)]
        if any(points for _, points, _ in named):
            drawn.append(line_chart(title, [line for each in named for line in (_noisy(*each) if noisy else [Line(*each)])]))
    return drawn


# title, points, whether it jumps from step to step
CURVES: tuple[tuple[str, Callable[[RunLog], list[Point]], bool], ...] = (
    ("learning rate", lambda run: run.points("learning_rate"), False), ("gradient norm, before clipping", lambda run: run.points("grad_norm"), True),
    ("tokens per second", RunLog.speed, True), ("peak memory so far, GiB", RunLog.memory, False),
)  # fmt: skip


def _loss_lines(run: RunLog, colour: int, alone: bool) -> list[Line]:
    """The training loss, and the held-out losses, with dots and of a lone run in a colour of their own."""
    held_out = Line("held out" if alone else "", run.points("eval_loss"), colour + alone, dots=True)
    return [*_noisy("training" if alone else run.name, run.points("loss"), colour), held_out]


def _noisy(name: str, points: Sequence[Point], colour: int) -> list[Line]:
    """Each step, pale, and the moving mean."""
    return [Line("", points, colour, faint=True), Line(name, smoothed(points), colour)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a window around each point, narrower at the ends so that neither is pulled inwards.

    >>> smoothed([(step, float(step)) for step in range(1, 101)])[50]
    (51, 51.0)
    """
    half, values = max(len(points) // SMOOTHED_OVER // 2, 1) if len(points) > 4 else 0, [value for _, value in points]
    means = []
    for index, (step, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append((step, sum(window) / len(window)))
    return means


def write(runs: Sequence[RunLog], path: str | Path) -> None:
    """Write the report: .html with the summary above the curves, .svg the curves alone. Raises LoraLabError for another ending."""
    path, drawn = Path(path), charts(runs)
    if path.suffix not in (".html", ".svg"):
        raise LoraLabError(f"{str(path)!r}: a report is written as .html or .svg")
    text = column(*drawn) if path.suffix == ".svg" else _page(runs, drawn)
    with saving("the report", path):
        write_file(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _page(runs: Sequence[RunLog], drawn: list[str]) -> str:
    title = escape(", ".join(run.name for run in runs))
    style = "body { font: 14px system-ui, Helvetica, Arial, sans-serif; margin: 2em; color: #222; background: #fff } svg { display: block }"
    head = f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>'
    return f"{head}\n<body>\n<h1>{title}</h1>\n<pre>{escape(summary(runs))}</pre>\n{''.join(drawn)}</body>\n</html>\n"


# Text -----------------------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[RunLog]) -> str:
    """A few lines for each run."""
    return "\n\n".join("\n".join([run.name, *(f"  {line}" for line in _about(run))]) for run in runs)


def _about(run: RunLog) -> list[str]:
    steps, held_out = run.points("loss"), run.points("eval_loss")
    lines = [_totals(run)]
    if steps:
        lines.append(_row("training loss", smoothed(steps)))
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        lines.append(f"{_row('held-out loss', held_out)}  best {number_text(best[1])} at step {best[0]}")
    lines += [_row(name, points) for name, points in (("gradient norm", run.points("grad_norm")),) if points]
    if memory := run.memory():
        lines.append(f"{'peak memory':<15}{max(peak for _, peak in memory):.2f} GiB")
    return lines


def _totals(run: RunLog) -> str:
    last = run.steps[-1] if run.steps else {"step": 0}
    said = [f"{last['step']} steps"]
    if last.get("tokens") and last.get("seconds"):
        said += [f"{last['tokens']:,} tokens", f"{last['seconds']:.0f} s", f"{last['tokens'] / last['seconds']:.0f} tokens/s"]
    if skipped := sum(line.get("skipped") is True for line in run.steps):
        said.append(f"{skipped} steps skipped by float16 overflow")
    return ", ".join(said)


def _row(name: str, points: Sequence[Point]) -> str:
    values = [value for _, value in points]
    return f"{name:<15}{number_text(values[0]):>7} -> {number_text(values[-1]):<7}  {sparkline(values)}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as bars of text, from the lowest to the highest; the mean of neighbours where there are more than `width`.

    >>> sparkline([4, 3, 2, 1, 1])
    '█▆▃▁▁'
    """
    values = [value for value in values if math.isfinite(value)]
    size = len(values) / min(width, max(len(values), 1))
    groups = [values[round(i * size) : max(round((i + 1) * size), round(i * size) + 1)] for i in range(min(width, len(values)))]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((mean - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for mean in means)
