"""Several requests beside each other: every precision with every optimizer, or one row per request.

    print(table("llama-2-7b", batch_size=4))
    print(compare_requests("llama-3-8b", ["full", "lora", "qlora"], precision="bf16-mixed", gpu="RTX-4090"))

What `predict` refuses stays in its place, and the reason stands below as a footnote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .errors import MemoryMathError
from .footprint import Footprint, predict
from .hardware import GPU
from .limits import limit_of, verdict
from .optimizers import OPTIMIZERS
from .precision import PRECISIONS
from .report import html_grid, markdown_grid, parts_of, text_grid, unit_for
from .svg import stacked_bars

NO_OPTIMIZER = "no optimizer"  # the one column of a request that does not train


class _Grid:
    """What a heading, a header, rows of cells and footnotes look like as text, as Markdown and in a notebook."""

    def _heading(self) -> str:
        raise NotImplementedError

    def _cells(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Header, rows, footnotes."""
        raise NotImplementedError

    def __str__(self) -> str:
        header, rows, notes = self._cells()
        return "\n".join([self._heading(), text_grid(header, rows), *notes])

    def markdown(self) -> str:
        """The table in GitHub's Markdown, heading and footnotes included."""
        header, rows, notes = self._cells()
        return "\n\n".join([f"**{self._heading()}**", markdown_grid(header, rows), *notes])

    def _repr_html_(self) -> str:
        header, rows, notes = self._cells()
        body = html_grid([escape(name) for name in header], [[escape(cell) for cell in row] for row in rows])
        return f"<div><p><b>{escape(self._heading())}</b></p>\n{body}\n" + "".join(f"<p>{escape(note)}</p>\n" for note in notes) + "</div>"


@dataclass(frozen=True)
class MemoryRow:
    """One precision. totals: optimizer -> bytes of the total, None where the request is refused; refusals: optimizer -> why."""

    precision: str
    totals: dict[str, int | None]
    refusals: dict[str, str]


