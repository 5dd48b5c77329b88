"""What transformers' OPT keeps, call by call: `modeling_opt.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Every method mirrors the method of the same name there. Rows are of one length, without padding, so that sdpa needs no mask.
"""

from __future__ import annotations

from .. import operations as ops
from ..families.opt import OPT
from ..tape import Sized
from . import norms
from .activations import activate
from .blocks import Decoder, Past
from .decoder_attention import Habits, attend
from .peft_layers import linear


class TransformersOPT(Decoder):
    """OPTForCausalLM with labels."""

    arch: OPT
    embedding_path = "model.decoder.embed_tokens"

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded, past = self.embed(ids), Past(self, cache)
        numbers = [self.tape.new(self.tokens, 4, "other"), self.ids(self.tokens)]  # a mask of ones, and the positions counted from it
        mask = self.causal_mask(embedded)
        positions = ops.embedding(self.tape, self.ids(self.tokens), self.weights["model.decoder.embed_positions"])  # two rows further on
        embedded = self.projected(embedded, "project_in")
        x = ops.add(self.tape, "positions", embedded, positions)
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, layer, past, mask).forward, x)
        if self.arch.final_norm:
            x = norms.layer_norm(self, x, "model.decoder.final_layer_norm")
        x = self.projected(x, "project_out")
        del embedded, numbers, positions  # the names live as long as the forward does
        return x

    def projected(self, x: Sized, name: str) -> Sized:
        """OPT-350m's way from the embedding's width to the blocks' and back."""
        path = f"model.decoder.{name}"
        return linear(self, x, path) if path in self.weights else x


class Block:
    """OPTDecoderLayer. The weights that eager attention returns live as long as it runs."""

    def __init__(self, model: TransformersOPT, layer: int, past: Past, mask: Sized | None) -> None:
        self.model, self.tape, self.arch, self.layer, self.past, self.mask = model, model.tape, model.arch, layer, past, mask
        self.path = f"model.decoder.layers.{layer}"

    def forward(self, x: Sized) -> Sized:
        residual = x
        x = self.norm(x, "self_attn_layer_norm", first=True)
        x, weights = self.self_attn(x)
        x = self.model.dropout(x, self.arch.dropout)
        x = ops.add(self.tape, "residual", residual, x)
        x = residual = self.norm(x, "self_attn_layer_norm", first=False)
        x = self.norm(x, "final_layer_norm", first=True)
        x = linear(self.model, x, f"{self.path}.fc1")
        x = activate(self.tape, self.arch.activation, x, self.model.autocast)
        x = linear(self.model, x, f"{self.path}.fc2")
        x = self.model.dropout(x, self.arch.dropout)
        x = ops.add(self.tape, "residual", residual, x)
        del weights
        return self.norm(x, "final_layer_norm", first=False)

    def norm(self, x: Sized, name: str, first: bool) -> Sized:
        """The LayerNorm of one half of the block, where this is its place: before the half, or, in the 350m, after it."""
        return norms.layer_norm(self.model, x, f"{self.path}.{name}") if first == self.arch.norm_first else x

    def self_attn(self, x: Sized) -> tuple[Sized, Sized | None]:
        model, path = self.model, f"{self.path}.self_attn"
        q = ops.elementwise(self.tape, "attention scaling", linear(model, x, f"{path}.q_proj"))
        k, v = (linear(model, x, f"{path}.{name}_proj") for name in "kv")
        k, v = self.past.update(self.layer, k, v)
        habits = Habits(cast_to=q.itemsize, taken_in=4, dropout=self.arch.attention_dropout, in_order=self.past.in_order)
        mixed, weights = attend(model, q, k, v, self.mask, habits)
        return linear(model, mixed, f"{path}.out_proj"), weights
