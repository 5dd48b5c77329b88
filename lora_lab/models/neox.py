"""GPT-NeoX, Pythia and Dolly, by hand: attention and MLP side by side, rotary positions on a part of each head.

    h = embed_in[ids]
    for each layer:  h = h + attention(norm(h)) + mlp(norm'(h))
    logits = lm_head(norm(h))

Black et al. 2022 (arXiv:2204.06745), section 2.1; Pythia: Biderman et al. 2023 (arXiv:2304.01373). `use_parallel_residual=false` puts
the halves one after the other, as in GPT-2. q, k and v come from one matrix, head by head. Module paths are those of transformers 5;
files call the head embed_out, as transformers' do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, activated, check_activation
from .attention import Mask, attend
from .cache import KVCache, LayerCache
from .causal import CausalLM, Decoder
from .config import check_config, check_heads, flags, shares
from .recompute import Recomputable, RecomputableCore
from .rotary import Rope


@dataclass(frozen=True)
class GPTNeoXConfig:
    """The fields of a config.json that shape the model; `source` keeps the whole file. rotary_pct: the part of each head that turns."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    rotary_pct: float
    rope: Rope
    hidden_dropout: float
    attention_dropout: float
    use_parallel_residual: bool
    attention_bias: bool
    tie_word_embeddings: bool
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    model_type: ClassVar[str] = "gpt_neox"

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> GPTNeoXConfig:
        """Read a Hugging Face config, of transformers 4 (`rotary_pct`, `rotary_emb_base`) or 5 (`rope_parameters`).

        Raises LoraLabError for a missing or unsupported field.
        """
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check_config(source, "GPT-NeoX", needed, ("max_position_embeddings",), "layer_norm_eps")
        check_heads(source["hidden_size"], source["num_attention_heads"])
        written = source.get("rope_parameters") or source.get("rope_scaling") or {}
        share = written.get("partial_rotary_factor", source.get("rotary_pct", 0.25)) if isinstance(written, dict) else 0.25
        turned = {**source, "rope_theta": source.get("rotary_emb_base", 10_000), "partial_rotary_factor": share}
        choices = {"use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False}
        return cls(**{name: source[name] for name in needed}, max_position_embeddings=source.get("max_position_embeddings", 2048),
                   hidden_act=check_activation(source.get("hidden_act", "gelu"), "hidden_act"), layer_norm_eps=source.get("layer_norm_eps", 1e-5),
                   rope=Rope.from_config(turned, source["hidden_size"] // source["num_attention_heads"], partial=True), rotary_pct=share,
                   **flags(source, choices), **shares(source, {"hidden_dropout": 0.0, "attention_dropout": 0.0}), source=source)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with, in the names that transformers 4 and 5 both read; what else its file said is kept."""
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("rope", "source")}
        kept = {name: value for name, value in self.source.items() if name not in ("rope_parameters", "rope_theta", "partial_rotary_factor")}
        rope = {"rotary_emb_base": self.rope.theta, "rope_scaling": self.rope.to_dict()["rope_scaling"]}
        return {**kept, **ours, **rope, "model_type": self.model_type, "architectures": ["GPTNeoXForCausalLM"]}


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first numbers of each head, twice as many as there are angles; the others stay. x: [B, T, N, D]. See `blocks.rotate`."""
    half = cos.shape[-1]
    left, right, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


class GPTNeoXAttention(RecomputableCore):
    """Every head attends with keys and values of its own. x: [B, T, H].  rotary: (cos, sin), each [B or 1, T, 1, angles]."""

    def __init__(self, c: GPTNeoXConfig, **factory: Any) -> None:
        super().__init__()
        self.heads, self.dropout = c.num_attention_heads, c.attention_dropout
        self.query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.attention_bias, **factory)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.attention_bias, **factory)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)  # [B, T, N, D]
        cos, sin = (angle.to(q.dtype) for angle in rotary)
        q, k, v = rotate_part(q, cos, sin), rotate_part(k, cos, sin), v.contiguous()  # a view of v would keep q and k alive, too
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, N, T, D]
        causal = layer_cache is None or layer_cache.length == 0  # else there is a mask, or one token that may look at all
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)
        return self.dense(attend(self, q, k, v, mask, causal=causal, dropout=self.dropout))


class GPTNeoXMLP(nn.Module):
    """``dense_4h_to_h(activation(dense_h_to_4h(x)))``: [..., H] -> [..., H]."""

    def __init__(self, c: GPTNeoXConfig, **factory: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, c.intermediate_size, **factory)
        self.dense_4h_to_h = nn.Linear(c.intermediate_size, c.hidden_size, **factory)
        self.activation = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(activated(self.activation, self.dense_h_to_4h(x)))


class GPTNeoXLayer(Recomputable):
    """``x + attention(norm(x)) + mlp(norm'(x))``, or the MLP after the attention; x: [B, T, H]."""

    def __init__(self, c: GPTNeoXConfig, **factory: Any) -> None:
        super().__init__()
        self.parallel = c.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)
        self.post_attention_dropout, self.post_mlp_dropout = nn.Dropout(c.hidden_dropout), nn.Dropout(c.hidden_dropout)
        self.attention = GPTNeoXAttention(c, **factory)
        self.mlp = GPTNeoXMLP(c, **factory)

    def compute(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        attended = x + self.post_attention_dropout(self.attention(self.input_layernorm(x), rotary, mask, layer_cache))
        return attended + self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(x if self.parallel else attended)))


class GPTNeoXModel(Decoder):
    """Embeddings to hidden states: [B, T, H] -> [B, T, H]."""

    def __init__(self, c: GPTNeoXConfig, **factory: Any) -> None:
        super().__init__(c)
        self.embed_in = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.emb_dropout = nn.Dropout(c.hidden_dropout)
        self.layers = nn.ModuleList(GPTNeoXLayer(c, **factory) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Tensor:
        rotary, x = self.config.rope(positions), self.emb_dropout(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache.layers[index] if cache is not None else None)
        return self.final_layer_norm(x)


class GPTNeoXForCausalLM(CausalLM):
    """GPT-NeoX with its language-model head. Arguments and outputs: see `CausalLM.forward`."""

    config_class: ClassVar[type[GPTNeoXConfig]] = GPTNeoXConfig
    decoder_class = GPTNeoXModel
    embedding_path: ClassVar[str] = "gpt_neox.embed_in"
    decoder_path: ClassVar[str] = "gpt_neox"
    config: GPTNeoXConfig

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Files call the head embed_out; old ones carry causal masks, too."""
        if name.endswith((".attention.bias", ".attention.masked_bias")):
            return None
        return super().rename("lm_head.weight" if name == "embed_out.weight" else name)

    @classmethod
    def stored_name(cls, name: str) -> str:
        return "embed_out.weight" if name == "lm_head.weight" else name
