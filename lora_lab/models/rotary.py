"""Rotary frequencies and the ways to stretch them to longer contexts, from a config's rope settings.

Nothing here is a buffer: frequencies are computed in float32 on each call (a few dozen numbers), so that casting the model to
16 bit cannot round them, a known bug of models that keep them as buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import LARGEST, is_number
from ..errors import LoraLabError, did_you_mean

NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
           "mscale", "mscale_all_dim")  # fmt: skip
MAY_BE_0 = ("mscale", "mscale_all_dim")  # not given, then
FACTORS = ("short_factor", "long_factor")  # one for each frequency


@dataclass(frozen=True)
class Rope:
    """theta: the base; dim: of a head, what turns; max_positions: the context the model was trained for; kind and its numbers."""

    theta: float
    dim: int
    max_positions: int
    kind: str = "default"
    numbers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: dict[str, Any], dim: int, partial: bool = False) -> Rope:
        """Read transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) alike.

        dim: of a head.  partial: whether the family has heads of which only a part turns (`partial_rotary_factor`).
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise LoraLabError(f"rope_scaling={given!r}: expected an object with rope_type and its numbers, or null")
        numbers = dict(given)
        share = next((value for at in (numbers, config) if (value := at.get("partial_rotary_factor")) is not None), 1.0)
        numbers.pop("partial_rotary_factor", None)
        theta = numbers.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
        kind = numbers.pop("rope_type", None) or numbers.pop("type", None) or "default"
        positions = config.get("max_position_embeddings", 2048)
        if kind in ("yarn", "longrope", "llama3"):
            outside = config.get("original_max_position_embeddings")  # has the last word, as in transformers
            numbers["original_max_position_embeddings"] = outside or numbers.get("original_max_position_embeddings") or positions
        if not partial and share != 1.0:
            raise LoraLabError(f"partial_rotary_factor={share!r}: rotating a part of each head is not read here, no Llama does")
        if not is_number(share) or not 0 < share <= 1:
            raise LoraLabError(f"partial_rotary_factor={share!r}: expected a number above 0, 1 at most (0.25 in GPT-NeoX)")
        if not is_number(theta) or theta <= 0:
            raise LoraLabError(f"rope_theta={theta!r}: expected a positive number (10000 in the first Llamas)")
        if not isinstance(kind, str) or kind not in KINDS:
            raise LoraLabError(f"rope_type={kind!r}: expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
        if kind == "dynamic" and positions is None:
            raise LoraLabError("max_position_embeddings=null in config.json: rope_type='dynamic' compares positions with it")
        rope = cls(float(theta), int(dim * share), positions, kind, numbers)
        rope._check(dim)
        return rope

    def _check(self, head: int) -> None:
        """head: the numbers of one, of which an odd part turns with one more."""
        if not 0 < self.dim + self.dim % 2 <= head:
            raise LoraLabError(f"rotary positions turn pairs of numbers, and {self.dim} of each head's {head} are to turn: expected pairs "
                               "that a head has (head_dim, hidden_size / num_attention_heads, partial_rotary_factor)")  # fmt: skip
        for name, value in self.numbers.items():
            each = value if name in FACTORS and isinstance(value, list) and len(value) == self.dim // 2 else [value]
            fine = all(is_number(one) and 0 <= one <= LARGEST and (one > 0 or name in MAY_BE_0) for one in each)
            if name in (*NUMBERS, *FACTORS) and value is not None and not fine:
                raise LoraLabError(f"{name}={value!r:.80} of rope_type={self.kind!r}: expected "
                                   + (f"{self.dim // 2} positive numbers" if name in FACTORS else "a positive number"))  # fmt: skip
        trained = self.numbers.get("original_max_position_embeddings", 2)
        if (self.kind == "yarn" and self.theta <= 1) or (self.kind == "dynamic" and self.dim == 2) or (self.kind == "longrope" and trained <= 1):
            raise LoraLabError(f"rope_type={self.kind!r} with rope_theta={self.theta}, heads that turn {self.dim} numbers and {self.numbers}: "
                               "expected a base above 1, more than 2 numbers, and more than one position")  # fmt: skip

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [B or 1, T] -> cos and sin, float32 [B or 1, T, 1, dim / 2]."""
        frequencies, scale = KINDS[self.kind](self, positions)
        angles = positions[:, :, None, None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale

    def powers(self, device: Any, theta: float | Tensor | None = None) -> Tensor:
        """theta ** (2 i / dim) for i = 0 .. dim/2 - 1: [dim / 2], in float32 whatever the default dtype."""
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        powers: Tensor = (self.theta if theta is None else theta) ** exponents
        return powers

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json, as transformers 4 writes them and both 4 and 5 read them."""
        return {"rope_theta": self.theta, "rope_scaling": None if self.kind == "default" else {"rope_type": self.kind, **self.numbers}}

    def number(self, name: str) -> Any:
        if self.numbers.get(name) is None:
            raise LoraLabError(f"rope_type={self.kind!r} needs {name!r} in rope_scaling or rope_parameters; it has {sorted(self.numbers)}")
        return self.numbers[name]


def _default(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    return 1.0 / rope.powers(positions.device), 1.0


def _linear(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return 1.0 / rope.powers(positions.device) / rope.number("factor"), 1.0


def _dynamic(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    """NTK-aware: the base grows with the length, beyond the trained context only."""
    factor, trained, dim = rope.number("factor"), rope.max_positions, rope.dim
    longest = (positions.max() + 1).clamp(min=trained).float()  # a tensor: no synchronisation, and it compiles
    growth = factor * longest / trained - (factor - 1)
    return 1.0 / rope.powers(positions.device, rope.theta * growth ** (dim / (dim - 2))), 1.0


def _llama3(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between."""
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    frequencies = 1.0 / rope.powers(positions.device)
    turns = rope.number("original_max_position_embeddings") * frequencies / (2 * math.pi)  # over the trained context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def _yarn(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2 and the attention factor of section 3.4."""
    trained, numbers, half = rope.number("original_max_position_embeddings"), rope.numbers, rope.dim // 2
    factor = numbers.get("factor") or rope.max_positions / trained
    ends = [rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (numbers.get("beta_fast") or 32, numbers.get("beta_slow") or 1)]  # fmt: skip
    if numbers.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], rope.dim - 1)
    ramp = (torch.arange(half, device=positions.device, dtype=torch.float32) - low) / (high - low or 0.001)
    interpolated = ramp.clamp(0, 1)
    frequencies = 1.0 / rope.powers(positions.device)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated), _yarn_attention(factor, numbers)


def _yarn_attention(factor: float, numbers: dict[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])
    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return scale(numbers["mscale"]) / scale(numbers["mscale_all_dim"])
    return scale(1.0)


def _longrope(rope: Rope, positions: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one searched factor per frequency, another set beyond the trained context."""
    trained = rope.number("original_max_position_embeddings")
    short, long = (torch.tensor(rope.number(name), device=positions.device, dtype=torch.float32) for name in ("short_factor", "long_factor"))
    factors = torch.where(positions.max() >= trained, long, short)
    stretch = rope.numbers.get("factor") or rope.max_positions / trained
    scale = rope.numbers.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return 1.0 / (factors * rope.powers(positions.device)), float(scale)


KINDS: dict[str, Callable[[Rope, Tensor], tuple[Tensor, float]]] = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}  # fmt: skip
