"""Falcon: 7B with one key/value head and one norm per block, 40B and 180B with groups and two norms, falcon-rw with ALiBi and biases.

    V h + L (h (a + 2 kv) hd + h^2 + 8 h^2 + 2 h norms) + 2 h    with the MLP's usual width of 4 h

Source: transformers 5.23, modeling_falcon.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .base import Architecture, Tensor, linear, matrix, norm
from .fields import Fields


@dataclass(frozen=True)
class Falcon(Architecture):
    """new_decoder: the 40B's grouped query_key_value. parallel_attention: attention and MLP read one residual and are added together.

    block_norms: the LayerNorms of a block by name. biased: linear layers have biases. alibi: positions by ALiBi, otherwise rotary.
    """

    new_decoder: bool = False
    parallel_attention: bool = True
    block_norms: tuple[str, ...] = ("input_layernorm",)
    biased: bool = False
    alibi: bool = False

    family: ClassVar[str] = "falcon"
    model_types: ClassVar[tuple[str, ...]] = ("falcon", "RefinedWebModel", "RefinedWeb")  # the last two in the files of 2023: 7B, 40B
    class_names: ClassVar[tuple[str, ...]] = ("Falcon", "RW")
    body_name: ClassVar[str] = "transformer"

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> Falcon:
        hidden = fields.whole("n_embed|hidden_size", "the width of the residual stream")
        heads = fields.whole("num_attention_heads|n_head", "the query heads")
        new = fields.flag("new_decoder_architecture", fields.text("model_type", "falcon") == "RefinedWeb")
        parallel = fields.flag("parallel_attn", True)
        return cls(
            fields.name,
            vocabulary=fields.whole("vocab_size", "the rows of the embedding"),
            hidden=hidden,
            layers=fields.whole("num_hidden_layers|n_layer", "the number of blocks"),
            heads=heads,
            kv_heads=_kv_heads(fields, heads, new),
            head_dim=fields.split(hidden, heads, "hidden_size and num_attention_heads"),
            mlp_width=fields.whole("ffn_hidden_size", "the width of the MLP", 4 * hidden),
            tied=fields.flag("tie_word_embeddings", True),
            task=task,
            labels=labels,
            activation=fields.text("activation", "gelu"),
            dropout=fields.share("hidden_dropout", 0.0),
            attention_dropout=fields.share("attention_dropout", 0.0),
            new_decoder=new,
            parallel_attention=parallel,
            block_norms=_block_norms(fields, new, parallel),
            biased=fields.flag("bias", False),
            alibi=fields.flag("alibi", False),
        )

    def body(self) -> Iterator[Tensor]:
        root, h, q, kv, f = self.root, self.hidden, self.query_width, self.kv_width, self.mlp_width
        yield matrix(f"{root}word_embeddings.weight", self.vocabulary, h, "embedding")
        for path in (f"{root}h.{layer}" for layer in range(self.layers)):
            for name in self.block_norms:
                yield from norm(f"{path}.{name}", h, bias=True)
            yield from linear(f"{path}.self_attention.query_key_value", h, {"q": q, "k": kv, "v": kv}, self.biased)
            yield from linear(f"{path}.self_attention.dense", q, {"o": h}, self.biased)
            yield from linear(f"{path}.mlp.dense_h_to_4h", h, {"up": f}, self.biased)
            yield from linear(f"{path}.mlp.dense_4h_to_h", f, {"down": h}, self.biased)
        yield from norm(f"{root}ln_f", h, bias=True)


def _kv_heads(fields: Fields, heads: int, new_decoder: bool) -> int:
    """num_kv_heads counts in the new decoder only; the old one has one key/value head (multi_query) or as many as query heads."""
    if not new_decoder:
        return 1 if fields.flag("multi_query", True) else heads
    kv_heads = fields.whole("num_kv_heads|n_head_kv", "the key/value heads", heads)
    fields.split(heads, kv_heads, "num_attention_heads and num_kv_heads")
    return kv_heads


def _block_norms(fields: Fields, new_decoder: bool, parallel: bool) -> tuple[str, ...]:
    if not parallel:
        return "input_layernorm", "post_attention_layernorm"
    norms = fields.whole("num_ln_in_parallel_attn", "the norms of a block", 2 if new_decoder else 1)
    return ("ln_attn", "ln_mlp") if norms == 2 else ("input_layernorm",)
