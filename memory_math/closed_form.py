"""The closed form of what a block keeps, derived from the operations that the block is made of.

    >>> from memory_math import activation_formula
    >>> print(activation_formula("llama-2-7b", precision="bf16"))
    16h + 4q + 4kv + 8f + 4a + 8 bytes per token and block

h hidden, q = heads x head size, kv = key/value heads x head size, f width of the MLP, a heads, g key/value heads, s sequence length, r
rank. What a block keeps is linear in these, so each coefficient is the difference that one more makes in a prediction; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from .architectures import Architecture, architecture_of
from .errors import MemoryMathError
from .footprint import predict

SYMBOLS = ("h", "q", "kv", "f", "a", "g", "a s", "r", "")


@dataclass(frozen=True)
class Formula:
    """coefficients: symbol -> bytes per token and block; the empty symbol is the constant."""

    coefficients: Mapping[str, Fraction]

    def __str__(self) -> str:
        terms = [f"{_number(self.coefficients[symbol])}{symbol}" for symbol in SYMBOLS if self.coefficients[symbol]]
        return f"{' + '.join(terms).replace('+ -', '- ') or '0'} bytes per token and block"

    def __call__(self, **sizes: int) -> Fraction:
        """The bytes for sizes h, q, kv, f, a, g, s, r (0 where left out).

        >>> int(activation_formula("llama-2-7b", precision="bf16")(h=4096, q=4096, kv=4096, f=11008, a=32))
        186504
        """
        values = {symbol: Fraction(1) for symbol in SYMBOLS}
        for symbol in SYMBOLS[:-1]:
            for letter in symbol.split():
                values[symbol] *= sizes.get(letter, 0)
        return sum((self.coefficients[symbol] * values[symbol] for symbol in SYMBOLS), Fraction(0))


def activation_formula(source: object, **request: Any) -> Formula:
    """What autograd keeps of one block, per token, for this kind of request; request: keywords of `predict`.

    Embedding, last norm, loss, what all blocks share and what a block keeps once are not in it.
    Raises MemoryMathError for an encoder-decoder, whose blocks are of two kinds, and where `predict` refuses the request.
    """
    architecture = architecture_of(source)
    for name in ("batch_size", "sequence_length"):
        if name in request:
            raise MemoryMathError(f"{name}={request[name]!r}: the formula holds for all of them; leave it out")
    if architecture.family == "t5":
        raise MemoryMathError(f"{architecture.name}: encoder and decoder blocks keep different things; ask predict(...).saved instead")
    return _Differences(architecture, request).formula()


class _Differences:
    """Predictions of small relatives of a model, one size changed at a time."""

    def __init__(self, architecture: Architecture, request: Mapping[str, Any]) -> None:
        group, self.devices = max(architecture.heads // architecture.kv_heads, 1), _devices(architecture, request)
        heads = (4 if group == 1 else 8) * self.devices  # each device's share is that of a model on one
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": 4 * self.devices, "head_dim": 32, "mlp_width": 96 * self.devices, "vocabulary": 64,
                                 "layers": 2}  # fmt: skip
        hidden = 64 if self._free(architecture) else 32 * heads
        self.base = replace(architecture, hidden=hidden, **sizes)
        self.request = {**request, "device": "cpu"}

    @staticmethod
    def _free(architecture: Architecture) -> bool:
        """Whether the width of attention may differ from that of the residual stream."""
        return architecture.family in ("llama", "mixtral")

    def per_token(self, length: int = 64, **sizes: Any) -> Fraction:
        """Bytes of one more block for one more row, per token: what a block keeps once, such as 16-bit copies of its weights, is not in it."""
        request = {**self.request, "sequence_length": length} | ({"rank": sizes.pop("rank")} if "rank" in sizes else {})
        kept = {
            (layers, rows): predict(replace(self.base, layers=layers, **sizes), **{**request, "batch_size": rows}).saved_bytes
            for layers in (2, 3)
            for rows in (1, 2)
        }
        return Fraction(kept[3, 2] - kept[2, 2] - kept[3, 1] + kept[2, 1], length)

    def formula(self) -> Formula:
        base, here = self.base, self.per_token()
        found = dict.fromkeys(SYMBOLS, Fraction(0))
        found["a s"] = (self.per_token(128) - here) / (64 * base.heads)
        found["f"] = (self.per_token(mlp_width=base.mlp_width + 32 * self.devices) - here) / (32 * self.devices)
        found["r"] = self.per_token(rank=9) - self.per_token(rank=8)
        if self._free(base):
            self._widths(found, here)
        else:  # hidden = heads x head size, all of them key/value heads: their bytes are told as h
            found["h"] = (self.per_token(hidden=2 * base.hidden, head_dim=2 * base.head_dim) - here) / base.hidden
            self._heads(found, here, heads=2 * base.heads, kv_heads=2 * base.kv_heads, head_dim=base.head_dim // 2)
        found[""] = here - self._told(found, base)
        return Formula(found)

    @property
    def rank(self) -> int:
        return int(self.request.get("rank", 8))

    def _widths(self, found: dict[str, Fraction], here: Fraction) -> None:
        """h, q, kv, a and g apart: the head size makes q and kv wider, and kv by as much as there are key/value heads."""
        base, fewer, wide = self.base, self.base.kv_heads // 2, 2 * self.base.head_dim
        found["h"] = (self.per_token(hidden=base.hidden + 32) - here) / 32
        both, with_fewer = self.per_token(head_dim=wide) - here, self.per_token(head_dim=wide, kv_heads=fewer) - self.per_token(kv_heads=fewer)
        found["kv"] = (both - with_fewer) / (fewer * base.head_dim)
        found["q"] = (both / base.head_dim - found["kv"] * base.kv_heads) / base.heads
        found["g"] = (here - self.per_token(kv_heads=fewer)) / fewer - found["kv"] * base.head_dim
        self._heads(found, here, heads=2 * base.heads)

    def _heads(self, found: dict[str, Fraction], here: Fraction, **more: Any) -> None:
        """What comes once per head, from twice as many."""
        change = self.per_token(**more) - self._told(found, replace(self.base, **more)) - (here - self._told(found, self.base))
        found["a"] = change / self.base.heads

    def _told(self, found: dict[str, Fraction], shape: Architecture) -> Fraction:
        """What the coefficients found so far make of a shape."""
        sizes = {"h": shape.hidden, "q": shape.query_width, "kv": shape.kv_width, "f": shape.mlp_width, "a": shape.heads, "g": shape.kv_heads}
        return Formula(found)(**sizes, s=64, r=self.rank)


def _devices(architecture: Architecture, request: Mapping[str, Any]) -> int:
    """tensor_parallel, where the model itself can be divided so; of another value `predict` says what is wrong with it."""
    devices = request.get("tensor_parallel", 1)
    if type(devices) is not int or devices < 1:
        return 1
    architecture.shard(devices)
    return devices


def _number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"
