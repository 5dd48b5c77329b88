"""What transformers' GPT-NeoX and Pythia keep, call by call: `modeling_gpt_neox.py` of transformers 5.23 on the tape, with PEFT's layers.

Every method mirrors the method of the same name there. Rows are of one length, without padding, so that sdpa needs no mask.
"""

from __future__ import annotations

from .. import operations as ops
from ..families.neox import NeoX
from ..tape import Sized
from . import norms
from .activations import activate
from .blocks import Decoder, Past, rotary, split, view
from .decoder_attention import Habits, attend
from .peft_layers import linear


class TransformersNeoX(Decoder):
    """GPTNeoXForCausalLM with labels."""

    arch: NeoX
    embedding_path = "gpt_neox.embed_in"

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded, positions, past = self.embed(ids), self.ids(self.sequence), Past(self, cache)
        mask = self.causal_mask(embedded)
        x = self.dropout(embedded, self.arch.dropout)
        table = self.tape.new(2 * self.sequence * self.arch.rotary_width, x.itemsize, "other")
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, layer, past, table, mask).forward, x)
        x = norms.layer_norm(self, x, "gpt_neox.final_layer_norm")
        del embedded, positions  # the names live as long as the forward does
        return x


class Block:
    """GPTNeoXLayer. The weights that eager attention returns live as long as it runs."""

    def __init__(self, model: TransformersNeoX, layer: int, past: Past, table: Sized, mask: Sized | None) -> None:
        self.model, self.tape, self.layer, self.past, self.table, self.mask = model, model.tape, layer, past, table, mask
        self.path = f"gpt_neox.layers.{layer}"

    def forward(self, x: Sized) -> Sized:
        normalised = self.norm(x, "input_layernorm")
        attended, weights = self.attention(normalised)
        del normalised
        attended = self.model.dropout(attended, self.model.arch.dropout)
        if self.model.arch.parallel_residual:
            fed = self.mlp(self.norm(x, "post_attention_layernorm"))
            x = ops.add(self.tape, "residual", ops.add(self.tape, "residual", fed, attended), x)
        else:
            attended = ops.add(self.tape, "residual", attended, x)
            fed = self.mlp(self.norm(attended, "post_attention_layernorm"))
            x = ops.add(self.tape, "residual", fed, attended)
        del weights
        return x

    def norm(self, x: Sized, name: str) -> Sized:
        return norms.layer_norm(self.model, x, f"{self.path}.{name}")

    def attention(self, x: Sized) -> tuple[Sized, Sized | None]:
        model, width = self.model, self.model.tokens * self.model.arch.query_width
        fused = linear(model, x, f"{self.path}.attention.query_key_value")
        q, k, v = split(self.tape, fused, width, width, width)
        q, k = self.rotate(q, k)
        k, v = self.past.update(self.layer, k, v)
        habits = Habits(cast_to=q.itemsize, taken_in=4, dropout=model.arch.attention_dropout, in_order="qk" + self.past.in_order)
        mixed, weights = attend(model, q, k, v, self.mask, habits)
        mixed = linear(model, mixed, f"{self.path}.attention.dense")
        del fused
        return mixed, weights

    def rotate(self, q: Sized, k: Sized) -> tuple[Sized, Sized]:
        """apply_rotary_pos_emb: both are turned, then both are put together again with what passes."""
        turned_q, turned_k = self.turn(q), self.turn(k)
        turned_q = self.joined(turned_q, q)
        return turned_q, self.joined(turned_k, k)

    def turn(self, x: Sized) -> Sized:
        """``x * cos + rotate_half(x) * sin`` of the first dimensions of every head: only cos and sin are kept, one pair for all blocks."""
        numel = x.numel * self.model.arch.rotary_width // self.model.arch.head_dim
        return rotary(self.tape, view(self.tape, "rotary", x, numel), self.table)

    def joined(self, turned: Sized, x: Sized) -> Sized:
        return self.tape.record("rotary", [turned, x], lambda: self.tape.new(x.numel, turned.itemsize))

    def mlp(self, x: Sized) -> Sized:
        hidden = linear(self.model, x, f"{self.path}.mlp.dense_h_to_4h")
        hidden = activate(self.tape, self.model.arch.activation, hidden, self.model.autocast)
        hidden = linear(self.model, hidden, f"{self.path}.mlp.dense_4h_to_h")
        return self.model.dropout(hidden, self.model.arch.dropout)
