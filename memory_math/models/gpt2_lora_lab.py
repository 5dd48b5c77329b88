"""What this project's own GPT-2 keeps, call by call: lora_lab/models/gpt2.py on the tape."""

from __future__ import annotations

from .. import operations as ops
from ..families.gpt2 import GPT2
from ..operations import Weight
from ..tape import Sized
from .attention_lora_lab import Scores, attend
from .blocks import plus_positions, split
from .causal_lora_lab import CausalLM
from .gpt2 import upright
from .layers_lora_lab import activate, dropped, lora_linear
from .norms import layer_norm
from .prompts_lora_lab import BlockPast


class LoraLabGPT2(CausalLM):
    """GPT2LMHeadModel in training mode, with labels."""

    arch: GPT2
    embedding_path = "transformer.wte"
    linear_layers = False

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        return super()._weight(name, *upright(name, rows, columns), quantized)

    def decode(self, x: Sized, positions: Sized, mask: Sized | None, pasts: list[BlockPast]) -> Sized:
        """GPT2Model."""
        x = plus_positions(self, x, ops.embedding(self.tape, positions, self.weights["transformer.wpe"]))
        x = dropped(self, x, self.arch.embedding_dropout)
        for layer, past in enumerate(pasts):
            x = self.run_block(layer, Block(self, f"transformer.h.{layer}", past).forward, x, *([] if mask is None else [mask]))
        return layer_norm(self, x, "transformer.ln_f")


class Block:
    """GPT2Block with its GPT2Attention and GPT2MLP."""

    def __init__(self, model: LoraLabGPT2, path: str, past: BlockPast) -> None:
        self.model, self.tape, self.path, self.past = model, model.tape, path, past

    def forward(self, x: Sized, mask: Sized | None = None) -> Sized:
        x = ops.add(self.tape, "residual", x, self.attention(layer_norm(self.model, x, f"{self.path}.ln_1"), mask))
        return ops.add(self.tape, "residual", x, self.mlp(layer_norm(self.model, x, f"{self.path}.ln_2")))

    def attention(self, x: Sized, mask: Sized | None) -> Sized:
        """q, k and v are views of one tensor."""
        width = x.numel // self.model.arch.hidden * self.model.arch.query_width
        q, k, v = split(self.tape, lora_linear(self.model, x, f"{self.path}.attn.c_attn"), width, width, width)
        k, v = self.past.append(k, v)
        y = attend(self.model, q, k, v, Scores(mask, dropout=self.model.arch.attention_dropout))
        return dropped(self.model, lora_linear(self.model, y, f"{self.path}.attn.c_proj"), self.model.arch.dropout)

    def mlp(self, x: Sized) -> Sized:
        x = activate(self.model, lora_linear(self.model, x, f"{self.path}.mlp.c_fc"))
        return dropped(self.model, lora_linear(self.model, x, f"{self.path}.mlp.c_proj"), self.model.arch.dropout)
