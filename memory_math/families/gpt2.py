"""GPT-2 (and GPT-3, which has its shape): learned positions, one fused c_attn, a plain MLP, LayerNorm; weights are Conv1D, [in, out].

    V h + P h + L (12 h^2 + 13 h) + 2 h    with the MLP's usual width of 4 h

Source: transformers 5.23, modeling_gpt2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .base import Architecture, Tensor, linear, matrix, norm
from .fields import Fields


@dataclass(frozen=True)
class GPT2(Architecture):
    """positions: the longest sequence. `dropout` is GPT-2's resid_pdrop."""

    positions: int = 1024
    embedding_dropout: float = 0.1

    family: ClassVar[str] = "gpt2"
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    class_names: ClassVar[tuple[str, ...]] = ("GPT2",)
    body_name: ClassVar[str] = "transformer"

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> GPT2:
        fields.refuse("add_cross_attention")
        hidden = fields.whole("n_embd|hidden_size", "the width of the residual stream")
        heads = fields.whole("n_head|num_attention_heads", "the heads")
        return cls(
            fields.name,
            vocabulary=fields.whole("vocab_size", "the rows of the embedding"),
            hidden=hidden,
            layers=fields.whole("n_layer|num_hidden_layers", "the number of blocks"),
            heads=heads,
            kv_heads=heads,
            head_dim=fields.split(hidden, heads, "n_embd and n_head"),
            mlp_width=fields.whole("n_inner", "the width of the MLP", 4 * hidden),
            tied=fields.flag("tie_word_embeddings", True),
            task=task,
            labels=labels,
            activation=fields.text("activation_function", "gelu_new"),
            dropout=fields.share("resid_pdrop", 0.1),
            attention_dropout=fields.share("attn_pdrop", 0.1),
            positions=fields.whole("n_positions|max_position_embeddings", "the rows of the position embedding", 1024),
            embedding_dropout=fields.share("embd_pdrop", 0.1),
        )

    def body(self) -> Iterator[Tensor]:
        root, h, q, kv, f = self.root, self.hidden, self.query_width, self.kv_width, self.mlp_width
        yield matrix(f"{root}wte.weight", self.vocabulary, h, "embedding")
        yield matrix(f"{root}wpe.weight", self.positions, h, "positions")
        for path in (f"{root}h.{layer}" for layer in range(self.layers)):
            yield from norm(f"{path}.ln_1", h, bias=True)
            yield from linear(f"{path}.attn.c_attn", h, {"q": q, "k": kv, "v": kv}, bias=True, conv1d=True)
            yield from linear(f"{path}.attn.c_proj", q, {"o": h}, bias=True, conv1d=True)
            yield from norm(f"{path}.ln_2", h, bias=True)
            yield from linear(f"{path}.mlp.c_fc", h, {"up": f}, bias=True, conv1d=True)
            yield from linear(f"{path}.mlp.c_proj", f, {"down": h}, bias=True, conv1d=True)
        yield from norm(f"{root}ln_f", h, bias=True)
