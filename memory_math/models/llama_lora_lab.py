"""What this project's own Llama, Mistral, Qwen2 and Qwen3 keep, call by call: lora_lab/models/llama.py and attention.py on the tape.

Rows are taken to be of one length, so that attention needs no mask but that of a window shorter than they are.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.llama import Llama
from ..request import Request
from ..tape import Ledger, Sized
from .attention_lora_lab import Scores, attend, attention_mask
from .causal_lora_lab import CausalLM
from .layers_lora_lab import gated, lora_linear, lora_linears, rms_norm, rotate
from .prompts_lora_lab import BlockPast

Masks = dict[int | None, Sized | None]


class LoraLabLlama(CausalLM):
    """LlamaForCausalLM and its kin in training mode, with labels."""

    arch: Llama

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        _check(self.arch)

    def decode(self, x: Sized, positions: Sized, mask: Sized | None, pasts: list[BlockPast]) -> Sized:
        """LlamaModel: a window's mask is one for all blocks that have it."""
        rotary = self.tape.new(self.sequence * self.arch.head_dim, 4, "other")  # cos and sin of half a head each, float32
        masks: Masks = {None: mask, **{window: attention_mask(self, window) for window in {*self.arch.windows} - {None}}}
        for layer, past in enumerate(pasts):
            block, own = Block(self, f"model.layers.{layer}", rotary, past), masks[self.arch.window(layer)]
            x = self.run_block(layer, block.forward, x, *([] if own is None else [own]))
        return rms_norm(self, x, "model.norm")


class Block:
    """LlamaDecoderLayer with its Attention and GatedMLP."""

    def __init__(self, model: LoraLabLlama, path: str, rotary: Sized, past: BlockPast) -> None:
        self.model, self.tape, self.path, self.rotary, self.past = model, model.tape, path, rotary, past

    def forward(self, x: Sized, mask: Sized | None = None) -> Sized:
        x = ops.add(self.tape, "residual", x, self.attention(self.norm(x, "input_layernorm"), mask))
        return ops.add(self.tape, "residual", x, self.mlp(self.norm(x, "post_attention_layernorm")))

    def norm(self, x: Sized, name: str) -> Sized:
        return rms_norm(self.model, x, f"{self.path}.{name}")

    def attention(self, x: Sized, mask: Sized | None) -> Sized:
        q, k, v = lora_linears(self.model, x, [f"{self.path}.self_attn.{name}_proj" for name in "qkv"])
        if self.model.arch.qk_norm:
            q, k = self.norm(q, "self_attn.q_norm"), self.norm(k, "self_attn.k_norm")
        angles = ops.cast(self.tape, self.rotary, q.itemsize)
        q, k = rotate(self.tape, q, angles), rotate(self.tape, k, angles)
        k, v = self.past.append(k, v)
        y = attend(self.model, q, k, v, Scores(mask))
        return lora_linear(self.model, y, f"{self.path}.self_attn.o_proj")

    def mlp(self, x: Sized) -> Sized:
        gate, up = lora_linears(self.model, x, [f"{self.path}.mlp.{name}_proj" for name in ("gate", "up")])
        product = gated(self.tape, "silu", gate, up)
        del gate, up
        return lora_linear(self.model, product, f"{self.path}.mlp.down_proj")


def _check(arch: Llama) -> None:
    """What of the family lora_lab has no code for."""
    if arch.norm_plus_one or arch.activation not in ("silu", "swish"):
        what = "Gemma" if arch.norm_plus_one else f"hidden_act={arch.activation!r}"
        raise MemoryMathError(f"{arch.name}: {what} is not modelled with implementation='lora_lab', whose Llamas have RMSNorm and silu")
