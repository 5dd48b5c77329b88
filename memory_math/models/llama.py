"""What transformers' Llama keeps, call by call: `modeling_llama.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Every method mirrors the method of the same name in that file. The attention mask is assumed absent (packed or equal-length rows), as it
is for training on full windows; then the sdpa path takes PyTorch's fused kernel with k and v unexpanded.
"""

from __future__ import annotations

from .. import operations as ops
from .base import Model, cached
from ..tape import Sized


class TransformersLlama(Model):
    """LlamaForCausalLM with labels."""

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        hidden = self.hidden_states(ids)
        self.ledger.enter("loss")
        logits = ops.linear(self.tape, hidden, self.head, autocast=self.autocast, part="logits")
        del hidden
        return self.token_loss(logits, labels)

    def token_loss(self, logits: Sized, labels: Sized) -> Sized:
        """ForCausalLMLoss: float32 logits of every position, and the labels shifted by one in a new tensor."""
        full = ops.cast(self.tape, logits, 4, part="logits")
        return ops.cross_entropy(self.tape, full, self.tape.new(labels.numel, labels.itemsize, "other"))

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded = x = ops.embedding(self.tape, ids, self.weights["model.embed_tokens"])  # the name lives as long as the forward does
        rotary = self.tape.new(2 * self.sequence * self.arch.head_dim, x.itemsize, "other")
        if self.request.method == "lora" and self.request.gradient_checkpointing:
            x = self.source(x)  # PEFT calls enable_input_require_grads for checkpointing
        for layer in range(self.arch.layers):
            block = Block(self, f"model.layers.{layer}", rotary, cache)
            x = self.tape.checkpoint(block.forward, x) if self.request.gradient_checkpointing else block.forward(x)
        hidden = rms_norm(self, x, "model.norm")
        del embedded
        return hidden


class Block:
    """LlamaDecoderLayer."""

    def __init__(self, model: TransformersLlama, path: str, rotary: Sized, cache: list[Sized] | None) -> None:
        self.model, self.tape, self.path, self.rotary, self.cache = model, model.tape, path, rotary, cache

    def forward(self, x: Sized) -> Sized:
        normalised = rms_norm(self.model, x, f"{self.path}.input_layernorm")
        attended = self.attention(normalised)
        del normalised
        x = ops.add(self.tape, "residual", x, attended)
        del attended
        normalised = rms_norm(self.model, x, f"{self.path}.post_attention_layernorm")
        return ops.add(self.tape, "residual", x, self.mlp(normalised))

    def attention(self, x: Sized) -> Sized:
        q, k, v = (lora_linear(self.model, x, f"{self.path}.self_attn.{name}_proj") for name in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        if self.cache is not None:
            self.cache += [cached(k), cached(v)]
        attended = self.eager(q, k, v) if self.model.request.attention == "eager" else self.fused(q, k, v)
        del q, k, v
        return lora_linear(self.model, attended, f"{self.path}.self_attn.o_proj")

    def rotate(self, x: Sized) -> Sized:
        """``x * cos + rotate_half(x) * sin``: only cos and sin are kept, one pair for all blocks."""
        turned = ops.elementwise(self.tape, "rotary", x, scratch=x.nbytes)
        turned = self.times_table(turned)
        return ops.add(self.tape, "rotary", self.times_table(x), turned)

    def times_table(self, x: Sized) -> Sized:
        itemsize = max(x.itemsize, self.rotary.itemsize)
        return self.tape.record("rotary", [x], lambda: self.tape.new(x.numel, itemsize), keeps=[self.rotary])

    def fused(self, q: Sized, k: Sized, v: Sized) -> Sized:
        rows = self.model.tokens * self.model.arch.heads
        return ops.scaled_dot_product_attention(self.tape, q, k, v, rows, self.model.autocast)

    def eager(self, q: Sized, k: Sized, v: Sized) -> Sized:
        """k and v are repeated to q's width, and q, k, v are laid out anew for the batched product; scores are s x s per head."""
        tape, autocast = self.tape, self.model.autocast
        scores = self.model.tokens * self.model.sequence * self.model.arch.heads
        q, k, v = (ops.copy(tape, "attention", tensor, q.numel) for tensor in (q, k, v))
        s = ops.matmul(tape, "attention scores", q, k, scores, autocast)
        del q, k
        s = ops.elementwise(tape, "attention scaling", s)
        s = ops.elementwise(tape, "attention mask", s)
        s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, 4))
        s = ops.cast(tape, s, v.itemsize)
        attended = ops.matmul(tape, "attention", s, v, self.model.tokens * self.model.arch.query_width, autocast)
        del s, v
        return ops.copy(tape, "attention", attended)

    def mlp(self, x: Sized) -> Sized:
        tape, path = self.tape, f"{self.path}.mlp"
        gate = lora_linear(self.model, x, f"{path}.gate_proj")
        gate = ops.elementwise(tape, "silu", gate, keeps=[gate])
        product = ops.multiply(tape, "silu(gate) * up", gate, lora_linear(self.model, x, f"{path}.up_proj"))
        del gate
        return lora_linear(self.model, product, f"{path}.down_proj")


def rms_norm(model: Model, x: Sized, path: str) -> Sized:
    """LlamaRMSNorm: ``weight * (x * rsqrt(mean(x^2) + eps))``, in float32 up to the weight."""
    tape, weight, itemsize = model.tape, model.weights[path], x.itemsize
    x = ops.cast(tape, x, 4)
    squares = ops.elementwise(tape, path, x, keeps=[x], scratch=2 * x.nbytes)
    mean = tape.record(path, [squares], lambda: tape.new(model.tokens, 4))
    del squares
    factor = tape.record(path, [mean], lambda: tape.new(model.tokens, 4), keeps_after=lambda y: [y])
    x = ops.multiply(tape, path, x, factor)
    return ops.multiply(tape, path, weight, ops.cast(tape, x, itemsize))


def lora_linear(model: Model, x: Sized, path: str) -> Sized:
    """nn.Linear, and where it is adapted what PEFT adds: x in the adapter's dtype, dropout, A, B, scaling, sum, and a cast back."""
    tape, autocast = model.tape, model.autocast
    y = ops.linear(tape, x, model.weights[path], model.weights.get(f"{path}.bias"), autocast)
    if path not in model.adapters:
        return y
    A, B = model.adapters[path]
    update = ops.cast(tape, x, A.itemsize)
    if model.request.dropout:
        update = ops.dropout(tape, update)
    update = ops.linear(tape, ops.linear(tape, update, A, autocast=autocast), B, autocast=autocast)
    update = ops.elementwise(tape, "scaling", update)
    itemsize, y = y.itemsize, ops.add(tape, path, y, update)
    del update
    return ops.cast(tape, y, itemsize)
