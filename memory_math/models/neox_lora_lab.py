"""What this project's own GPT-NeoX and Pythia keep, call by call: lora_lab/models/neox.py on the tape."""

from __future__ import annotations

from .. import operations as ops
from ..families.neox import NeoX
from ..tape import Sized
from .attention_lora_lab import Scores, attend
from .blocks import split
from .causal_lora_lab import CausalLM
from .layers_lora_lab import activate, dropped, lora_linear, rotate
from .norms import layer_norm
from .prompts_lora_lab import BlockPast


class LoraLabNeoX(CausalLM):
    """GPTNeoXForCausalLM in training mode, with labels."""

    arch: NeoX
    embedding_path = "gpt_neox.embed_in"

    def decode(self, x: Sized, positions: Sized, mask: Sized | None, pasts: list[BlockPast]) -> Sized:
        """GPTNeoXModel."""
        rotary = self.tape.new(self.sequence * self.arch.rotary_width, 4, "other")  # cos and sin of half of what turns each, float32
        x = dropped(self, x, self.arch.dropout)
        for layer, past in enumerate(pasts):
            x = self.run_block(layer, Block(self, f"gpt_neox.layers.{layer}", rotary, past).forward, x, *([] if mask is None else [mask]))
        return layer_norm(self, x, "gpt_neox.final_layer_norm")


class Block:
    """GPTNeoXLayer with its GPTNeoXAttention and GPTNeoXMLP."""

    def __init__(self, model: LoraLabNeoX, path: str, rotary: Sized, past: BlockPast) -> None:
        self.model, self.tape, self.path, self.rotary, self.past = model, model.tape, path, rotary, past

    def forward(self, x: Sized, mask: Sized | None = None) -> Sized:
        attended = ops.add(self.tape, "residual", x, self.dropped(self.attention(self.norm(x, "input_layernorm"), mask)))
        fed = self.mlp(self.norm(x if self.model.arch.parallel_residual else attended, "post_attention_layernorm"))
        return ops.add(self.tape, "residual", attended, self.dropped(fed))

    def norm(self, x: Sized, name: str) -> Sized:
        return layer_norm(self.model, x, f"{self.path}.{name}")

    def dropped(self, x: Sized) -> Sized:
        return dropped(self.model, x, self.model.arch.dropout)

    def attention(self, x: Sized, mask: Sized | None) -> Sized:
        """q and k are turned into new tensors and v is copied, so that the fused one goes."""
        width = x.numel // self.model.arch.hidden * self.model.arch.query_width
        q, k, v = split(self.tape, lora_linear(self.model, x, f"{self.path}.attention.query_key_value"), width, width, width)
        angles = ops.cast(self.tape, self.rotary, q.itemsize)
        q, k, v = rotate(self.tape, q, angles), rotate(self.tape, k, angles), ops.copy(self.tape, "value", v)
        k, v = self.past.append(k, v)
        y = attend(self.model, q, k, v, Scores(mask, dropout=self.model.arch.attention_dropout))
        return lora_linear(self.model, y, f"{self.path}.attention.dense")

    def mlp(self, x: Sized) -> Sized:
        x = activate(self.model, lora_linear(self.model, x, f"{self.path}.mlp.dense_h_to_4h"))
        return lora_linear(self.model, x, f"{self.path}.mlp.dense_4h_to_h")
