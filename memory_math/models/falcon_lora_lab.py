"""What this project's own Falcon keeps, call by call: lora_lab/models/falcon.py on the tape; 7B, 40B and, with ALiBi, rw."""

from __future__ import annotations

from .. import operations as ops
from ..families.falcon import Falcon
from ..tape import Sized
from .attention_lora_lab import Scores, attend
from .blocks import split
from .causal_lora_lab import CausalLM
from .layers_lora_lab import activate, dropped, lora_linear, rotate
from .norms import layer_norm
from .prompts_lora_lab import BlockPast

COLUMNS = 8  # lora_lab.models.falcon.COLUMNS, held equal by a test


class LoraLabFalcon(CausalLM):
    """FalconForCausalLM in training mode, with labels."""

    arch: Falcon
    embedding_path = "transformer.word_embeddings"

    def decode(self, x: Sized, positions: Sized, mask: Sized | None, pasts: list[BlockPast]) -> Sized:
        """FalconModel: angles of half a head each, or ALiBi's columns of k, [1, a, T, COLUMNS] in bfloat16."""
        total = self.request.prefix + self.sequence
        alibi = self.tape.new(self.arch.heads * total * COLUMNS, 2, "other") if self.arch.alibi else None
        rotary = self.tape.new(self.sequence * self.arch.head_dim, 4, "other") if alibi is None else None
        given = [tensor for tensor in (alibi, mask) if tensor is not None]
        for layer, past in enumerate(pasts):
            x = self.run_block(layer, Block(self, f"transformer.h.{layer}", rotary, past).forward, x, *given)
        return layer_norm(self, x, "transformer.ln_f")


class Block:
    """FalconDecoderLayer with its FalconAttention and FalconMLP."""

    def __init__(self, model: LoraLabFalcon, path: str, rotary: Sized | None, past: BlockPast) -> None:
        self.model, self.tape, self.arch, self.path, self.rotary, self.past = model, model.tape, model.arch, path, rotary, past

    def forward(self, x: Sized, *given: Sized) -> Sized:
        """given: ALiBi's columns where there are some, then a mask where there is one."""
        names = self.arch.block_norms
        normed = self.norm(x, names[0])
        y = self.attention(normed, *([None] if self.rotary is not None else []), *given)
        if self.arch.parallel_attention:
            fed = self.mlp(self.norm(x, names[1]) if len(names) > 1 else normed)
            fed = ops.add(self.tape, "residual", fed, y)
            return ops.add(self.tape, "residual", x, dropped(self.model, fed, self.arch.dropout))
        x = ops.add(self.tape, "residual", x, dropped(self.model, y, self.arch.attention_dropout))
        return ops.add(self.tape, "residual", x, dropped(self.model, self.mlp(self.norm(x, names[1])), self.arch.dropout))

    def norm(self, x: Sized, name: str) -> Sized:
        """Under autocast in 16 bit."""
        y = layer_norm(self.model, x, f"{self.path}.{name}")
        return ops.cast(self.tape, y, self.model.autocast or x.itemsize)

    def attention(self, x: Sized, alibi: Sized | None, mask: Sized | None = None) -> Sized:
        tokens, arch = self.model.tokens, self.arch
        fused = lora_linear(self.model, x, f"{self.path}.self_attention.query_key_value")
        q, k, v = split(self.tape, fused, tokens * arch.query_width, tokens * arch.kv_width, tokens * arch.kv_width)
        del fused
        if self.rotary is not None:
            angles = ops.cast(self.tape, self.rotary, q.itemsize)
            q, k, v = rotate(self.tape, q, angles), rotate(self.tape, k, angles), ops.copy(self.tape, "value", v)
        k, v = self.past.append(k, v)
        y = attend(self.model, q, k, v, Scores(mask)) if alibi is None else self.attend_with_alibi(q, k, v, alibi, mask)
        return lora_linear(self.model, y, f"{self.path}.self_attention.dense")

    def attend_with_alibi(self, q: Sized, k: Sized, v: Sized, alibi: Sized, mask: Sized | None) -> Sized:
        """Every head gets COLUMNS more, in new tensors that lie head by head; the mixed values are copied out of theirs."""
        tape, arch, width = self.tape, self.arch, q.numel
        if arch.kv_heads < arch.heads:
            repeated = k.numel // arch.kv_heads * arch.heads
            k, v = ops.copy(tape, "repeat", k, repeated), ops.copy(tape, "repeat", v, repeated)
        columns = ops.cast(tape, alibi, k.itemsize)
        q, v = (ops.copy(tape, "alibi", tensor, self.widened(tensor)) for tensor in (q, v))
        wide, itemsize = self.widened(k), k.itemsize
        k = tape.record("alibi", [k], lambda: tape.new(wide, itemsize), passes=True)  # torch.cat, whose backward hands out a view
        del columns
        given = Scores(mask, dropout=arch.attention_dropout, head_dim=arch.head_dim + COLUMNS, kv_heads=arch.heads, in_order=True)
        return ops.copy(tape, "alibi", attend(self.model, q, k, v, given), width)

    def widened(self, x: Sized) -> int:
        """Numbers of x with COLUMNS more in each head."""
        return x.numel // self.arch.head_dim * (self.arch.head_dim + COLUMNS)

    def mlp(self, x: Sized) -> Sized:
        x = activate(self.model, lora_linear(self.model, x, f"{self.path}.mlp.dense_h_to_4h"))
        return lora_linear(self.model, x, f"{self.path}.mlp.dense_4h_to_h")
