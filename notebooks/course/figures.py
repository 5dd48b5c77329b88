"""One look for the figures of the course; a cell calls one function, and the figure stands under it.

    curves({"LoRA": losses, "full": others}, x="step", y="training loss")
    bars({"A": 4096, "B": 512, "W": 32768}, x="parameters")
    left, right = panels(2);  curves({...}, axes=left);  bars({...}, axes=right)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from .tables import text_of

# Okabe and Ito 2008: eight colours that people who see fewer can tell apart
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK)
LOOK = {
    "figure.figsize": (7.0, 3.4), "figure.dpi": 96, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11, "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS), "lines.linewidth": 1.8, "figure.max_open_warning": 0,
}  # fmt: skip
plt.rcParams.update(LOOK)
FEW = 12  # points of a line
Numbers = Sequence[float]


def panels(columns: int, rows: int = 1, height: float = 3.2) -> list[Any]:
    """Axes beside and below each other, row by row."""
    _, grid = plt.subplots(rows, columns, figsize=(4.0 * columns if columns > 1 else 7.0, height * rows), squeeze=False)
    return [axes for row in grid for axes in row]


def curves(lines: Mapping[str, Any], x: str = "", y: str = "", title: str = "", *, log: str = "", dots: bool | None = None,
           axes: Any = None) -> None:  # fmt: skip
    """name -> y, or (x, y), or (x, y, spread): a line each; a spread is drawn as bars. log: "x", "y" or "xy".  dots: None marks few points."""
    axes = axes or panels(1)[0]
    for name, line in lines.items():
        xs, ys, *spread = line if isinstance(line, tuple) else (range(1, len(line) + 1), line)
        marker = "o" if dots or (dots is None and len(ys) <= FEW) else None
        axes.errorbar(list(xs), list(ys), yerr=list(spread[0]) if spread else None, label=name, marker=marker, markersize=4, capsize=3)
    _logarithmic(axes, log)
    _finish(axes, x, y, title)
    if any(lines):
        axes.legend()


def bars(values: Mapping[str, float], x: str = "", title: str = "", *, log: bool = False, spread: Mapping[str, float] | None = None,
         colours: Sequence[str] | str = BLUE, texts: Mapping[str, str] | None = None, axes: Any = None) -> None:  # fmt: skip
    """name -> value: horizontal bars in their order from the top, each with its number (or its text) behind it."""
    axes = axes or panels(1, height=0.6 + 0.42 * len(values))[0]
    names, heights = list(values), [float(value) for value in values.values()]
    axes.barh(names, heights, color=colours, xerr=[spread[name] for name in names] if spread else None, capsize=3)
    for place, name in enumerate(names):
        reach = heights[place] + (spread[name] if spread else 0)
        axes.annotate((texts or {}).get(name, text_of(values[name])), (max(reach, 0), place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.14)
    _logarithmic(axes, "x" if log else "")
    _finish(axes, x, "", title)


def stacked(parts: Mapping[str, Mapping[str, float]], x: str = "", title: str = "", *, axes: Any = None) -> None:
    """bar -> part -> value: horizontal bars made of parts of one colour each; the sum stands behind."""
    axes = axes or panels(1, height=1.3 + 0.45 * len(parts))[0]
    kinds = list(dict.fromkeys(part for bar in parts.values() for part in bar))
    left = dict.fromkeys(parts, 0.0)
    for colour, kind in enumerate(kinds):
        widths = [bar.get(kind, 0.0) for bar in parts.values()]
        axes.barh(list(parts), widths, left=list(left.values()), label=kind, color=COLOURS[colour % len(COLOURS)])
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    for place, total in enumerate(left.values()):
        axes.annotate(text_of(total), (total, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.14)
    _finish(axes, x, "", title)
    axes.figure.legend(ncols=min(len(kinds), 4), loc="outside lower center", fontsize="small")


def heatmap(values: Sequence[Numbers], rows: Sequence[Any], columns: Sequence[Any], x: str = "", y: str = "", title: str = "", *,
            form: str = ".2f", best: str | None = None, axes: Any = None) -> None:  # fmt: skip
    """A number in each cell, dark where it is large. best: "low" or "high" frames that cell."""
    axes = axes or panels(1, height=1.2 + 0.45 * len(rows))[0]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    cells = [(value, i, j) for i, row in enumerate(values) for j, value in enumerate(row)]
    for value, i, j in cells:
        axes.text(j, i, format(value, form), ha="center", va="center", color="white" if value < middle else "black")
    if best:
        _, i, j = (min if best == "low" else max)(cells)
        axes.add_patch(plt.Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor=RED, linewidth=3))
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.grid(visible=False)
    _finish(axes, x, y, title)


def matrices(named: Mapping[str, Any], title: str = "") -> None:
    """name -> matrix [rows, columns]: pictures of one scale of length, each with colours of its own; blue is below zero, red above."""
    arrays = {name: matrix.detach().float().cpu().numpy() for name, matrix in named.items()}
    gap, width = 0.6, 7.2
    each = (width - gap * (len(arrays) - 1)) / sum(array.shape[1] for array in arrays.values())
    high = max(max(array.shape[0] for array in arrays.values()) * each, 0.12)
    figure, left = plt.figure(figsize=(width, high + 0.85), layout="none"), 0.0
    for name, array in arrays.items():
        wide, tall = max(array.shape[1] * each, 0.12), max(array.shape[0] * each, 0.06)
        axes = figure.add_axes((left / width, (high - tall) / 2 / (high + 0.85), wide / width, tall / (high + 0.85)))
        reach = float(abs(array).max()) or 1.0
        axes.imshow(array, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name}\n{array.shape[0]} × {array.shape[1]}", loc="left", fontsize=9)
        axes.grid(visible=False)
        left += wide + gap
    figure.suptitle(title, x=0.0, ha="left", fontsize=11)


def _logarithmic(axes: Any, log: str) -> None:
    for name in log:
        axes.set(**{f"{name}scale": "log"})


def _finish(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left")
