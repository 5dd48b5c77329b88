"""What transformers' GPT-2 keeps, call by call: `modeling_gpt2.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Every method mirrors the method of the same name there. Rows are of one length, without padding, so that sdpa needs no mask.
"""

from __future__ import annotations

from .. import operations as ops
from ..families.gpt2 import GPT2
from ..operations import Weight
from ..tape import Sized
from . import norms
from .activations import activate
from .blocks import Decoder, Past, plus_positions, split
from .decoder_attention import Habits, attend
from .peft_layers import linear

CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def upright(name: str, rows: int, columns: int) -> tuple[int, int]:
    """A Conv1D is stored as [in, out]; here it is [out, in] like every matrix, which weighs the same."""
    return (columns, rows) if name.endswith(CONV1D) else (rows, columns)


class TransformersGPT2(Decoder):
    """GPT2LMHeadModel with labels."""

    arch: GPT2
    embedding_path = "transformer.wte"

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        return super()._weight(name, *upright(name, rows, columns), quantized)

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded, numbers, past = self.embed(ids), self.ids(self.sequence), Past(self, cache)
        positions = ops.embedding(self.tape, numbers, self.weights["transformer.wpe"])
        x = plus_positions(self, embedded, positions)
        mask = self.causal_mask(embedded)
        x = self.dropout(x, self.arch.embedding_dropout)
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, layer, past).forward, x, *([] if mask is None else [mask]))
        x = norms.layer_norm(self, x, "transformer.ln_f")
        del embedded, numbers, positions, mask  # the names live as long as the forward does
        return x


class Block:
    """GPT2Block. The weights that eager attention returns live as long as it runs."""

    def __init__(self, model: TransformersGPT2, layer: int, past: Past) -> None:
        self.model, self.tape, self.layer, self.past = model, model.tape, layer, past
        self.path = f"transformer.h.{layer}"

    def forward(self, x: Sized, mask: Sized | None = None) -> Sized:
        residual = x
        x = norms.layer_norm(self.model, x, f"{self.path}.ln_1")
        attended, weights = self.attn(x, mask)
        x = ops.add(self.tape, "residual", attended, residual)
        residual = x
        x = norms.layer_norm(self.model, x, f"{self.path}.ln_2")
        fed = self.mlp(x)
        x = ops.add(self.tape, "residual", residual, fed)
        del attended, weights
        return x

    def attn(self, x: Sized, mask: Sized | None) -> tuple[Sized, Sized | None]:
        model, width = self.model, self.model.tokens * self.model.arch.query_width
        q, k, v = split(self.tape, linear(model, x, f"{self.path}.attn.c_attn"), width, width, width)
        k, v = self.past.update(self.layer, k, v)
        habits = Habits(cast_to=v.itemsize, dropout=model.arch.attention_dropout, in_order=self.past.in_order)
        mixed, weights = attend(model, q, k, v, mask, habits)
        mixed = linear(model, mixed, f"{self.path}.attn.c_proj")
        return model.dropout(mixed, model.arch.dropout), weights

    def mlp(self, x: Sized) -> Sized:
        model, path = self.model, f"{self.path}.mlp"
        x = linear(model, x, f"{path}.c_fc")
        x = activate(self.tape, model.arch.activation, x, model.autocast)
        x = linear(model, x, f"{path}.c_proj")
        return model.dropout(x, model.arch.dropout)
