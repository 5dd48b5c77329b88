"""What training gave, and what it took away: any metric on any data, before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...adapters import disabled
from ...errors import LoraLabError
from ...targets import adapter_names, lora_layers


@dataclass(frozen=True)
class BeforeAfter:
    """One metric of a model, without its adapters and with them.

    >>> print(BeforeAfter(40.0, 50.0))
    40 -> 50 (+10, +25.0 %)
    """

    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def relative(self) -> float:
        """The change as a share of before; not a number where that is 0."""
        return self.change / self.before if self.before else float("nan")

    def __str__(self) -> str:
        share = f", {self.relative:+.1%}".replace("%", " %") if self.before else ""
        return f"{self.before:.4g} -> {self.after:.4g} ({self.change:+.4g}{share})"


def forgetting(model: nn.Module, metric: Callable[[Any], float], before: float | None = None) -> BeforeAfter:
    """`metric(model)` with the active adapters off, then on: what was unlearned elsewhere shows on data that training has not seen.

        forgetting(model, lambda m: perplexity(m, other_rows, tokenizer))

    before: the number measured earlier, for weights that were trained themselves and cannot be switched off.
    Raises LoraLabError where nothing can be switched off and `before` is not given.
    """
    if before is None:
        check_switchable(model, "before=the number from before training")
        with disabled(model):
            before = metric(model)
    return BeforeAfter(float(before), float(metric(model)))


def check_switchable(model: nn.Module, way_out: str) -> None:
    """Raise LoraLabError where "before" would be the same as "after"."""
    if not any(layer.lora_active for layer in lora_layers(model).values()):
        there = f"the adapters {adapter_names(model)} are all off (use switches them on)" if adapter_names(model) else "it has no adapters"
        raise LoraLabError(f"before and after would be the same {type(model).__name__}: {there}; otherwise give {way_out}")
