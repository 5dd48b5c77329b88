"""Numbers as people read them; the table, the picture and the JSON of a footprint; grids of cells as text, Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from html import escape
from typing import TYPE_CHECKING

from .limits import limit_of
from .svg import PALETTE, column, stacked_bars, timeline
from .tape import PUBLIC_PARTS

if TYPE_CHECKING:
    from .footprint import Footprint, Interval

SI = ("B", "kB", "MB", "GB", "TB", "PB")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
EIGHTHS = " ▏▎▍▌▋▊▉█"  # Unicode's left blocks, U+258F down to U+2588: an eighth of a cell up to a whole one
BAR_CELLS = 16


def size_text(nbytes: int, binary: bool = True) -> str:
    """Bytes in the largest unit that leaves at least 1; binary: steps of 1024 (KiB, MiB, GiB), else of 1000 (kB, MB, GB).

    >>> size_text(3 * 2**30), size_text(80_000_000_000, binary=False)
    ('3.00 GiB', '80.00 GB')
    """
    step, units, value = (1024, BINARY, float(nbytes)) if binary else (1000, SI, float(nbytes))
    for unit in units:
        if abs(value) < step or unit == units[-1]:
            break
        value /= step
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def share_bar(share: float, cells: int = BAR_CELLS) -> str:
    """A bar of block characters, `cells` long for a share of 1; whatever is above 0 leaves a trace.

    >>> share_bar(0.5, cells=8), share_bar(0.001, cells=8), share_bar(0, cells=8)
    ('████', '▏', '')
    """
    eighths = max(round(min(share, 1.0) * cells * 8), 1 if share > 0 else 0)
    return (EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def unit_for(most: int) -> tuple[int, str]:
    """Bytes and name of the unit that amounts up to `most` are read in; GiB at most, as GPUs are.

    >>> unit_for(3 * 2**40), unit_for(5 * 2**20)
    ((1073741824, 'GiB'), (1048576, 'MiB'))
    """
    power = max(at for at in range(BINARY.index("GiB") + 1) if 1024**at <= max(most, 1))
    return 1024**power, BINARY[power]


def parts_of(footprint: Footprint) -> dict[str, int]:
    """Part -> bytes at the peak, in the order that tables show them."""
    return {part: getattr(footprint, part) for part in PUBLIC_PARTS}


def title_of(footprint: Footprint) -> str:
    """The model and what is asked of it, in one line."""
    asked = footprint.request
    return f"{footprint.name}: {asked['method']}, {asked['precision']}, {asked['batch_size']} x {asked['sequence_length']} tokens"


def footprint_table(footprint: Footprint) -> str:
    """The parts by size with their share and origin, the totals, the phases, what it was checked against."""
    asked, total = footprint.request, footprint.total
    lines = [f"{title_of(footprint)}, {asked['implementation']} on {asked['device']}", _line("part", "bytes", "share", "", "how")]
    for part, nbytes in parts_of(footprint).items():
        share = nbytes / max(total, 1)
        lines.append(_line(part.replace("_", " "), size_text(nbytes), f"{share:.1%}", share_bar(share), footprint.how[part]))
    where = f"{_range(footprint.intervals['allocated'])}; peak in phase {footprint.peak_phase!r}"
    lines.append(_line("total allocated", size_text(total), "", "", where))
    lines += [_line(name, size_text(interval.estimate), "", "", _range(interval)) for name, interval in _intervals(footprint)]
    lines.append(_line("phase", "peak"))
    for name, nbytes in footprint.phases.items():
        mark = "<- the peak" if name == footprint.peak_phase else ""
        lines.append(_line(name, size_text(nbytes), "", share_bar(nbytes / max(total, 1)), mark))
    return "\n".join([*lines, *checks_of(footprint)])


def checks_of(footprint: Footprint) -> list[str]:
    """What the prediction was checked against, and what of it was not."""
    missing = [f"not checked against anything: {', '.join(footprint.outside)}"] if footprint.outside else []
    idle = [f"without effect here: {', '.join(footprint.idle)}"] if footprint.idle else []
    return [*idle, f"checked: {footprint.validated}", *missing]


def footprint_svg(footprint: Footprint, gpu: str | int | None = None) -> str:
    """The parts as one stacked bar, with the usable bytes of `gpu` (or a limit in bytes) as a mark, above the peaks of the phases."""
    limits = {} if gpu is None else dict([limit_of(gpu)])
    divisor, unit = unit_for(max(footprint.total, *limits.values(), 1))
    parts = {part.replace("_", " "): nbytes / divisor for part, nbytes in parts_of(footprint).items()}
    marks = {name: nbytes / divisor for name, nbytes in limits.items()}
    phases_divisor, phases_unit = unit_for(footprint.total)
    phases = {name: nbytes / phases_divisor for name, nbytes in footprint.phases.items()}
    bar = stacked_bars({"at the peak": parts}, title=title_of(footprint), unit=unit, marks=marks)
    return column(bar, timeline(phases, title="Peak of each phase", unit=phases_unit))


def footprint_html(footprint: Footprint) -> str:
    """The parts, the totals and the picture, for a notebook."""
    total, asked = footprint.total, footprint.request
    rows = [
        [escape(part.replace("_", " ")), size_text(nbytes), f"{nbytes / max(total, 1):.1%}", _html_bar(nbytes / max(total, 1), number),
         escape(footprint.how[part])]
        for number, (part, nbytes) in enumerate(parts_of(footprint).items())
    ]  # fmt: skip
    peak = f"{_range(footprint.intervals['allocated'])}; peak in phase {escape(repr(footprint.peak_phase))}"
    rows.append(["<b>total allocated</b>", f"<b>{size_text(total)}</b>", "", "", peak])
    rows += [[name, size_text(interval.estimate), "", "", _range(interval)] for name, interval in _intervals(footprint)]
    where = f"{escape(title_of(footprint))}, {escape(str(asked['implementation']))} on {escape(str(asked['device']))}"
    table = html_grid(["part", "bytes", "share", "", "how"], rows, left=(0, 3, 4))
    checks = "<br>".join(escape(line) for line in checks_of(footprint))
    return f"<div><p><b>{where}</b></p>\n{table}\n<p>{checks}</p>\n{footprint_svg(footprint)}</div>"


def footprint_json(footprint: Footprint, indent: int | None = 2) -> str:
    """Everything that `as_dict` has, bytes as whole numbers."""
    return json.dumps(footprint.as_dict(), indent=indent, default=str)


def comparison_table(rows: list[tuple[str, int, int]]) -> str:
    """Rows of (name, predicted bytes, measured bytes) with their ratio."""
    lines = [f"{'':<20}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
    for name, predicted, measured in rows:
        ratio = f"{predicted / measured:.3f}" if measured else "-"
        lines.append(f"{name:<20}{size_text(predicted):>12}{size_text(measured):>12} {ratio:>7}")
    return "\n".join(lines)


def text_grid(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns as wide as their widest cell; those in `left` begin at the left, the others end at the right.

    >>> print(text_grid(["model", "GiB"], [["a", "1.50"], ["long", "12.00"]]))
    model    GiB
    a       1.50
    long   12.00
    """
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    lines = [[f"{cell:<{wide}}" if at in left else f"{cell:>{wide}}" for at, (cell, wide) in enumerate(zip(row, widths, strict=True))]
             for row in [header, *rows]]  # fmt: skip
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same as a table of GitHub's Markdown."""
    marks = [":---" if at in left else "---:" for at in range(len(header))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, marks, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def html_grid(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same as an HTML table; the cells are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("left" if at in left else "right" for at in range(len(cells)))
        return "<tr>" + "".join(f'<{tag} style="text-align:{side}">{cell}</{tag}>' for side, cell in zip(sides, cells, strict=True)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _line(name: str, nbytes: str, share: str = "", bar: str = "", note: str = "") -> str:
    return f"{name:<17}{nbytes:>12}{share:>8}  {bar:<{BAR_CELLS}}  {note}".rstrip()


def _html_bar(share: float, number: int) -> str:
    colour = PALETTE[number % len(PALETTE)]
    return f'<div style="width:{max(round(160 * share, 1), 0):g}px;height:0.8em;background:{colour}"></div>'


def _intervals(footprint: Footprint) -> list[tuple[str, Interval]]:
    pairs = (("reserved", footprint.reserved), ("nvidia-smi", footprint.nvidia_smi))
    return [(name, interval) for name, interval in pairs if interval is not None]


def _range(interval: Interval) -> str:
    return f"{size_text(interval.low)} to {size_text(interval.high)}"
