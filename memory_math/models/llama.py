"""What transformers' Llama keeps, call by call: `modeling_llama.py` of transformers 5.23 on the tape, with PEFT 0.21's LoRA layers.

Mistral, Qwen2, Qwen3 and Gemma are the same blocks with a bias, two more norms in the attention, or another norm. Every method mirrors the
method of the same name there. The attention mask is assumed absent (packed or equal-length rows), as it is for training on full windows;
then the sdpa path takes PyTorch's fused kernel with k and v unexpanded. Versions before `use_gqa_in_sdpa` repeat k and v to q's width. A row that is
as long as a block's sliding window has a mask, of true and false (masking_utils.py, _ignore_causal_mask_sdpa).
"""

from __future__ import annotations

from .. import operations as ops
from ..families.llama import Llama
from ..tape import Sized
from . import attention, norms
from .activations import activate
from .base import Model, cached
from .blocks import rotary
from .losses import token_loss
from .peft_layers import LayerPrefix, linear, prefix_of, with_prompt, with_virtual_labels


class TransformersLlama(Model):
    """LlamaForCausalLM with labels."""

    arch: Llama

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        hidden = self.hidden_states(ids)
        self.ledger.enter("loss")
        return token_loss(self, hidden, with_virtual_labels(self, labels))

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded = x = self.embed(ids)  # the name lives as long as the forward does
        rotary = self.rotary(x.itemsize)
        mask = self.tape.new(self.tokens * self.sequence, x.itemsize, "other") if self.habits.masked else None
        windowed = self.tape.new(self.tokens * self.sequence, 1, "other") if any(map(self.slides, range(self.arch.layers))) else mask
        x = self.needed(x)
        prefix = prefix_of(self)
        for layer in range(self.arch.layers):
            own = windowed if self.slides(layer) else mask
            block = self.block(self, f"model.layers.{layer}", rotary, own, cache, prefix.layers[layer] if prefix else None)
            x = self.run_block(layer, block.forward, x)
        hidden = self.norm(x, "model.norm")
        del embedded
        return hidden

    def slides(self, layer: int) -> bool:
        """Whether a block needs a mask of its own, where causality alone does not say who sees whom."""
        window = self.arch.window(layer)
        return window is not None and self.sequence >= window and self.request.attention == "sdpa" and not self.habits.masked

    @property
    def block(self) -> type[Block]:
        """The class of a block."""
        return Block

    def norm(self, x: Sized, path: str) -> Sized:
        return (norms.gemma_norm if self.arch.norm_plus_one else norms.rms_norm)(self, x, path)

    def rotary(self, itemsize: int) -> Sized:
        """cos and sin, [T, hd] each."""
        return self.tape.new(2 * self.sequence * self.arch.head_dim, itemsize, "other")

    @property
    def caches(self) -> bool:
        """Whether training fills a cache of keys and values that attention does not work on."""
        return self.habits.caches and self.request.trains and not self.request.gradient_checkpointing

    def embed(self, ids: Sized) -> Sized:
        x = ops.embedding(self.tape, ids, self.weights["model.embed_tokens"])
        if self.arch.scaled_embedding:
            x = ops.elementwise(self.tape, "embedding scale", x)
        return with_prompt(self, x)


class Block:
    """LlamaDecoderLayer."""

    def __init__(
        self, model: TransformersLlama, path: str, rotary: Sized, mask: Sized | None, cache: list[Sized] | None, prefix: LayerPrefix | None
    ) -> None:
        self.model, self.tape, self.path, self.cache, self.prefix = model, model.tape, path, cache, prefix
        self.rotary, self.mask = rotary, mask

    def forward(self, x: Sized) -> Sized:
        normalised = self.model.norm(x, f"{self.path}.input_layernorm")
        attended = self.attention(normalised)
        del normalised
        x = ops.add(self.tape, "residual", x, attended)
        del attended
        normalised = self.model.norm(x, f"{self.path}.post_attention_layernorm")
        return ops.add(self.tape, "residual", x, self.mlp(normalised))

    def attention(self, x: Sized) -> Sized:
        q, k, v = (linear(self.model, x, f"{self.path}.self_attn.{name}_proj") for name in "qkv")
        if self.model.arch.qk_norm:
            q, k = (self.head_norm(tensor, name) for tensor, name in ((q, "q_norm"), (k, "k_norm")))
        table = self.model.rotary(q.itemsize) if self.model.habits.rotary_per_block else self.rotary
        q, k = rotary(self.tape, q, table), rotary(self.tape, k, table)
        if self.cache is not None:
            self.cache += [cached(k), cached(v)]
        if self.model.caches:
            self.model.hold(k, v)
        mask = self.mask
        if self.prefix is not None:
            k, v, mask = self.prefix.before(k, v)
        return linear(self.model, attention.attend(self.model, q, k, v, mask), f"{self.path}.self_attn.o_proj")

    def head_norm(self, x: Sized, name: str) -> Sized:
        return self.model.norm(x, f"{self.path}.self_attn.{name}")

    def mlp(self, x: Sized) -> Sized:
        tape, path = self.tape, f"{self.path}.mlp"
        gate = linear(self.model, x, f"{path}.gate_proj")
        if self.model.request.compile:
            return linear(self.model, self.fused_product(gate, linear(self.model, x, f"{path}.up_proj")), f"{path}.down_proj")
        gate = activate(tape, self.model.arch.activation, gate, self.model.autocast)
        product = ops.multiply(tape, "silu(gate) * up", gate, linear(self.model, x, f"{path}.up_proj"))
        del gate
        return linear(self.model, product, f"{path}.down_proj")

    def fused_product(self, gate: Sized, up: Sized) -> Sized:
        """Compiled: silu(gate) * up in one kernel that keeps gate and up; silu(gate) is made again in backward."""
        return self.tape.record("silu(gate) * up", [gate, up], lambda: self.tape.new(up.numel, up.itemsize), keeps=[gate, up])
