"""What transformers' GPT-2 keeps, call by call: `modeling_gpt2.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Every method mirrors the method of the same name there. Rows are of one length, without padding, so that sdpa needs no mask.
"""

from __future__ import annotations

from .. import operations as ops
from ..families.gpt2 import GPT2
from ..operations import Weight
from ..tape import Sized
from . import blocks, norms
from .activations import activate
from .base import Model
from .losses import token_loss
from .peft_layers import linear, with_virtual_labels

CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


class TransformersGPT2(Model):
    """GPT2LMHeadModel with labels."""

    arch: GPT2
    embedding_path = "transformer.wte"

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        """A Conv1D is stored as [in, out]; here it is [out, in] like every matrix, which weighs the same."""
        shape = (columns, rows) if name.endswith(CONV1D) else (rows, columns)
        return super()._weight(name, *shape, quantized)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        hidden = self.hidden_states(ids)
        self.ledger.enter("loss")
        return token_loss(self, hidden, with_virtual_labels(self, labels))

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded = blocks.embed(self, ids)
        numbers = self.ids(self.sequence)
        positions = ops.embedding(self.tape, numbers, self.weights["transformer.wpe"])
        x = blocks.plus_positions(self, embedded, positions)
        mask = blocks.causal_mask(self, embedded, True) if self.request.attention == "eager" else None
        x = blocks.dropout(self, x, self.arch.embedding_dropout)
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, f"transformer.h.{layer}", cache).forward, x, *([] if mask is None else [mask]))
        x = norms.layer_norm(self, x, "transformer.ln_f")
        del embedded, numbers, positions, mask  # the names live as long as the forward does
        return x


class Block:
    """GPT2Block. The weights that eager attention returns live as long as it runs."""

    def __init__(self, model: TransformersGPT2, path: str, cache: list[Sized] | None) -> None:
        self.model, self.tape, self.path, self.cache = model, model.tape, path, cache

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
        q, k, v = blocks.split(self.tape, linear(model, x, f"{self.path}.attn.c_attn"), width, width, width)
        k, v = blocks.into_cache(model, k, v, self.cache)
        softmax = blocks.Softmax(taken_in=None, cast_to=v.itemsize)
        mixed, weights = blocks.attend(model, q, k, v, mask, softmax, model.arch.attention_dropout)
        mixed = linear(model, mixed, f"{self.path}.attn.c_proj")
        return blocks.dropout(model, mixed, model.arch.dropout), weights

    def mlp(self, x: Sized) -> Sized:
        model, path = self.model, f"{self.path}.mlp"
        x = linear(model, x, f"{path}.c_fc")
        x = activate(self.tape, model.arch.activation, x)
        x = linear(model, x, f"{path}.c_proj")
        return blocks.dropout(model, x, model.arch.dropout)
