"""Why a step runs out of memory, and the shortest way out.

    print(explain_oom("llama-2-7b", "A100-40GB", precision="bf16-mixed", batch_size=4))

The knobs are those of knobs.py. First each is turned by itself; where none is enough, two and then three together, the cheapest first;
where these are not enough, as many as help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import Any

from .footprint import Footprint, predict
from .knobs import KNOBS, TIME, Knob, try_predict, turn_all
from .limits import limit_of, reserved_fits
from .report import footprint_svg, parts_of, size_text, text_grid, title_of

MOST_KNOBS = 3
TRIES = 16  # predictions for each number of knobs at once: of the cheapest combinations, and of those that promise most


@dataclass(frozen=True)
class Fix:
    """Knobs that together make a request fit: the keywords they set, the total then, and what they cost."""

    knobs: tuple[str, ...]
    change: dict[str, Any]
    total_bytes: int
    reserved_fits: str
    cost: str

    def __str__(self) -> str:
        keywords = ", ".join(f"{name}={value!r}" for name, value in self.change.items())
        return f"{' + '.join(self.knobs)} ({keywords}): {size_text(self.total_bytes)}, reserved: {self.reserved_fits}; costs: {self.cost}"


@dataclass(frozen=True)
class OutOfMemory:
    """Why a step does not fit, or that it does.

    crossed_in: the first phase whose peak is above the limit, None where all fit. fixes: the fewest knobs that make it fit, the cheapest of
    those first; then, where these change what is learnt or round more, the fewest that cost nothing but time. closest: where no knobs are
    enough, those found that leave least.
    """

    footprint: Footprint
    limit: str
    limit_bytes: int
    crossed_in: str | None
    reserved_fits: str
    fixes: tuple[Fix, ...]
    closest: Fix | None

    @property
    def fits(self) -> bool:
        return self.crossed_in is None

    @property
    def head_room_bytes(self) -> int:
        """What is left below the limit; negative where it is crossed."""
        return self.limit_bytes - self.footprint.total

    def __str__(self) -> str:
        where, peak = f"{self.limit} ({size_text(self.limit_bytes)})", self.footprint.peak_phase
        head = f"{title_of(self.footprint)}: {size_text(self.footprint.total)} at the peak, in {peak!r}"
        if self.fits:
            return f"{head}\nfits {where}: {size_text(self.head_room_bytes)} to spare; reserved: {self.reserved_fits}{self._fragmentation()}"
        crossed = f"crosses {where} in phase {self.crossed_in!r}; {size_text(-self.head_room_bytes)} too much at the peak"
        phases = [[name, size_text(nbytes), "over" if nbytes > self.limit_bytes else ""] for name, nbytes in self.footprint.phases.items()]
        parts = sorted(parts_of(self.footprint).items(), key=lambda part: -part[1])
        sizes = [[name.replace("_", " "), size_text(nbytes), self.footprint.how[name]] for name, nbytes in parts if nbytes]
        grids = [text_grid(["phase", "peak", ""], phases, left=(0, 2)), text_grid(["part at the peak", "bytes", "how"], sizes, left=(0, 2))]
        return "\n".join([head, crossed, *grids, *self._ways_out()])

    def _repr_html_(self) -> str:
        return f"<div><pre>{escape(str(self))}</pre>\n{footprint_svg(self.footprint, self.limit_bytes)}</div>"

    def _ways_out(self) -> list[str]:
        if self.fixes:
            return [f"fits with {fix}" for fix in self.fixes]
        return ["no knobs make it fit" + (f"; the least is left by {self.closest}" if self.closest else "")]

    def _fragmentation(self) -> str:
        return "; expandable segments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) fragment less" if self.reserved_fits == "no" else ""


def explain_oom(source: object, gpu: str | int, **request: Any) -> OutOfMemory:
    """Why this step runs out of memory, and the shortest way out; or that it fits, and by how much.

    gpu: a name, or the limit in bytes that was measured (what CUDA's out-of-memory message calls total capacity, less the context).
    Of two and of three knobs together only the combinations are predicted whose savings, phase by phase, promise enough, the cheapest and
    the strongest of them: an answer comes soon, and it fits, but a cheaper one may have been passed over.
    """
    limit, limit_bytes = limit_of(gpu)
    footprint = predict(source, **request)
    crossed = next((name for name, nbytes in footprint.phases.items() if nbytes > limit_bytes), None)
    fixes, closest = ((), None) if crossed is None else _WayOut(source, request, footprint, limit_bytes).find()
    return OutOfMemory(footprint, limit, limit_bytes, crossed, reserved_fits(footprint, limit_bytes), fixes, closest)


Turned = tuple[Knob, dict[str, Any], Footprint]


class _WayOut:
    """The search for knobs that make a request fit."""

    def __init__(self, source: object, request: Mapping[str, Any], before: Footprint, limit_bytes: int) -> None:
        self.source, self.request, self.before, self.limit_bytes = source, request, before, limit_bytes
        self.closest: Fix | None = None
        self.enough: Fix | None = None  # the strongest knobs one after the other, up to the first that makes it fit
        self.tried: dict[tuple[str, ...], Fix | None] = {}

    def find(self) -> tuple[tuple[Fix, ...], Fix | None]:
        """The fixes, and without one the closest."""
        turned = [one for one in turn_all(self.source, self.request) if self.lowers(one)]
        shortest = self.fewest(turned)
        only_time = self.fewest([one for one in turned if one[0].price <= TIME])
        if shortest is None:
            return ((self.enough,), None) if self.enough is not None else ((), self.closest)
        return ((shortest,) if only_time is None or only_time == shortest else (shortest, only_time)), None

    def lowers(self, one: Turned) -> bool:
        return any(one[2].phases.get(name, 0) < nbytes for name, nbytes in self.before.phases.items())

    def fewest(self, turned: list[Turned]) -> Fix | None:
        """The cheapest of the smallest sets of knobs that are enough."""
        for size in range(1, MOST_KNOBS + 1):
            if size == 2 and self.hopeless(turned):
                return None
            together = [combination for combination in combinations(turned, size) if _compatible(combination)]
            promising = [combination for combination in together if self.promise(combination) <= self.limit_bytes]
            cheapest, surest = sorted(promising, key=self.price)[:TRIES], sorted(promising, key=self.expected)[:TRIES]
            for combination in (*cheapest, *surest):
                fix = self.attempt(combination)
                if fix is not None and fix.total_bytes <= self.limit_bytes:
                    return fix
        return None

    def hopeless(self, turned: list[Turned]) -> bool:
        """Whether all knobs together, the strongest first and each only where it helps, are not enough either."""
        together: tuple[Turned, ...] = ()
        lowest = self.before.total
        for one in sorted(turned, key=lambda one: one[2].total):
            fix = self.attempt((*together, one)) if _compatible((*together, one)) else None
            if fix is not None and fix.total_bytes < lowest:
                together, lowest = (*together, one), fix.total_bytes
                self.enough = self.enough or (fix if lowest <= self.limit_bytes else None)
        return lowest > self.limit_bytes

    def promise(self, combination: tuple[Turned, ...]) -> float:
        """The highest phase, were the savings of each knob in each phase to add up: seldom less is to be had."""
        return max(
            nbytes - sum(nbytes - footprint.phases.get(name, 0) for _, _, footprint in combination)
            for name, nbytes in self.before.phases.items()
        )  # fmt: skip

    def expected(self, combination: tuple[Turned, ...]) -> float:
        """The highest phase, were each knob to take the same share of what the others leave."""
        return max(
            nbytes * math.prod(footprint.phases.get(name, 0) / max(nbytes, 1) for _, _, footprint in combination)
            for name, nbytes in self.before.phases.items()
        )  # fmt: skip

    @staticmethod
    def price(combination: tuple[Turned, ...]) -> tuple[int, ...]:
        prices = [knob.price for knob, _, _ in combination]
        return max(prices), sum(prices), sum(KNOBS.index(knob) for knob, _, _ in combination)

    def attempt(self, combination: tuple[Turned, ...]) -> Fix | None:
        """The knobs of a combination turned together, predicted; None where `predict` refuses them together."""
        names = tuple(knob.name for knob, _, _ in combination)
        change = {name: value for _, keywords, _ in combination for name, value in keywords.items()}
        key = tuple(f"{name}={value!r}" for name, value in sorted(change.items()))
        if key not in self.tried:
            footprint = combination[0][2] if len(combination) == 1 else try_predict(self.source, {**self.request, **change})
            cost = "; ".join(dict.fromkeys(knob.cost for knob, _, _ in combination))
            self.tried[key] = None if footprint is None else Fix(names, change, footprint.total, reserved_fits(footprint, self.limit_bytes), cost)
        fix = self.tried[key]
        if fix is not None and (self.closest is None or fix.total_bytes < self.closest.total_bytes):
            self.closest = fix
        return fix


def _compatible(combination: tuple[Turned, ...]) -> bool:
    """Whether no two knobs set the same keyword."""
    keywords = [name for _, change, _ in combination for name in change]
    return len(keywords) == len(set(keywords))
