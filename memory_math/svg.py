"""Charts as SVG text with the standard library alone: lines, stacked bars, the phases of a step, coloured cells.

Each function returns one standalone document with its own white background, so that it reads the same in a light and in a dark notebook.
The same input gives the same text. There are no styles, ids or scripts in it: several charts on one page cannot disturb each other.
The colours are Okabe and Ito's, which people with any of the common colour blindnesses tell apart (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from .errors import MemoryMathError

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # once the colours are used up, the next line looks different all the same
INK, FAINT, PAPER, ALARM = "#222222", "#D9D9D9", "#FFFFFF", "#B00020"
FONT = 'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="12"'
LETTER = 6.8  # pixels that one letter of this font takes, generously


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    width: int = 640,
    height: int = 400,
) -> str:
    """One line per entry of `series`, through its (x, y) points in the order given; a short line also shows its points.

    log_x, log_y: logarithmic axes, for which every value must be above 0.
    Raises MemoryMathError without a point, and for values that cannot be drawn (not finite; 0 or less on a logarithmic axis).
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise MemoryMathError(f"line_chart {title!r}: there is no point to draw")
    canvas, (left, right) = Canvas(width, height, title), (72, width - 26)
    top = canvas.legend(list(series), 40, left, lines=True)
    across = _Axis([x for x, _ in points], left, right, log_x, f"x of {title!r}")
    upward = _Axis([y for _, y in points], height - 52, top + 8, log_y, f"y of {title!r}")
    _draw_axes(canvas, across, upward, x_label, y_label)
    for number, line in enumerate(series.values()):
        canvas.line([(across.at(x), upward.at(y)) for x, y in line], number)
    return canvas.text_of()


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]], *, title: str, unit: str, width: int = 720, marks: Mapping[str, float] | None = None
) -> str:
    """One horizontal bar per entry of `bars`, its parts one after the other on a common scale, the sum written at its end.

    bars: name -> part -> amount in `unit`; a part has the same colour in every bar. marks: name -> amount, drawn as vertical lines
    through all bars (a GPU's memory). Raises MemoryMathError without a bar, and for amounts that are negative or not finite.
    """
    marks, totals = marks or {}, {name: sum(parts.values()) for name, parts in bars.items()}
    _amounts([amount for parts in bars.values() for amount in parts.values()] + list(marks.values()), title)
    if not bars:
        raise MemoryMathError(f"stacked_bars {title!r}: there is no bar to draw")
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    left = 24 + LETTER * max(len(name) for name in bars)
    canvas = Canvas(width, 0, title)
    top = canvas.legend(names, 40, 16) + 8 + 15 * len(marks)
    axis = _Axis([0.0, *totals.values(), *marks.values()], left, width - 30 - LETTER * len(f"{number_text(1234)} {unit}"), False, title)
    canvas.height = top + 30 * len(bars) + 44
    _draw_scale(canvas, axis, top, top + 30 * len(bars), unit)
    for row, (name, parts) in enumerate(bars.items()):
        _draw_bar(canvas, axis, top + 30 * row + 5, name, [(part, parts[part], _colour(names.index(part))) for part in parts], unit)
    for row, (name, amount) in enumerate(marks.items()):
        _draw_mark(canvas, axis.at(amount), (top - 4 - 15 * row, top + 30 * len(bars)), f"{name}: {number_text(amount)} {unit}")
    return canvas.text_of()


def timeline(phases: Mapping[str, float], *, title: str, unit: str, width: int = 720) -> str:
    """The phases of a step from left to right, each as high as its amount in `unit`; the highest is marked as the peak.

    All phases are equally wide: how long one takes is not shown. Raises MemoryMathError without a phase, and for negative amounts.
    """
    _amounts(phases.values(), title)
    if not phases:
        raise MemoryMathError(f"timeline {title!r}: there is no phase to draw")
    canvas, height, left, top = Canvas(width, 250, title), 250, 72, 62
    upward = _Axis([0.0, *phases.values()], height - 40, top, False, title)
    for tick in upward.ticks:
        canvas.rule(left, upward.at(tick), width - 18, upward.at(tick), FAINT)
        canvas.text(left - 6, upward.at(tick) + 4, number_text(tick), anchor="end")
    canvas.text(left - 6, top - 12, unit, anchor="end")
    peak, step = max(phases, key=lambda name: phases[name]), (width - 18 - left) / len(phases)
    for number, (name, amount) in enumerate(phases.items()):
        _draw_phase(canvas, (left + step * number, step), (upward.at(amount), height - 40), (name, f"{number_text(amount)} {unit}"), name == peak)
    canvas.rule(left, upward.at(phases[peak]), width - 18, upward.at(phases[peak]), ALARM, dash="6 3")
    return canvas.text_of()


