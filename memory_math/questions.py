"""What people ask of a calculator, answered by calling `predict` a few times.

    print(largest("llama-3-8b", "RTX-4090", "batch_size", method="lora", precision="bf16-mixed", sequence_length=1024))
    print(models_that_fit("T4", method="inference", precision="fp16"))
    print(explain_oom("llama-2-7b", "A100-40GB", precision="bf16-mixed", batch_size=4))

A request fits where its total, what tensors hold at the peak, is at most the limit: the usable bytes of a GPU by name, or bytes measured
by oneself. What torch reserves is more than that; every answer says beside it whether the reserved bytes fit as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .architectures import count_parameters
from .errors import MemoryMathError
from .footprint import Footprint, predict
from .knobs import Saving, Savings, predict_defaults, savings, try_predict
from .limits import limit_of, reserved_fits
from .out_of_memory import Fix, OutOfMemory, explain_oom
from .presets import PRESETS
from .report import size_text, text_grid
from .request import whole

__all__ = ["Answer", "Fix", "ModelFit", "ModelFits", "OutOfMemory", "Saving", "Savings", "explain_oom", "largest", "models_that_fit", "savings"]

GROWING = ("batch_size", "sequence_length", "rank", "num_virtual_tokens")
END_OF_SEARCH = 2**24


@dataclass(frozen=True)
class Answer:
    """The largest `value` of `what` that fits (0 where not even 1 does), its total, and the next value with the total that is too much.

    next_bytes is None where `predict` refuses the next value; then `reason` says why. reserved_fits: see `limits.reserved_fits`.
    reserved_value: up to where the estimate of what torch reserves fits as well; it grows unevenly, and a larger value may fit again.
    """

    what: str
    value: int
    total_bytes: int | None
    next_value: int
    next_bytes: int | None
    limit: str
    limit_bytes: int
    reserved_fits: str
    reserved_value: int
    reason: str

    def __str__(self) -> str:
        where = f"{self.limit} ({size_text(self.limit_bytes)})"
        above = f"{self.next_value:,} needs {size_text(self.next_bytes)}" if self.next_bytes is not None else f"{self.next_value:,}: {self.reason}"
        if self.total_bytes is None:
            return f"{self.what}: none fits {where}; {above}"
        safe = f"up to {self.reserved_value:,}" if self.reserved_value else "none"
        safely = "" if self.reserved_value == self.value else f"; {safe} with what torch is expected to reserve"
        return f"{self.what}: {self.value:,} fits {where} with {size_text(self.total_bytes)}{safely}; {above}"


def largest(source: object, gpu: str | int, what: str = "batch_size", **request: Any) -> Answer:
    """The largest `what` ("batch_size", "sequence_length", "rank", "num_virtual_tokens") with which the request fits.

    gpu: a name, or a limit in bytes. Doubles until it is too much, then closes in; the total must not fall as the value grows.
    Raises MemoryMathError where `what` is none of these or changes nothing here, and where the request is refused whatever the value.

    >>> found = largest("smollm2-135m", "T4", "batch_size", sequence_length=512)
    >>> [predict("smollm2-135m", batch_size=batch, sequence_length=512).fits("T4") for batch in (found.value, found.next_value)]
    [True, False]
    """
    limit, limit_bytes = limit_of(gpu)
    if what not in GROWING:
        near = get_close_matches(str(what), GROWING, n=1)
        raise MemoryMathError(f"what={what!r}: expected one of {', '.join(GROWING)}{f' (did you mean {near[0]!r}?)' if near else ''}")
    if what in request:
        raise MemoryMathError(f"{what}={request[what]!r}: this is what is asked for; leave it out")
    first = predict(source, **{**request, what: 1})
    if first.total > limit_bytes:
        reason = f"{size_text(first.total)} with {what}=1 are more than {size_text(limit_bytes)}"
        return Answer(what, 0, None, 1, first.total, limit, limit_bytes, "no", 0, reason)
    search = _Search(lambda value: try_predict(source, {**request, what: value}), limit_bytes, first)
    value = search.largest(lambda footprint: footprint.total)
    best, above = search.seen[value] or first, search.seen.get(value + 1)
    if value >= END_OF_SEARCH and best.total == first.total:
        raise MemoryMathError(f"what={what!r} changes nothing here: {size_text(first.total)} with {what}=1 and with {what}={value:,}")
    reserved = search.largest(lambda footprint: max(footprint.total, footprint.reserved.estimate if footprint.reserved else 0))
    reason = f"{size_text(above.total)} are more than {size_text(limit_bytes)}" if above else _why_not(source, {**request, what: value + 1})
    next_bytes, likely = above.total if above else None, reserved_fits(best, limit_bytes)
    return Answer(what, value, best.total, value + 1, next_bytes, limit, limit_bytes, likely, reserved, reason)


class _Search:
    """The largest value with which a measure of the footprint is within the limit. `seen`: footprint by value, None where it is refused."""

    def __init__(self, ask: Callable[[int], Footprint | None], limit_bytes: int, first: Footprint) -> None:
        self.ask, self.limit_bytes = ask, limit_bytes
        self.seen: dict[int, Footprint | None] = {1: first}

    def measured(self, value: int, measure: Callable[[Footprint], int]) -> int | None:
        if value not in self.seen:
            self.seen[value] = self.ask(value)
        footprint = self.seen[value]
        return None if footprint is None else measure(footprint)

    def fits(self, value: int, measure: Callable[[Footprint], int]) -> bool:
        nbytes = self.measured(value, measure)
        return nbytes is not None and nbytes <= self.limit_bytes

    def largest(self, measure: Callable[[Footprint], int]) -> int:
        """0 where not even 1 fits; at most END_OF_SEARCH."""
        if not self.fits(1, measure):
            return 0
        low, high = 1, 2
        while self.fits(high, measure):
            if high >= END_OF_SEARCH:
                return high
            low, high = high, 2 * high
        step = 0
        while high - low > 1:
            step += 1
            guess = self.between(low, high, measure) if step % 3 else (low + high) // 2
            low, high = (guess, high) if self.fits(guess, measure) else (low, guess)
        return low

    def between(self, low: int, high: int, measure: Callable[[Footprint], int]) -> int:
        """Where the straight line through both ends meets the limit: totals are nearly straight, so this is often the answer at once."""
        below, above = self.measured(low, measure), self.measured(high, measure)
        if below is None or above is None or above == below:
            return (low + high) // 2
        guess = low + (high - low) * (self.limit_bytes - below) // (above - below)
        return min(max(guess, low + 1), high - 1)


def _why_not(source: object, request: Mapping[str, Any]) -> str:
    try:
        predict(source, **request)
    except MemoryMathError as refusal:
        return str(refusal)
    return "the search ends here"


@dataclass(frozen=True)
class ModelFit:
    """A preset that fits. also: presets of the same shape. reserved_fits: see `limits.reserved_fits`."""

    name: str
    also: tuple[str, ...]
    parameters: int
    total_bytes: int
    reserved_fits: str


class ModelFits(list[ModelFit]):
    """The presets that fit, largest first. refused: preset -> why `predict` has no answer for it here."""

    def __init__(self, fits: list[ModelFit], limit: str, limit_bytes: int, refused: dict[str, str]) -> None:
        super().__init__(fits)
        self.limit, self.limit_bytes, self.refused = limit, limit_bytes, refused

    def __str__(self) -> str:
        heading = f"fit {self.limit} ({size_text(self.limit_bytes)}): {len(self)} shapes of presets"
        rows = [[fit.name, f"{fit.parameters:,}", size_text(fit.total_bytes), fit.reserved_fits, ", ".join(fit.also)] for fit in self]
        notes = [f"not modelled with this request: {len(self.refused)} presets (see .refused)"] if self.refused else []
        return "\n".join([heading, text_grid(["model", "parameters", "total", "reserved", "same shape"], rows, left=(0, 4)), *notes])


def models_that_fit(gpu: str | int, **request: Any) -> ModelFits:
    """Every preset that fits with this request, the one with most parameters first.

    gpu: a name, or a limit in bytes. Models whose weights alone are too much are not predicted. Raises MemoryMathError where `predict`
    refuses the request for every preset.
    """
    limit, limit_bytes = limit_of(gpu)
    asked = {**predict_defaults(), **request}
    smallest = 0.5 if asked["method"] == "qlora" or asked["quantization"] != "none" else 2  # bytes per parameter
    devices = whole("world_size", asked["world_size"]) * whole("tensor_parallel", asked["tensor_parallel"])
    found: dict[tuple[int, int], list[tuple[str, Footprint]]] = {}
    refused: dict[str, str] = {}
    for name in PRESETS:
        try:
            if count_parameters(name).total * smallest / devices > limit_bytes:
                continue
            footprint = predict(name, **request)
        except MemoryMathError as refusal:
            refused[name] = str(refusal)
            continue
        found.setdefault((footprint.parameters, footprint.total), []).append((name, footprint))
    if refused and not found:
        raise MemoryMathError(f"no preset can be predicted with this request; {next(iter(refused))}: {next(iter(refused.values()))}")
    fits = [
        ModelFit(alike[0][0], tuple(name for name, _ in alike[1:]), parameters, total, reserved_fits(alike[0][1], limit_bytes))
        for (parameters, total), alike in found.items()
        if total <= limit_bytes
    ]
    return ModelFits(sorted(fits, key=lambda fit: (-fit.parameters, fit.name)), limit, limit_bytes, refused)
