"""Numbers as people read them, and the table of a footprint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .footprint import Footprint, Interval

SI = ("B", "kB", "MB", "GB", "TB", "PB")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


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


def footprint_table(footprint: Footprint) -> str:
    """The parts by size with their share and origin, the phases, the totals, what it was checked against."""
    from .footprint import PUBLIC_PARTS

    asked, total = footprint.request, footprint.total
    what = f"{asked['method']}, {asked['precision']}, {asked['batch_size']} x {asked['sequence_length']} tokens"
    lines = [f"{footprint.name}: {what}, {asked['implementation']} on {asked['device']}", f"{'part':<17}{'bytes':>12}{'share':>8}  how"]
    for part in PUBLIC_PARTS:
        nbytes = getattr(footprint, part)
        lines.append(f"{part.replace('_', ' '):<17}{size_text(nbytes):>12}{nbytes / max(total, 1):>8.1%}  {footprint.how[part]}")
    lines.append(f"{'total allocated':<17}{size_text(total):>12}{'':>8}  peak in phase {footprint.peak_phase!r}")
    lines += [f"{name:<17}{size_text(interval.estimate):>12}{'':>8}  {_range(interval)}" for name, interval in _intervals(footprint)]
    lines.append("phases: " + ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in footprint.phases.items()))
    return "\n".join([*lines, f"checked: {footprint.validated}"])


def _intervals(footprint: Footprint) -> list[tuple[str, Interval]]:
    pairs = (("reserved", footprint.reserved), ("nvidia-smi", footprint.nvidia_smi))
    return [(name, interval) for name, interval in pairs if interval is not None]


def _range(interval: Interval) -> str:
    return f"{size_text(interval.low)} to {size_text(interval.high)}"


def comparison_table(rows: list[tuple[str, int, int]]) -> str:
    """Rows of (name, predicted bytes, measured bytes) with their ratio."""
    lines = [f"{'':<20}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
    for name, predicted, measured in rows:
        ratio = f"{predicted / measured:.3f}" if measured else "-"
        lines.append(f"{name:<20}{size_text(predicted):>12}{size_text(measured):>12}{ratio:>8}")
    return "\n".join(lines)
