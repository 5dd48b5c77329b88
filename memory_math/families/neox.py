"""GPT-NeoX and Pythia: rotary positions, one fused query_key_value, attention and MLP side by side, a head of its own.

    2 V h + L (12 h^2 + 13 h) + 2 h    with the MLP's usual width of 4 h

Source: transformers 5.23, modeling_gpt_neox.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import MemoryMathError
from .base import Architecture, Tensor, linear, matrix, norm
from .fields import Fields


@dataclass(frozen=True)
class NeoX(Architecture):
    """attention_bias: on query_key_value and dense. parallel_residual: x + attention(norm(x)) + mlp(norm'(x)).

    rotary_width: dimensions of each head that rotary positions turn; the rest passes.
    """

    attention_bias: bool = True
    parallel_residual: bool = True
    rotary_width: int = 0

    family: ClassVar[str] = "gpt_neox"
    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)
    class_names: ClassVar[tuple[str, ...]] = ("GPTNeoX",)
    body_name: ClassVar[str] = "gpt_neox"

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> NeoX:
        sizes = fields.multi_head_sizes()
        head_dim = sizes["head_dim"]
        return cls(
            fields.name,
            **sizes,
            mlp_width=fields.whole("intermediate_size", "the width of the MLP"),
            tied=fields.flag("tie_word_embeddings", False),
            task=task,
            labels=labels,
            activation=fields.text("hidden_act", "gelu"),
            dropout=fields.share("hidden_dropout", 0.0),
            attention_dropout=fields.share("attention_dropout", 0.0),
            attention_bias=fields.flag("attention_bias", True),
            parallel_residual=fields.flag("use_parallel_residual", True),
            rotary_width=int(head_dim * _rotary_share(fields)),
        )

    def body(self) -> Iterator[Tensor]:
        root, h, q, kv, f = self.root, self.hidden, self.query_width, self.kv_width, self.mlp_width
        yield matrix(f"{root}embed_in.weight", self.vocabulary, h, "embedding")
        for path in (f"{root}layers.{layer}" for layer in range(self.layers)):
            yield from norm(f"{path}.input_layernorm", h, bias=True)
            yield from norm(f"{path}.post_attention_layernorm", h, bias=True)
            yield from linear(f"{path}.attention.query_key_value", h, {"q": q, "k": kv, "v": kv}, self.attention_bias)
            yield from linear(f"{path}.attention.dense", q, {"o": h}, self.attention_bias)
            yield from linear(f"{path}.mlp.dense_h_to_4h", h, {"up": f}, bias=True)
            yield from linear(f"{path}.mlp.dense_4h_to_h", f, {"down": h}, bias=True)
        yield from norm(f"{root}final_layer_norm", h, bias=True)


def _rotary_share(fields: Fields) -> float:
    """rotary_pct, or as transformers 5 writes it, partial_rotary_factor among the rope_parameters."""
    rope = fields.config.get("rope_parameters")
    share = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    share = fields.config.get("rotary_pct") if share is None else share
    share = 0.25 if share is None else share
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise MemoryMathError(f"{fields.name}: rotary_pct={share!r}: expected a number with 0 < rotary_pct <= 1")
    return float(share)