@dataclass(frozen=True, repr=False)
class MemoryTable(_Grid):
    """Bytes of the total for each precision (a row) and optimizer (a column). request: the keywords that hold for all."""

    name: str
    request: dict[str, Any]
    optimizers: tuple[str, ...]
    rows: tuple[MemoryRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, bytes as whole numbers: {"totals": {precision: {optimizer: bytes or None}}, "refusals": ...}."""
        totals = {row.precision: dict(row.totals) for row in self.rows}
        refusals = {row.precision: dict(row.refusals) for row in self.rows if row.refusals}
        return {"name": self.name, "request": self.request, "totals": totals, "refusals": refusals}

    def __repr__(self) -> str:
        return str(self)

    def _unit(self) -> tuple[int, str]:
        return unit_for(max(total for row in self.rows for total in row.totals.values() if total is not None))

    def _heading(self) -> str:
        asked = "".join(f", {name}={value!r}" for name, value in self.request.items())
        return f"{self.name}{asked}: {self._unit()[1]} at the peak"

    def _cells(self) -> tuple[list[str], list[list[str]], list[str]]:
        notes, divisor = _Footnotes(), self._unit()[0]
        rows = [
            [row.precision, *(_amount(row.totals[name], divisor) or notes.mark(row.refusals[name]) for name in self.optimizers)]
            for row in self.rows
        ]
        return ["precision", *self.optimizers], rows, notes.lines()


def table(
    model: object, *, precisions: Sequence[str] = tuple(PRECISIONS), optimizers: Sequence[str] = tuple(OPTIMIZERS), **request: Any
) -> MemoryTable:
    """The total of every precision with every optimizer. request: any other keyword of `predict`, the same for all.

    A request that does not train (method="inference") has one column. Raises MemoryMathError where every combination is refused,
    with the first one's reason.

    >>> print(table("smollm2-135m", precisions=["fp32", "bf16-mixed"], optimizers=["sgd", "adamw"], method="inference").rows[1].precision)
    bf16-mixed
    """
    for name in ("precision", "optimizer"):
        if name in request:
            raise MemoryMathError(f"{name}={request[name]!r}: the table goes through them; give {name}s=[{request[name]!r}] to choose")
    if request.get("method") == "inference":
        optimizers = (NO_OPTIMIZER,)
    found = {(precision, optimizer): _try(model, request, precision, optimizer) for precision in precisions for optimizer in optimizers}
    if not found:
        raise MemoryMathError(f"precisions={precisions!r}, optimizers={optimizers!r}: expected at least one of each")
    names = [result.name for result in found.values() if isinstance(result, Footprint)]
    if not names:
        raise next(result for result in found.values() if isinstance(result, MemoryMathError))
    return MemoryTable(names[0], request, tuple(optimizers), tuple(_row(precision, optimizers, found) for precision in precisions))


def _try(model: object, request: Mapping[str, Any], precision: str, optimizer: str) -> Footprint | MemoryMathError:
    chosen = {} if optimizer == NO_OPTIMIZER else {"optimizer": optimizer}
    try:
        return predict(model, **{**request, **chosen, "precision": precision})
    except MemoryMathError as refusal:
        return refusal


def _row(precision: str, optimizers: Sequence[str], found: Mapping[tuple[str, str], Footprint | MemoryMathError]) -> MemoryRow:
    here = {optimizer: found[precision, optimizer] for optimizer in optimizers}
    totals = {optimizer: result.total if isinstance(result, Footprint) else None for optimizer, result in here.items()}
    return MemoryRow(precision, totals, {name: str(result) for name, result in here.items() if isinstance(result, MemoryMathError)})


@dataclass(frozen=True)
class ComparedRequest:
    """One row: its keywords, and either a footprint or the reason why there is none."""

    name: str
    request: dict[str, Any]
    footprint: Footprint | None
    refusal: str = ""


@dataclass(frozen=True, repr=False)
class RequestComparison(_Grid):
    """Requests beside each other, a row for each with its parts in bytes."""

    name: str
    rows: tuple[ComparedRequest, ...]
    gpu: str | int | GPU | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return str(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: every row's keywords, with its footprint (see `Footprint.as_dict`) or the reason why there is none."""
        rows = [{"name": row.name, "request": row.request, "footprint": row.footprint and row.footprint.as_dict(), "refusal": row.refusal}
                for row in self.rows]  # fmt: skip
        return {"name": self.name, "gpu": self.gpu.name if isinstance(self.gpu, GPU) else self.gpu, "shared": self.shared, "rows": rows}

    def svg(self) -> str:
        """One stacked bar per request that can be had, and the usable bytes of the GPU as a mark."""
        limit = {} if self.gpu is None else dict([limit_of(self.gpu)])
        divisor, unit = unit_for(max([*limit.values(), *(footprint.total for footprint in self._footprints())]))
        bars = {row.name: {part.replace("_", " "): nbytes / divisor for part, nbytes in parts_of(row.footprint).items()}
                for row in self.rows if row.footprint is not None}  # fmt: skip
        return stacked_bars(bars, title=self._heading(), unit=unit, marks={name: nbytes / divisor for name, nbytes in limit.items()})

    def _repr_html_(self) -> str:
        return super()._repr_html_() + self.svg()

    def _limit(self) -> str:
        return f"{self.gpu:,} B" if isinstance(self.gpu, int) else self.gpu.name if isinstance(self.gpu, GPU) else str(self.gpu)

    def _footprints(self) -> list[Footprint]:
        return [row.footprint for row in self.rows if row.footprint is not None]

    def _heading(self) -> str:
        shared = "".join(f", {name}={value!r}" for name, value in self.shared.items())
        return f"{self.name}{shared}: {unit_for(max(footprint.total for footprint in self._footprints()))[1]} at the peak"

    def _cells(self) -> tuple[list[str], list[list[str]], list[str]]:
        notes, reference = _Footnotes(), self._footprints()[0].total
        divisor = unit_for(max(footprint.total for footprint in self._footprints()))[0]
        parts = [part.replace("_", " ") for part in parts_of(self._footprints()[0])]
        header = ["", *parts, "total", "ratio", *([f"fits {self._limit()}"] if self.gpu else [])]
        rows = []
        for row in self.rows:
            if row.footprint is None:
                rows.append([row.name, *[""] * len(parts), notes.mark(row.refusal), *[""] * (len(header) - len(parts) - 2)])
                continue
            amounts = [f"{nbytes / divisor:.2f}" for nbytes in (*parts_of(row.footprint).values(), row.footprint.total)]
            fits = [] if self.gpu is None else [verdict(row.footprint, self.gpu)]
            rows.append([row.name, *amounts, f"{row.footprint.total / reference:.3f}", *fits])
        return header, rows, notes.lines()


def compare_requests(
    model: object, requests: Mapping[str, Mapping[str, Any]] | Sequence[str], *, gpu: str | int | GPU | None = None, **shared: Any
) -> RequestComparison:
    """One row per request. requests: name -> keywords of `predict`, or just methods such as ["full", "lora", "qlora"].

    shared: keywords that hold for every row unless the row has its own. gpu: also say which fit it. ratio: to the first that can be had.
    Raises MemoryMathError where every request is refused, with the first one's reason.
    """
    if isinstance(requests, str):
        raise MemoryMathError(f"requests={requests!r}: expected a list of methods, or a mapping of names to keywords")
    named = requests if isinstance(requests, Mapping) else {method: {"method": method} for method in requests}
    if not named:
        raise MemoryMathError("requests: there is none to compare; give methods such as ['full', 'lora'], or names with their keywords")
    if gpu is not None:
        name, _ = limit_of(gpu)
        gpu = name if isinstance(gpu, str) else gpu
    rows, refusals = [], []
    for name, own in named.items():
        try:
            rows.append(ComparedRequest(name, dict(own), predict(model, **{**shared, **own})))
        except MemoryMathError as refusal:
            refusals.append(refusal)
            rows.append(ComparedRequest(name, dict(own), None, str(refusal)))
    footprints = [row.footprint for row in rows if row.footprint is not None]
    if not footprints:
        raise refusals[0]
    return RequestComparison(footprints[0].name, tuple(rows), gpu, shared)


class _Footnotes:
    """Reasons, each once, in the order they come up."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def mark(self, reason: str) -> str:
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"[{self._reasons.index(reason) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {' '.join(reason.split())}" for number, reason in enumerate(self._reasons, 1)]


def _amount(nbytes: int | None, divisor: int) -> str:
    return "" if nbytes is None else f"{nbytes / divisor:.2f}"
