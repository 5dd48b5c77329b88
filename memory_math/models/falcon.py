"""What transformers' Falcon keeps, call by call: `modeling_falcon.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Every method mirrors the method of the same name there. The mask is always written out, which keeps FlashAttention out on CUDA; and the 7B's
one head of keys is given to scaled_dot_product_attention as it is, for which no fused kernel exists anywhere: its scores are kept.
Falcon's linear layers are products with a transposed weight, of which autocast makes a copy each time.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.falcon import Falcon
from ..operations import QuantizedWeight
from ..request import Request
from ..tape import Ledger, Sized
from . import norms
from .activations import activate
from .attention_dropout import expanded
from .blocks import Decoder, Past, rotary, view
from .decoder_attention import Habits, attend, masked, mix, scores
from .peft_layers import linear


class TransformersFalcon(Decoder):
    """FalconForCausalLM with labels."""

    arch: Falcon
    embedding_path = "transformer.word_embeddings"
    takes_prefix = False

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        if self.arch.alibi and request.attention == "flash":
            raise MemoryMathError(f"attention='flash' with {self.arch.name}: transformers has no ALiBi there; use 'sdpa'")

    def linear(self, x: Sized, path: str) -> Sized:
        """FalconLinear: ``x @ weight.T``, and the bias added to that."""
        weight, bias = self.weights[path], self.weights.get(f"{path}.bias")
        copied = self.autocast not in (None, weight.itemsize) and not isinstance(weight, QuantizedWeight)
        copy = ops.cast(self.tape, weight, self.autocast or 0, part="workspace") if copied else None
        y = ops.linear(self.tape, x, weight, autocast=self.autocast, copy=copy)
        return y if bias is None else ops.add(self.tape, path, y, expanded(self, bias, y.numel))

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded, positions, past = self.embed(ids), self.ids(self.sequence), Past(self, cache)
        x, mask, distances = embedded, self.mask(embedded), self.distances(embedded)
        table = self.tape.new(2 * self.sequence * self.arch.head_dim, x.itemsize, "other")
        weights = None
        for layer in range(self.arch.layers):
            block = Block(self, layer, past, table, mask)
            x = self.run_block(layer, block.forward, x)
            weights, block.weights = block.weights, None  # what a block returns lives until the next one has returned
        normalised = norms.layer_norm(self, x, "transformer.ln_f")
        del embedded, positions, distances, weights  # the names live as long as the forward does
        return normalised

    def distances(self, x: Sized) -> list[Sized]:
        """ALiBi: a mask of ones, and how far along each key is, times each head's slope: [B, a, 1, T] in x's dtype."""
        return [self.ids(self.tokens), self.tape.new(self.tokens * self.arch.heads, x.itemsize, "other")] if self.arch.alibi else []

    def mask(self, x: Sized) -> Sized | None:
        """With ALiBi in it there is one for every head: [B, a, T, T] in x's dtype."""
        if self.arch.alibi:
            return self.tape.new(self.tokens * self.arch.heads * self.sequence, x.itemsize, "other")
        return self.causal_mask(x, always=True)


