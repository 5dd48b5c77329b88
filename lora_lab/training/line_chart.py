"""A line chart as SVG text, drawn with the pens of memory_math.svg: for curves of a run, several runs on one pair of axes.

The same numbers give the same text, without styles, ids or scripts, so that charts on one page cannot disturb each other. The colours are
Okabe and Ito's, which people with any of the common colour blindnesses tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape, quoteattr

from memory_math.svg import FAINT, FONT, INK, LETTER, PAPER, nice_ticks, number_text, pixel

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#222222")
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 72, WIDTH - 20, 62, HEIGHT - 46
MOST_POINTS = 600  # of a line; more cannot be told apart on these pixels
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """points: (x, y) in order of x.  colour: which of the palette.  faint: thin and pale, behind the others.  dots: a dot on each point.

    name: in the legend; "" leaves it out.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def line_chart(title: str, lines: Sequence[Line], x_label: str = "step") -> str:
    """One SVG document. Values that are no finite numbers are left out; without any, the chart says so.

    >>> line_chart("loss", [Line("run", [(1, 4.0), (2, 3.5)])]).startswith("<svg ")
    True
    """
    lines = [replace(line, points=thinned(finite(line.points))) for line in lines]
    lines = [line for line in lines if line.points]
    points = [point for line in lines for point in line.points]
    if not points:
        return _document(title, [_text(WIDTH / 2, HEIGHT / 2, "nothing was logged", "middle")])
    across, upward = (_Axis([point[axis] for point in points], *ends) for axis, ends in ((0, (LEFT, RIGHT)), (1, (BOTTOM, TOP))))
    drawn = [*_axes(across, upward, x_label), *_legend(lines)]
    for line in sorted(lines, key=lambda line: not line.faint):
        drawn += _line(line, [(across.at(x), upward.at(y)) for x, y in line.points])
    return _document(title, drawn)


def finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of its neighbours.

    >>> thinned([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)], most=2)
    [(1.5, 2.0), (3.5, 6.0)]
    """
    size = -(-len(points) // most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups] if size > 1 else list(points)


class _Axis:
    """Where values lie between two pixels; the ticks reach past them on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        self.ticks = nice_ticks(0.0 if 0 < low < high / 3 else low, high)  # close enough to zero to show it
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]) * (self.end - self.start)


def _axes(across: _Axis, upward: _Axis, x_label: str) -> list[str]:
    drawn = []
    for tick in across.ticks:
        drawn += [_rule(across.at(tick), BOTTOM, across.at(tick), TOP), _text(across.at(tick), BOTTOM + 16, number_text(tick), "middle")]
    for tick in upward.ticks:
        drawn += [_rule(LEFT, upward.at(tick), RIGHT, upward.at(tick)), _text(LEFT - 6, upward.at(tick) + 4, number_text(tick), "end")]
    return [*drawn, _text((LEFT + RIGHT) / 2, BOTTOM + 36, x_label, "middle")]


def _legend(lines: Sequence[Line]) -> list[str]:
    x, drawn, named = float(LEFT), list[str](), [line for line in lines if line.name]
    for line, name in zip(named, shortened([line.name for line in named]), strict=True):
        drawn += [_rule(x, 44, x + 14, 44, PALETTE[line.colour % len(PALETTE)], 3, line.faint), _text(x + 18, 48, name)]
        x += 18 + LETTER * len(name) + 14
    return drawn


def shortened(names: Sequence[str], letters: float = (RIGHT - LEFT) / LETTER) -> list[str]:
    """The names so that all fit side by side; of long ones, paths most often, the end stays.

    >>> shortened(["adapters/a-long-name/first", "b"], letters=30)
    ['…me/first', 'b']
    """
    each = int(letters / max(len(names), 1)) - 6  # the line before the name, and a gap
    if sum(len(name) + 6 for name in names) <= letters:
        return list(names)
    return [name if len(name) <= each else f"…{name[-max(each - 1, 1) :]}" for name in names]


def _line(line: Line, places: list[Point]) -> list[str]:
    colour, (thick, opacity) = PALETTE[line.colour % len(PALETTE)], (1, 0.35) if line.faint else (2, 1)
    path = " ".join(f"{pixel(x)},{pixel(y)}" for x, y in places)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}" stroke-opacity="{opacity}"/>']
    if line.dots or len(places) == 1:
        drawn += [f'<circle cx="{pixel(x)}" cy="{pixel(y)}" r="3" fill="{colour}"/>' for x, y in places]
    return drawn


def _rule(x: float, y: float, to_x: float, to_y: float, colour: str = FAINT, thick: int = 1, faint: bool = False) -> str:
    ends = f'x1="{pixel(x)}" y1="{pixel(y)}" x2="{pixel(to_x)}" y2="{pixel(to_y)}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{thick}"{" stroke-opacity=" + quoteattr("0.35") if faint else ""}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{pixel(x)}" y="{pixel(y)}" text-anchor="{anchor}" fill="{INK}" font-size="{size}">{escape(text)}</text>'


def _document(title: str, drawn: list[str]) -> str:
    name = f" aria-label={quoteattr(title)}" if title else ""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{name} {FONT}>'
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return "\n".join([start, paper, _text(16, 24, title, size=15), *drawn, "</svg>\n"])