def rectangles(cells: Sequence[Sequence[tuple[str, str]]], labels: Sequence[str], *, title: str) -> str:
    """Rows of coloured cells, as for the bits of a number: each cell a (text, colour), each row with its label in front.

    Colours are "#RRGGBB". Cells are of one size, wide enough for the longest text. Raises MemoryMathError where the rows and the labels
    differ in number, or there are none.
    """
    if len(cells) != len(labels) or not cells:
        raise MemoryMathError(f"rectangles {title!r}: {len(cells)} rows and {len(labels)} labels; expected as many, and at least one")
    side = max(18.0, 10 + LETTER * max((len(text) for row in cells for text, _ in row), default=1))
    left = 24 + LETTER * max(len(label) for label in labels)
    width = max(left + side * max(len(row) for row in cells), LETTER * 1.25 * len(title)) + 18
    canvas = Canvas(math.ceil(width), 52 + 28 * len(cells), title)
    for row, (label, line) in enumerate(zip(labels, cells, strict=True)):
        y = 44 + 28 * row
        canvas.text(left - 8, y + 15, label, anchor="end")
        for column, (text, colour) in enumerate(line):
            x = left + side * column
            canvas.box(x, y, side, 22, colour, f"{label}: {text}")
            canvas.text(x + side / 2, y + 15, text, anchor="middle", colour=_readable_on(colour))
    return canvas.text_of()