class Block:
    """FalconDecoderLayer. weights: what eager attention returned."""

    def __init__(self, model: TransformersFalcon, layer: int, past: Past, table: Sized, mask: Sized | None) -> None:
        self.model, self.tape, self.arch, self.layer, self.past, self.table, self.mask = model, model.tape, model.arch, layer, past, table, mask
        self.path = f"transformer.h.{layer}"
        self.weights: Sized | None = None

    def forward(self, x: Sized) -> Sized:
        residual, before = x, [self.norm(x, name) for name in self.arch.block_norms if name != "post_attention_layernorm"]
        attended, weights = self.self_attention(before[0])
        if not (self.arch.new_decoder or self.arch.parallel_attention):
            residual = self.dropout_add(attended, residual, self.arch.attention_dropout)
            before.append(self.norm(residual, "post_attention_layernorm"))
        fed = self.mlp(before[-1])
        if self.arch.new_decoder or self.arch.parallel_attention:
            fed = self.added_in_place(fed, attended)
        x = self.dropout_add(fed, residual, self.arch.dropout)
        self.weights = weights
        return x

    def norm(self, x: Sized, name: str) -> Sized:
        return norms.layer_norm(self.model, x, f"{self.path}.{name}")

    def added_in_place(self, x: Sized, y: Sized) -> Sized:
        return self.tape.record("residual", [x, y], lambda: Sized(x.numel, x.itemsize, x.storage), passes=True)

    def dropout_add(self, x: Sized, residual: Sized, share: float) -> Sized:
        return ops.add(self.tape, "residual", residual, self.model.dropout(x, share))

    def self_attention(self, x: Sized) -> tuple[Sized, Sized | None]:
        model = self.model
        fused = linear(model, x, f"{self.path}.self_attention.query_key_value")
        q, k, v = self.split_heads(fused)
        if not self.arch.alibi:
            q, k = rotary(self.tape, q, self.table), rotary(self.tape, k, self.table)
        k, v = self.past.update(self.layer, k, v)
        mixed, weights = self.attend(q, k, v, x.itemsize)
        mixed = linear(model, mixed, f"{self.path}.self_attention.dense")
        del fused
        return mixed, weights

    def attend(self, q: Sized, k: Sized, v: Sized, itemsize: int) -> tuple[Sized, Sized | None]:
        """itemsize: of the block's normalised input, which the softmax is taken in. Without ALiBi no weights are dropped out."""
        in_order, model = self.past.in_order, self.model
        if self.arch.alibi and model.request.attention == "eager" and model.request.gradient_checkpointing != "attention":
            return self.eager_with_alibi(q, k, v, itemsize)
        share = self.arch.attention_dropout if self.arch.alibi else 0.0
        habits = Habits(cast_to=itemsize, taken_in=itemsize, dropout=share, in_order=in_order, in_place=True)
        return attend(model, q, k, v, self.mask, habits)

    def eager_with_alibi(self, q: Sized, k: Sized, v: Sized, itemsize: int) -> tuple[Sized, Sized]:
        """16-bit scores in float32, plus ALiBi, scaled in place, plus the mask, which holds ALiBi too; all of them live until the end."""
        model, tape, autocast = self.model, self.tape, self.model.autocast
        assert self.mask is not None
        product = scores(model, q, k, self.past.in_order, autocast)
        wide = ops.cast(tape, product, 4)
        logits = masked(model, wide, self.mask)
        scaled = view(tape, "attention scaling", logits)
        biased = masked(model, scaled, self.mask)
        s = ops.softmax(tape, "attention softmax", ops.cast(tape, biased, itemsize))
        del biased
        s = model.dropout(s, self.arch.attention_dropout)
        mixed = ops.copy(tape, "attention", mix(model, s, v, self.past.in_order, autocast))
        del product, wide, logits, scaled
        return mixed, s

    def split_heads(self, fused: Sized) -> tuple[Sized, Sized, Sized]:
        """Slices of one tensor. A list as an index makes copies, and the new decoder writes k and v out for every query head."""
        tape, tokens, arch = self.tape, self.model.tokens, self.arch
        q = view(tape, "split", fused, tokens * arch.query_width)
        if not arch.new_decoder and arch.kv_heads == arch.heads:
            return q, view(tape, "split", fused, q.numel), view(tape, "split", fused, q.numel)
        k, v = (tape.record("split", [fused], lambda: tape.new(tokens * arch.kv_width, fused.itemsize), keeps=[self.model.ids(1)]) for _ in "kv")
        if not arch.new_decoder:
            return q, k, v
        return ops.copy(tape, "split", q), ops.copy(tape, "split", k, q.numel), ops.copy(tape, "split", v, q.numel)

    def mlp(self, x: Sized) -> Sized:
        hidden = linear(self.model, x, f"{self.path}.mlp.dense_h_to_4h")
        hidden = activate(self.tape, self.arch.activation, hidden, self.model.autocast)
        return linear(self.model, hidden, f"{self.path}.mlp.dense_4h_to_h")
