"""What becomes of one number in the formats that weights are stored in: its bits, the value they stand for, and how far off that is.

    formats = number_formats(math.pi)
    formats["fp32"].exact            '3.1415927410125732421875'
    print(formats.table())

A floating-point format is a sign, an exponent and a fraction: (-1)^s * 2^(e - bias) * 1.f, and below the smallest normal number
0.f * 2^(1 - bias), the subnormal numbers. All rounding is to the nearest value, halves to the even fraction, in exact arithmetic
(fractions, no float on the way). Sources: IEEE 754-2019 (fp32, fp16); NVIDIA A100 white paper (tf32); OCP 8-bit floating point
specification 1.0 (the two fp8); QLoRA, arXiv:2305.14314, appendix E (nf4).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from html import escape
from typing import overload

from .errors import MemoryMathError
from .svg import rectangles

Number = int | float | Fraction | Decimal
SIGN_COLOUR, EXPONENT_COLOUR, FRACTION_COLOUR = "#E69F00", "#56B4E9", "#B3E2CD"

# the 16 levels: quantiles of the normal distribution, scaled to [-1, 1], with an exact 0
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NumberFormat:
    """One format and what it makes of one number.

    sign_bits, exponent_bits, fraction_bits: nf4's 4 bits are an index into its levels, counted as fraction_bits.
    smallest_normal, smallest_subnormal: the smallest positive ones; largest: the largest finite one; epsilon: from 1 to the next value.
    None where a format has no such thing (integers have no exponent; nf4's levels are not evenly spaced).
    nearest: the stored value, None where there is none (NaN as an integer). exact: all its decimal digits. spacing: from it to the next
    larger magnitude, "one unit in the last place"; None for nf4, and where nearest is not finite.
    absolute_error, relative_error: |nearest - value|, and that over |value| (0 where both are 0, inf where nearest is infinite and
    value is not, nan where a NaN is among them). bits: as stored, highest first, the fields apart. note: the convention.
    """

    name: str
    sign_bits: int
    exponent_bits: int
    fraction_bits: int
    smallest_normal: float | None
    smallest_subnormal: float | None
    largest: float
    epsilon: float | None
    nearest: float | None
    exact: str
    spacing: float | None
    absolute_error: float
    relative_error: float
    bits: str
    note: str

    @property
    def stored_bits(self) -> int:
        """Bits that carry information. A tf32 number takes 32 in memory: it is how tensor cores read an fp32 one."""
        return self.sign_bits + self.exponent_bits + self.fraction_bits


class NumberFormats(Sequence[NumberFormat]):
    """The rows in order, also by name: formats[0], formats["bf16"], formats["float8_e4m3fn"]."""

    def __init__(self, value: Number, rows: Sequence[NumberFormat]) -> None:
        self.value = value
        self.rows = tuple(rows)

    @overload
    def __getitem__(self, key: int | str) -> NumberFormat: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[NumberFormat]: ...
    def __getitem__(self, key: int | str | slice) -> NumberFormat | Sequence[NumberFormat]:
        if not isinstance(key, str):
            return self.rows[key]
        by_name = {_plain(row.name): row for row in self.rows}
        if _plain(key) in by_name:
            return by_name[_plain(key)]
        near = get_close_matches(_plain(key), by_name, n=1)
        hint = f" (did you mean {by_name[near[0]].name!r}?)" if near else ""
        raise MemoryMathError(f"number format {key!r}: expected one of {', '.join(row.name for row in self.rows)}{hint}")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[NumberFormat]:
        return iter(self.rows)

    def table(self) -> str:
        """One line per format as fixed-width text, and the conventions below it."""
        cells = [_cells(row) for row in self.rows]
        widths = [max(len(line[column]) for line in (HEADINGS, *cells)) for column in range(len(HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (HEADINGS, *cells)]
        notes = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        return "\n".join([f"{self.value} in {len(self.rows)} formats", *lines, *notes])

    def __str__(self) -> str:
        return self.table()

    def svg(self) -> str:
        """The bits of each row as coloured cells: sign, exponent, fraction."""
        rows = [row for row in self.rows if row.bits]
        labels = [f"{row.name}  {row.nearest:.7g}" for row in rows]
        title = f"{_short(self.value)}: sign (orange), exponent (blue), fraction or level (green)"
        return rectangles([_coloured(row) for row in rows], labels, title=title)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows)
        notes = "".join(f"<p>{escape(row.name)}: {escape(row.note)}</p>" for row in self.rows if row.note)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}{self.svg()}"


HEADINGS = ("format", "bits", "s/e/f", "smallest", "subnormal", "largest", "epsilon", "nearest", "error", "relative", "stored as")


def _cells(row: NumberFormat) -> tuple[str, ...]:
    fields = f"{row.sign_bits}/{row.exponent_bits}/{row.fraction_bits}"
    sizes = [_short(size) for size in (row.smallest_normal, row.smallest_subnormal, row.largest, row.epsilon)]
    errors = [_short(row.absolute_error), _short(row.relative_error)]
    exact = row.exact if len(row.exact) <= 32 or row.nearest is None else f"{row.nearest:.12g}..."
    return (row.name, str(row.stored_bits), fields, *sizes, exact, *errors, row.bits)


def _coloured(row: NumberFormat) -> list[tuple[str, str]]:
    colours = [SIGN_COLOUR] * row.sign_bits + [EXPONENT_COLOUR] * row.exponent_bits + [FRACTION_COLOUR] * row.fraction_bits
    return list(zip(row.bits.replace(" ", ""), colours, strict=True))


def _short(number: Number | None) -> str:
    return "-" if number is None else f"{_as_closest_float(number):.5g}"


def _plain(name: str) -> str:
    """ "float8_e4m3fn", "FP8-E4M3" and "fp8 e4m3" are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("bfloat", "bf").replace("float", "fp").removesuffix("fn")


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: 1 sign bit, then exponent, then fraction.

    finite_only: the "fn" variant of OCP's e4m3: the top exponent holds numbers too, no infinities, and all ones is the one NaN. What
    is beyond the largest number becomes the largest.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    finite_only: bool = False
    note: str = ""

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def smallest_exponent(self) -> int:
        return 1 - self.bias

    @property
    def largest(self) -> Fraction:
        step = Fraction(2) ** -self.fraction_bits
        top, below = (self.bias + 1, 2 * step) if self.finite_only else (self.bias, step)
        return (2 - below) * Fraction(2) ** top

    def spacing(self, magnitude: Fraction) -> Fraction:
        """The step between neighbours around a magnitude: one unit in the last place."""
        exponent = _floor_log2(magnitude) if magnitude else self.smallest_exponent
        return Fraction(2) ** (max(exponent, self.smallest_exponent) - self.fraction_bits)

    def rounded(self, value: Fraction) -> Fraction | None:
        """The nearest value, halves to even; None, an infinity, where that is beyond the largest one (finite_only: the largest)."""
        step = self.spacing(abs(value))
        nearest = round(value / step) * step  # round() of a Fraction takes halves to even
        if abs(nearest) <= self.largest:
            return nearest
        return (self.largest if value > 0 else -self.largest) if self.finite_only else None

    def bits(self, negative: bool, magnitude: Fraction | None, nan: bool = False) -> str:
        """Sign, exponent and fraction, apart; magnitude None is an infinity or, where `nan`, a NaN."""
        if nan or magnitude is None:
            quiet = 2**self.fraction_bits - 1 if self.finite_only else 2 ** (self.fraction_bits - 1) if nan else 0
            exponent, fraction = 2**self.exponent_bits - 1, quiet
        else:
            step = self.spacing(magnitude)
            units, one = int(magnitude / step), 2**self.fraction_bits
            normal = units >= one
            exponent = (_floor_log2(magnitude) + self.bias) if normal else 0
            fraction = units - one if normal else units
        return f"{int(negative)} {exponent:0{self.exponent_bits}b} {fraction:0{self.fraction_bits}b}"


FLOAT_FORMATS = (
    FloatFormat("fp32", 8, 23),
    FloatFormat("tf32", 8, 10, note="what tensor cores read of an fp32 number: 19 of its 32 bits, here rounded to the nearest"),
    FloatFormat("fp16", 5, 10),
    FloatFormat("bf16", 8, 7),
    FloatFormat("fp8 e4m3", 4, 3, finite_only=True, note="no infinity: what is beyond 448 becomes 448, as in torch's cast (NaN in some versions)"),
    FloatFormat("fp8 e5m2", 5, 2),
)
INT_FORMATS = (("int8", 7), ("int4", 3))
LARGEST_POWER_OF_TEN, LARGEST_POWER_OF_TWO = 330, 1097  # somewhat more than a float64 holds
NF4_NOTE = "level x scale, the largest magnitude of its block of weights"


def number_formats(value: Number, *, scale: float | None = None) -> NumberFormats:
    """What fp32, tf32, fp16, bf16, fp8 e4m3, fp8 e5m2, int8, int4 and nf4 make of `value`.

    value: an int, a float (64 bits, NaN and infinities too), a Fraction or a Decimal; rounded once, from its exact value.
    Beyond the largest number by half a step or more, a float format gives an infinity; e4m3, which has none, its largest number (the
    specification's saturating mode). Integers are plain ones, scale 1 (quantised weights multiply by a scale of their own), clamped to
    -128..127 and -8..7; NaN has none.
    scale: nf4's, the largest magnitude in the block that the value is stored with. None takes the next power of two above |value|, as
    an example: one number has no block, and its own magnitude would make it exact. Only nf4 uses it.
    Raises MemoryMathError for what is not a number or far outside float64's range, and for a scale below |value|, which is no block's.

    >>> formats = number_formats(3.141592653589793)
    >>> formats["fp32"].exact, formats["bf16"].bits
    ('3.1415927410125732421875', '0 10000000 1001001')
    >>> formats["fp16"].nearest, formats["int8"].nearest
    (3.140625, 3.0)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction, Decimal)):
        raise MemoryMathError(f"value={value!r}: expected a number (int, float, Fraction or Decimal)")
    if isinstance(value, Decimal) and value.is_finite() and value and abs(value.adjusted()) > LARGEST_POWER_OF_TEN:
        raise MemoryMathError(f"value={value!r}: expected a magnitude from 1e-330 to 1e330, or 0")
    if isinstance(value, (int, Fraction)) and value and abs(_floor_log2(abs(Fraction(value)))) > LARGEST_POWER_OF_TWO:
        raise MemoryMathError("value: expected a magnitude from 1e-330 to 1e330, or 0 (an int or a Fraction can be beyond)")
    floats = [_float_row(layout, value) for layout in FLOAT_FORMATS]
    return NumberFormats(value, [*floats, *(_int_row(name, bits, value) for name, bits in INT_FORMATS), _nf4_row(value, scale)])


def _float_row(layout: FloatFormat, value: Number) -> NumberFormat:
    negative, nan, finite = _is_negative(value), _is_nan(value), _is_finite(value)
    rounded = layout.rounded(Fraction(value)) if finite else None
    if layout.finite_only and not finite and not nan:
        rounded = -layout.largest if negative else layout.largest
    nearest, magnitude = _as_float(rounded, negative, nan), None if rounded is None else abs(rounded)
    tiny = Fraction(2) ** (layout.smallest_exponent - layout.fraction_bits)
    return NumberFormat(
        layout.name, 1, layout.exponent_bits, layout.fraction_bits, float(Fraction(2) ** layout.smallest_exponent), float(tiny),
        float(layout.largest), 2.0**-layout.fraction_bits, nearest, _digits(rounded, nearest),
        None if magnitude is None else float(layout.spacing(magnitude)), *_errors(value, nearest, rounded),
        layout.bits(negative, magnitude, nan), layout.note,
    )  # fmt: skip


def _int_row(name: str, magnitude_bits: int, value: Number) -> NumberFormat:
    """Two's complement, scale 1."""
    low, high = -(2**magnitude_bits), 2**magnitude_bits - 1
    whole: Fraction | None = None
    if not _is_nan(value):
        whole = Fraction(min(max(round(Fraction(value)), low), high) if _is_finite(value) else low if _is_negative(value) else high)
    stored = "" if whole is None else f"{int(whole) % 2 ** (magnitude_bits + 1):0{magnitude_bits + 1}b}"
    nearest = None if whole is None else float(whole)
    return NumberFormat(
        name, 1, 0, magnitude_bits, None, None, float(high), None, nearest, _digits(whole, nearest), None if whole is None else 1.0,
        *_errors(value, nearest, whole), f"{stored[:1]} {stored[1:]}".strip(), f"a plain integer, scale 1, clamped to {low}..{high}",
    )  # fmt: skip


def _nf4_row(value: Number, scale: float | None) -> NumberFormat:
    if not _is_finite(value):
        return NumberFormat("nf4", 0, 0, 4, None, None, 1.0, None, None, "-", None, math.nan, math.nan, "", f"{NF4_NOTE}; finite values only")
    target, factor = Fraction(value), _block_scale(value, scale)
    index = min(range(16), key=lambda level: abs(Fraction(NF4_LEVELS[level]) * factor - target))
    nearest = Fraction(NF4_LEVELS[index]) * factor
    stored = _as_closest_float(nearest)
    note = f"{NF4_NOTE}: {_short(factor)} here{' (an example: the next power of two)' if scale is None else ''}"
    return NumberFormat(
        "nf4", 0, 0, 4, None, None, _as_closest_float(factor), None, stored, _digits(nearest, stored), None,
        *_errors(value, stored, nearest), f"{index:04b}", note,
    )  # fmt: skip


def _block_scale(value: Number, scale: float | None) -> Fraction:
    magnitude = abs(Fraction(value))
    if scale is None:
        return Fraction(2) ** (_floor_log2(magnitude) + 1) if magnitude else Fraction(1)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= sys.float_info.max or Fraction(scale) < magnitude:
        least = f"a number of at least |value| = {_short(magnitude)} that a float can hold"
        raise MemoryMathError(f"scale={scale!r}: expected the largest magnitude of the block, so {least}")
    return Fraction(scale)


def _floor_log2(magnitude: Fraction) -> int:
    """The exponent e with 2^e <= magnitude < 2^(e+1), exactly."""
    guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return guess if Fraction(2) ** guess <= magnitude else guess - 1


def _is_nan(value: Number) -> bool:
    return value.is_nan() if isinstance(value, Decimal) else isinstance(value, float) and math.isnan(value)


def _is_finite(value: Number) -> bool:
    return value.is_finite() if isinstance(value, Decimal) else not isinstance(value, float) or math.isfinite(value)


def _is_negative(value: Number) -> bool:
    """The sign bit: set for -0.0, too."""
    if isinstance(value, Decimal):
        return value.is_signed()
    return math.copysign(1.0, value) < 0 if isinstance(value, float) else value < 0


def _as_closest_float(number: Number) -> float:
    """An int or a Fraction can be too large for a float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _as_float(rounded: Fraction | None, negative: bool, nan: bool) -> float:
    magnitude = math.nan if nan else math.inf if rounded is None else float(abs(rounded))
    return math.copysign(magnitude, -1.0 if negative else 1.0)


def _errors(value: Number, nearest: float | None, exact: Fraction | None) -> tuple[float, float]:
    if nearest is None or math.isnan(nearest) or _is_nan(value):
        return math.nan, math.nan
    if exact is None or not _is_finite(value):
        same = not _is_finite(value) and exact is None  # an infinity kept
        return (0.0, 0.0) if same else (math.inf, math.inf)
    error = abs(exact - Fraction(value))
    return _as_closest_float(error), float(error / abs(Fraction(value))) if error else 0.0


def _digits(exact: Fraction | None, nearest: float | None) -> str:
    """Every decimal digit of a number whose denominator is a power of two (so that the digits end)."""
    if exact is None:
        return "-" if nearest is None else str(nearest)
    places = exact.denominator.bit_length() - 1
    whole, rest = divmod(abs(exact.numerator) * 10**places // exact.denominator, 10**places)
    sign = "-" if nearest is not None and math.copysign(1.0, nearest) < 0 else ""
    return f"{sign}{whole}.{rest:0{places}d}" if places else f"{sign}{whole}"