def column(*documents: str) -> str:
    """Several charts of this file in one document, one below the other.

    >>> column(timeline({"forward": 1}, title="a", unit="GiB"), timeline({"forward": 2}, title="b", unit="GiB")).count("<svg")
    3
    """
    sizes = [re.match(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)"', document) for document in documents]
    canvas, y = Canvas(0, 0, None), 0.0
    for document, size in zip(documents, sizes, strict=True):
        if size is None:
            raise MemoryMathError(f"column: expected documents that this file has drawn, got {document[:40]!r}")
        canvas.add(document.replace("<svg ", f'<svg y="{pixel(y)}" ', 1).rstrip())
        canvas.width, y = max(canvas.width, float(size[1])), y + float(size[2])
    canvas.height = y
    return canvas.text_of()


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`: multiples of 1, 2 or 5 times a power of ten, about `count` of them.

    >>> nice_ticks(0, 47)
    [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    """
    rough = max((high - low) or abs(high) or 1.0, abs(high) * 1e-9, 1e-300) / max(count - 1, 1)  # finer steps are not told apart
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Powers of ten around `low` and `high`, at most about `count`; over less than two decades also 2 and 5 times each.

    >>> log_ticks(3, 40)
    [2.0, 5.0, 10.0, 20.0, 50.0]
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first <= 2:
        every = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in (1, 2, 5)]
        lowest = max(tick for tick in every if tick <= low * 1.000001)
        highest = min(tick for tick in every if tick >= high * 0.999999 and tick > lowest)
        return [tick for tick in every if lowest <= tick <= highest]
    stride = -(-(last - first) // count)
    return [float(f"1e{power}") for power in range(first, last + stride, stride)]


def number_text(value: float) -> str:
    """Four figures, whole above 1,000, very large and small ones as 1.5e21.

    >>> number_text(12345), number_text(0.25), number_text(1.5e21), number_text(12.3456)
    ('12,345', '0.25', '1.5e21', '12.35')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:.4g}"


class Canvas:
    """A document in the making, in pixels from the top left corner."""

    def __init__(self, width: float, height: float, title: str | None) -> None:
        self.width, self.height, self.title = width, height, title
        self.elements: list[str] = []
        if title:  # a long one in smaller letters; a bold letter is about 0.6 of its size wide
            self.text(16, 24, title, size=max(9, min(15, int((width - 32) / (0.6 * len(title))))), bold=True)

    def add(self, element: str) -> None:
        self.elements.append(element)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK, size: int = 12, bold: bool = False, turn: int = 0
    ) -> None:
        """Text from, around or up to (x, y), by `anchor`; turn: degrees clockwise."""
        more = (f' font-size="{size}"' if size != 12 else "") + (' font-weight="bold"' if bold else "")
        more += f' transform="rotate({turn} {pixel(x)} {pixel(y)})"' if turn else ""
        self.add(f'<text x="{pixel(x)}" y="{pixel(y)}" text-anchor="{anchor}" fill={quoteattr(colour)}{more}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: str, says: str = "") -> None:
        """A filled rectangle; `says` is shown while the pointer rests on it."""
        place = f'x="{pixel(x)}" y="{pixel(y)}" width="{pixel(width)}" height="{pixel(height)}"'
        inside = f"<title>{escape(says)}</title>" if says else ""
        self.add(f'<rect {place} fill={quoteattr(colour)} stroke="{PAPER}" stroke-width="0.5">{inside}</rect>')

    def rule(self, x: float, y: float, to_x: float, to_y: float, colour: str = INK, dash: str = "", thick: float = 1) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        ends = f'x1="{pixel(x)}" y1="{pixel(y)}" x2="{pixel(to_x)}" y2="{pixel(to_y)}"'
        self.add(f'<line {ends} stroke="{colour}" stroke-width="{pixel(thick)}"{dashes}/>')

    def line(self, points: Sequence[tuple[float, float]], number: int) -> None:
        """The `number`-th line of a chart."""
        colour, dash = _colour(number), DASHES[number // len(PALETTE) % len(DASHES)]
        path, dashes = " ".join(f"{pixel(x)},{pixel(y)}" for x, y in points), f' stroke-dasharray="{dash}"' if dash else ""
        self.add(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        if len(points) <= 24:
            self.elements += [f'<circle cx="{pixel(x)}" cy="{pixel(y)}" r="3" fill="{colour}"/>' for x, y in points]

    def legend(self, names: Sequence[str], y: float, left: float, lines: bool = False) -> float:
        """Colour and name of each entry, in as many rows as they need; returns where the next thing may begin."""
        x = left
        for number, name in enumerate(names):
            needed = 18 + LETTER * len(name) + 14
            if x > left and x + needed > self.width - 8:
                x, y = left, y + 18
            if lines:
                self.rule(x, y + 6, x + 14, y + 6, _colour(number), DASHES[number // len(PALETTE) % len(DASHES)], thick=3)
            else:
                self.box(x, y, 12, 12, _colour(number))
            self.text(x + 18, y + 10, name)
            x += needed
        return y + 22

    def text_of(self) -> str:
        """The document."""
        size = f'width="{pixel(self.width)}" height="{pixel(self.height)}"'
        view, name = f'viewBox="0 0 {pixel(self.width)} {pixel(self.height)}"', f" aria-label={quoteattr(self.title)}" if self.title else ""
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img"{name} {FONT}>'
        paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
        return "\n".join([start, paper, *self.elements, "</svg>"]) + "\n"


class _Axis:
    """Where values lie between two pixels; the ticks reach past the values on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, what: str) -> None:
        for value in values:
            if not math.isfinite(value) or (log and value <= 0):
                raise MemoryMathError(f"{what}: {value!r} cannot be drawn; expected a finite number{' above 0 on a logarithmic axis' if log else ''}")
        low, high = float(min(values)), float(max(values))
        low = 0.0 if not log and 0 < low < high / 3 else low  # close enough to zero to show it
        self.ticks = log_ticks(low, high) if log else nice_ticks(low, high, 8)
        self.start, self.end, self.log = start, end, log
        self.low, self.high = self._place(self.ticks[0]), self._place(self.ticks[-1])

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        return self.start + (self._place(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def _draw_axes(canvas: Canvas, across: _Axis, upward: _Axis, x_label: str, y_label: str) -> None:
    for tick in across.ticks:
        canvas.rule(across.at(tick), upward.start, across.at(tick), upward.end, FAINT)
        canvas.text(across.at(tick), upward.start + 16, number_text(tick), anchor="middle")
    for tick in upward.ticks:
        canvas.rule(across.start, upward.at(tick), across.end, upward.at(tick), FAINT)
        canvas.text(across.start - 6, upward.at(tick) + 4, number_text(tick), anchor="end")
    canvas.rule(across.start, upward.start, across.end, upward.start)
    canvas.rule(across.start, upward.start, across.start, upward.end)
    canvas.text((across.start + across.end) / 2, upward.start + 38, x_label, anchor="middle")
    canvas.text(18, (upward.start + upward.end) / 2, y_label, anchor="middle", turn=-90)


def _draw_scale(canvas: Canvas, axis: _Axis, top: float, bottom: float, unit: str) -> None:
    for tick in axis.ticks:
        canvas.rule(axis.at(tick), top, axis.at(tick), bottom, FAINT)
        canvas.text(axis.at(tick), bottom + 16, number_text(tick), anchor="middle")
    canvas.text((axis.start + axis.end) / 2, bottom + 34, unit, anchor="middle")


def _draw_bar(canvas: Canvas, axis: _Axis, y: float, name: str, parts: Sequence[tuple[str, float, str]], unit: str) -> None:
    canvas.text(axis.start - 8, y + 14, name, anchor="end")
    sofar = 0.0
    for part, amount, colour in parts:
        wide = axis.at(sofar + amount) - axis.at(sofar)
        if amount:
            canvas.box(axis.at(sofar), y, wide, 20, colour, f"{name}, {part}: {number_text(amount)} {unit}")
        if wide > LETTER * len(number_text(amount)) + 6:
            canvas.text(axis.at(sofar) + wide / 2, y + 14, number_text(amount), anchor="middle", colour=_readable_on(colour))
        sofar += amount
    canvas.text(axis.at(sofar) + 6, y + 14, f"{number_text(sofar)} {unit}", bold=True)


def _draw_phase(canvas: Canvas, across: tuple[float, float], upward: tuple[float, float], says: tuple[str, str], highest: bool) -> None:
    """across: left edge and width. upward: top and bottom edge. says: the phase and its amount."""
    (x, wide), (y, bottom), (name, amount) = across, upward, says
    colour, inside = PALETTE[5] if highest else PALETTE[4], bottom - y > 22
    canvas.box(x, y, wide, bottom - y, colour, f"{name}: {amount}")
    canvas.text(x + wide / 2, bottom + 18, name, anchor="middle", bold=highest)
    ink, words = _readable_on(colour) if inside else INK, f"peak {amount}" if highest else amount
    canvas.text(x + wide / 2, y + 16 if inside else y - 5, words, anchor="middle", bold=highest, colour=ink)


def _draw_mark(canvas: Canvas, x: float, between: tuple[float, float], label: str) -> None:
    canvas.rule(x, between[0], x, between[1], ALARM, dash="5 3", thick=1.5)
    fits = x + LETTER * len(label) + 8 < canvas.width
    canvas.text(x + (4 if fits else -4), between[0] + 2, label, anchor="start" if fits else "end", colour=ALARM)


def _amounts(amounts: Iterable[float], title: str) -> None:
    for amount in amounts:
        if not math.isfinite(amount) or amount < 0:
            raise MemoryMathError(f"{title}: {amount!r} cannot be drawn; expected a finite number of at least 0")


def _colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def _readable_on(colour: str) -> str:
    """Dark or light text, whichever stands out from `colour` (relative luminance of Rec. 709)."""
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", colour):
        return INK
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else PAPER


def pixel(value: float) -> str:
    """At most two decimals, no minus zero: the same text on every machine."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
