"""What `inject` was asked for, and what comes of it: layers with their ranks and scalings, and the formula of their count."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .fused.parts import Layout
from .patterns import at_the_end
from .token_rows.targets import PlannedRows


@dataclass(frozen=True)
class AdapterConfig:
    """What `inject` was asked for. alpha=None means alpha = rank, so that the scaling is 1."""

    rank: int = 8
    alpha: float | None = None
    target_modules: Any = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers: Sequence[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    variant: str = "lora"
    freeze_A: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    fused: Any = None
    trainable_token_indices: Any = None
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False  # of a PEFT file; tied modules are always trained as one here

    def rank_of(self, path: str) -> int:
        return int(first_match(self.rank_pattern, path, self.rank))

    def alpha_of(self, path: str) -> float:
        default = self.alpha if self.alpha is not None else self.rank_of(path)
        return first_match(self.alpha_pattern, path, default)

    def scaling_of(self, path: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def alpha_for(self, scaling: float, rank: int, alpha: float) -> float:
        """The alpha that gives this scaling with another rank; `alpha` itself where it does."""
        root = math.sqrt(rank) if self.rslora else rank
        return alpha if alpha / root == scaling else scaling * root


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that is to be adapted; parameters = rank * (fan_in + fan_out) + more, where more is a magnitude or a bias.

    parts: of a fused layer of which parts are adapted; each has a pair of its own, with fan_in inputs and the part's outputs.
    stack: of a parameter that is adapted itself, the number of matrices in it, each with a pair of its own; 0 for a layer.
    """

    path: str
    fan_in: int
    fan_out: int
    rank: int
    alpha: float
    scaling: float
    more: int = 0
    parts: Layout | None = None
    stack: int = 0

    @property
    def name(self) -> str:
        """"c_attn", of parts "c_attn.q+v"."""
        return self.path.rpartition(".")[2] + (f".{'+'.join(self.parts.names)}" if self.parts else "")

    @property
    def pairs(self) -> int:
        return len(self.parts.names) if self.parts else 1

    @property
    def parameters(self) -> int:
        out = sum(self.parts.sizes) if self.parts else self.fan_out
        return max(self.stack, 1) * self.rank * (self.pairs * self.fan_in + out) + self.more

    @property
    def formula(self) -> str:
        fan_in = f"{self.pairs} * {self.fan_in}" if self.pairs > 1 else f"{self.fan_in}"
        product = f"rank {self.rank} * ({fan_in} in + {sum(self.parts.sizes) if self.parts else self.fan_out} out)"
        product = f"{self.stack} * {product}" if self.stack > 1 else product
        return f"({product} {'-' if self.more < 0 else '+'} {abs(self.more)})" if self.more else product


@dataclass(frozen=True)
class Plan:
    """The layers a request names. `print(plan)` shows them grouped by name, with the formula of their count."""

    config: AdapterConfig
    layers: tuple[PlannedLayer, ...]
    along: tuple[str, ...] = ()  # parameters of the model itself that train along
    along_numel: int = 0
    tokens: tuple[PlannedRows, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers) + sum(rows.parameters for rows in self.tokens)

    def __str__(self) -> str:
        parts: list[PlannedLayer | PlannedRows] = [*self.layers, *self.tokens]
        groups = Counter((part.name, part.formula, part.parameters) for part in parts)
        width = max(len(name) for name, *_ in groups)
        lines = [f"{name:<{width}}  {count:>4} x {formula} = {count * each:>12,}" for (name, formula, each), count in groups.items()]
        along = [f"and {len(self.along)} of the model's own tensors train along, {self.along_numel:,} parameters"] if self.along else []
        frozen = ", of which A stays frozen" if self.config.freeze_A else ""
        return "\n".join([*lines, f"{'total':<{width}}  {len(parts):>4} layers, {self.parameters:,} parameters{frozen}", *along])


def first_match(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of the path, in dict order."""
    for key, value in patterns.items():
        if at_the_end(key).match(path):
            return value
    return default
