"""One row of the ledger, the rule that judges it, and the ledger itself.

The verdict of a row is derived from what is stated and what is computed, in this order:

    not measured here   nothing is computed: a fact about data, a measurement, a capability; the row says what shows it
    assumption          nothing is stated (or the figure is lost): what is computed holds under what the row names
    exact               equal (words: the same words; numbers: equal, floats up to 1e-12)
    rounded             equal after rounding to the digits stated (a half goes either way)
    assumption          the digits are those stated, but cut off and not rounded; or the number computed under the assumption that the
                        row names is equal after rounding
    wrong               none of these; the row gives the error and the right value

The digits stated: the decimals as written ("4.50" has two); of a whole number those up to the last that is not 0, so "420" is 415 to
425, and "20,480" is exact to tens. Where the inputs of a computation are printed with few digits, `spread` holds the results at the
ends of what they can have been, and a stated number in between counts as rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from html import escape
from textwrap import wrap
from typing import NamedTuple, overload

from ..errors import MemoryMathError
from ..report import html_grid, markdown_grid

EXACT, ROUNDED, ASSUMPTION, WRONG, NOT_MEASURED = VERDICTS = ("exact", "rounded", "assumption", "wrong", "not measured here")
HEADINGS = ("source", "claim", "stated", "computed", "unit", "verdict", "why")
WIDTH, INDENT = 140, 36
TINY = Fraction(1, 10**9)  # what is a half or a whole unit on paper comes out of floats a little off


class Written(float):
    """A number as it is written: a float to compute with, and its digits.

    >>> four = Written("4.50")
    >>> four, four - 4, four.decimal.as_tuple().exponent
    (4.50, 0.5, -2)
    """

    decimal: Decimal

    def __new__(cls, digits: str) -> Written:
        """digits: with or without commas."""
        decimal = Decimal(digits.replace(",", ""))
        number = super().__new__(cls, decimal)
        number.decimal = decimal
        return number

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (str(self.decimal),)

    def __repr__(self) -> str:
        return str(self.decimal)


Stated = Written | str | None
Computed = int | float | str | None
Numeric = int | float | Decimal


class Claim(NamedTuple):
    """One number or one capability: where it is stated, what is stated, what is computed, and the verdict with its reason.

    source: the row's id ("B9.2": the second number of row B9), then the lecture or the paper. stated: a number with the digits as
    written, words, or None where nothing is stated. computed: by this package; None where it cannot be.
    """

    source: str
    claim: str
    stated: Stated
    computed: Computed
    unit: str
    verdict: str
    why: str

    @property
    def id(self) -> str:
        return self.source.split()[0]

    @property
    def group(self) -> str:
        """What the numbers of one claim share: "B9" of "B9.2"."""
        return self.id.rpartition(".")[0]


def judge(written: Stated, computed: Computed, *, assuming: Computed = None, spread: Sequence[Numeric] = ()) -> str:
    """The verdict, by the rule above. assuming: the same number or words under the assumption that the row names.

    >>> judge(Written("5261"), 5260.94), judge(Written("4"), 4), judge(Written("18.8"), 18.87), judge(Written("64"), 65.5)
    ('rounded', 'exact', 'assumption', 'wrong')
    """
    if computed is None:
        return NOT_MEASURED
    if written is None:
        return ASSUMPTION
    if isinstance(written, str) or isinstance(computed, str):
        return EXACT if written == computed else ASSUMPTION if written == assuming else WRONG
    stated, found = written.decimal, computed.decimal if isinstance(computed, Written) else computed
    if _equal(stated, found):
        return EXACT
    if _rounds(stated, [found, *spread]):
        return ROUNDED
    named = assuming is not None and not isinstance(assuming, str) and _rounds(stated, [assuming])
    return ASSUMPTION if named or _cut_off(stated, found) else WRONG


def _equal(stated: Decimal, computed: Numeric) -> bool:
    gap = abs(Fraction(stated) - Fraction(computed))
    return gap <= abs(Fraction(stated)) / 10**12 if isinstance(computed, float) else gap == 0


def _rounds(stated: Decimal, values: Sequence[Numeric]) -> bool:
    """Whether some number between the smallest and the largest value is within half a unit of the last digit stated."""
    half = _last_digit(stated) / 2 * (1 + TINY)
    return Fraction(min(values)) - half <= Fraction(stated) <= Fraction(max(values)) + half


def _cut_off(stated: Decimal, computed: Numeric) -> bool:
    unit, size = _last_digit(stated), abs(Fraction(computed)) * (1 + TINY)
    return math.floor(size / unit) * unit == abs(Fraction(stated)) and (computed < 0) == (stated < 0)


def _last_digit(stated: Decimal) -> Fraction:
    """What the last digit stated counts: 10 of "420", 0.01 of "4.50", 1e21 of "5.76e23"."""
    exponent = stated.as_tuple().exponent
    if exponent == 0:
        exponent = stated.normalize().as_tuple().exponent
    assert isinstance(exponent, int), stated
    return Fraction(10) ** exponent


@dataclass
class Rows:
    """The rows of one claim, numbered as they are added.

    group: "A15"; reference: the lecture, or the paper with its place, unless a row has its own as `where`.
    """

    group: str
    reference: str
    rows: list[Claim] = field(default_factory=list)

    def number(
        self, claim: str, stated: str, computed: int | float, unit: str, why: str, *,
        assuming: int | float | None = None, spread: Sequence[Numeric] = (), where: str = "",
    ) -> None:  # fmt: skip
        """stated: the digits as written, with or without commas. The reason is added where digits are cut off."""
        value = Written(stated)
        verdict = judge(value, computed, assuming=assuming, spread=spread)
        if verdict == ASSUMPTION and assuming is None:
            why = f"{why} The digits stated are cut off, not rounded."
        self._add(claim, value, computed, unit, verdict, why, where)

    def words(self, claim: str, stated: str, computed: str, why: str, *, assuming: str | None = None) -> None:
        self._add(claim, stated, computed, "", judge(stated, computed, assuming=assuming), why)

    def unstated(self, claim: str, computed: int | float, unit: str, why: str) -> None:
        """Our number where the source has none; `why` names what it assumes."""
        self._add(claim, None, computed, unit, judge(None, computed), why)

    def not_measured(self, claim: str, why: str, *, stated: str | None = None, unit: str = "") -> None:
        """What arithmetic cannot decide; `why` names what shows it."""
        self._add(claim, None if stated is None else Written(stated), None, unit, judge(None, None), why)

    def _add(self, claim: str, stated: Stated, computed: Computed, unit: str, verdict: str, why: str, where: str = "") -> None:
        source = f"{self.group}.{len(self.rows) + 1} {where or self.reference}"
        self.rows.append(Claim(source, claim, stated, computed, unit, verdict, why))


class Claims(Sequence[Claim]):
    """The rows in order, also by id: ledger[0], ledger["B9.2"]."""

    def __init__(self, rows: Iterable[Claim]) -> None:
        self.rows = tuple(rows)

    @overload
    def __getitem__(self, key: int | str) -> Claim: ...
    @overload
    def __getitem__(self, key: slice) -> Claims: ...
    def __getitem__(self, key: int | str | slice) -> Claim | Claims:
        if isinstance(key, slice):
            return Claims(self.rows[key])
        if not isinstance(key, str):
            return self.rows[key]
        by_id = {row.id: row for row in self.rows}
        if key not in by_id:
            near = get_close_matches(key, by_id, n=3)
            raise MemoryMathError(f"claim {key!r}: there is no such row{f' (did you mean {near[0]!r}?)' if near else ''}; ids are like 'A15.2'")
        return by_id[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.rows)

    def where(self, *, source: str | None = None, verdict: str | None = None) -> Claims:
        """The rows of one source, of one verdict, or both.

        source: a row ("B9.2"), a claim ("B9"), or else words of the lecture or paper ("Lecture 10.5", "arXiv:2305.14314").
        Raises MemoryMathError for a verdict that there is not, and for a source that no row has.
        """
        if verdict is not None and verdict not in VERDICTS:
            near = get_close_matches(verdict, VERDICTS, n=1)
            raise MemoryMathError(f"verdict={verdict!r}: expected one of {', '.join(VERDICTS)}{f' (did you mean {near[0]!r}?)' if near else ''}")
        of_source = self.rows if source is None else self._of(source)
        if source is not None and not of_source:
            groups = list(dict.fromkeys(row.group for row in self.rows))
            raise MemoryMathError(f"source={source!r}: no row is of it; claims here: {', '.join(groups)}")
        return Claims(row for row in of_source if verdict in (None, row.verdict))

    def _of(self, source: str) -> tuple[Claim, ...]:
        named = tuple(row for row in self.rows if source in (row.id, row.group))
        return named or tuple(row for row in self.rows if source.lower() in row.source.partition(" ")[2].lower())

    def counts(self) -> dict[str, int]:
        """Verdict -> rows."""
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}

    def table(self) -> str:
        """The rows as text: verdict, id, claim, what is stated and computed; the reason below, where the numbers alone do not tell."""
        lines = [_summary(self)]
        for row in self.rows:
            stated, computed = shown(row.stated), shown(row.computed)
            unit = f" {row.unit}" if row.unit else ""
            numbers = f"stated {stated}{unit}, computed {computed}{unit}" if row.computed is not None else f"stated {stated}{unit}"
            lines += _wrapped(f"{row.verdict:<18}{row.id:<17} {row.claim}: {numbers}", first="")
            if row.verdict not in (EXACT, ROUNDED):
                lines += _wrapped(row.why, first=" " * INDENT)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def markdown(self) -> str:
        """The seven columns as a table of GitHub's Markdown, the count of each verdict above it."""
        return f"**{_summary(self)}**\n\n{markdown_grid(HEADINGS, self._cells(), left=(0, 1, 4, 5, 6))}"

    def _repr_html_(self) -> str:
        cells = [[escape(cell) for cell in row] for row in self._cells()]
        return f"<div><p><b>{escape(_summary(self))}</b></p>\n{html_grid(HEADINGS, cells, left=(0, 1, 4, 5, 6))}</div>"

    def _cells(self) -> list[list[str]]:
        return [[row.source, row.claim, shown(row.stated), shown(row.computed), row.unit, row.verdict, row.why] for row in self.rows]


def _wrapped(text: str, first: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def _summary(rows: Claims) -> str:
    return f"{len(rows)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in rows.counts().items() if count)


def shown(value: Stated | Computed) -> str:
    """Written digits as they are, whole numbers in full, floats in six digits.

    >>> shown(Written("4.50")), shown(68976648192), shown(5260.942760942761), shown(3.143e23), shown(0.0000231)
    ('4.50', '68,976,648,192', '5,260.94', '3.143e+23', '2.31e-05')
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, Written):
        return f"{value.decimal:,}"
    if isinstance(value, float) and value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.5g}"
    if isinstance(value, float):
        digits = 5 - math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(digits, 0)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:,}"
