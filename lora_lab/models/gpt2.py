"""GPT-2, by hand: learned positions, LayerNorm before each half of a block, one matrix for q, k and v.

    h = wte[ids] + wpe[positions]
    for each layer:  h = h + attention(ln_1(h));  h = h + mlp(ln_2(h))
    logits = ln_f(h) @ wte.T

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; the embedding is the head, too.
Linear layers are `Conv1D`s, whose weight is stored [in, out]. Module paths and parameter names are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from .activations import ACTIVATIONS, activated, check_activation
from .attention import Mask, attend
from .cache import KVCache, LayerCache
from .causal import CausalLM, Decoder
from .config import check_config, check_heads, flags, shares
from .recompute import Recomputable, RecomputableCore


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a config.json that shape the model, by the names all families share; `source` keeps the whole file.

    `reorder_and_upcast_attn` in a file asks for scores in float32, which is how attention is computed here in any case.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    activation_function: str
    layer_norm_epsilon: float
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    model_type: ClassVar[str] = "gpt2"
    names: ClassVar[dict[str, str]] = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
                                       "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}  # fmt: skip

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> GPT2Config:
        """Read a Hugging Face config, of transformers 4 or 5. Raises LoraLabError for a missing or unsupported field."""
        source = {"n_positions": 1024, **source}
        check_config(source, "GPT-2", ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"), ("n_inner",), "layer_norm_epsilon")
        check_heads(source["n_embd"], source["n_head"])
        if source.get("add_cross_attention"):
            raise LoraLabError("add_cross_attention=true: a GPT-2 that looks at an encoder, too, is not modelled here")
        choices = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
        sizes = {ours: source.get(theirs) for ours, theirs in cls.names.items()}
        return cls(**{**sizes, "intermediate_size": source.get("n_inner") or 4 * source["n_embd"]}, vocab_size=source["vocab_size"],
                   activation_function=check_activation(source.get("activation_function", "gelu_new"), "activation_function"),
                   layer_norm_epsilon=source.get("layer_norm_epsilon", 1e-5), **flags(source, choices),
                   **shares(source, dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)), source=source)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        ours = {self.names.get(each.name, each.name): getattr(self, each.name) for each in fields(self) if each.name != "source"}
        return {**self.source, **ours, "model_type": self.model_type, "architectures": ["GPT2LMHeadModel"]}


class Conv1D(nn.Module):
    """``x @ weight + bias``, [..., in] -> [..., out]: a linear layer whose weight is stored [in, out]. Named as in transformers."""

    def __init__(self, nf: int, nx: int, **factory: Any) -> None:
        """nf: out.  nx: in."""
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, **factory).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class GPT2Attention(RecomputableCore):
    """Every head attends with keys and values of its own. x: [B, T, H]."""

    def __init__(self, c: GPT2Config, layer: int, **factory: Any) -> None:
        super().__init__()
        self.heads, self.dropout = c.num_attention_heads, c.attn_pdrop
        self.scale = (c.hidden_size // c.num_attention_heads) ** -0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(3 * c.hidden_size, c.hidden_size, **factory)
        self.c_proj = Conv1D(c.hidden_size, c.hidden_size, **factory)
        self.resid_dropout = nn.Dropout(c.resid_pdrop)

    def forward(self, x: Tensor, mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))  # [B, N, T, D]
        causal = layer_cache is None or layer_cache.length == 0  # else there is a mask, or one token that may look at all
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)
        return self.resid_dropout(self.c_proj(attend(self, q, k, v, mask, causal=causal, scale=self.scale, dropout=self.dropout)))


class GPT2MLP(nn.Module):
    """``c_proj(activation(c_fc(x)))``: [..., H] -> [..., H]."""

    def __init__(self, c: GPT2Config, **factory: Any) -> None:
        super().__init__()
        self.c_fc = Conv1D(c.intermediate_size, c.hidden_size, **factory)
        self.c_proj = Conv1D(c.hidden_size, c.intermediate_size, **factory)
        self.activation, self.dropout = ACTIVATIONS[c.activation_function], nn.Dropout(c.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(activated(self.activation, self.c_fc(x))))


class GPT2Block(Recomputable):
    """``x + attention(ln_1(x))``, then ``x + mlp(ln_2(x))``; x: [B, T, H]."""

    def __init__(self, c: GPT2Config, layer: int, **factory: Any) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon, **factory)
        self.attn = GPT2Attention(c, layer, **factory)
        self.ln_2 = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon, **factory)
        self.mlp = GPT2MLP(c, **factory)

    def compute(self, x: Tensor, mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, layer_cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(Decoder):
    """Embeddings to hidden states: [B, T, H] -> [B, T, H]."""

    def __init__(self, c: GPT2Config, **factory: Any) -> None:
        super().__init__(c)
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.wpe = nn.Embedding(c.max_position_embeddings, c.hidden_size, **factory)
        self.drop = nn.Dropout(c.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(c, layer, **factory) for layer in range(c.num_hidden_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon, **factory)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Tensor:
        check_positions(positions, self.config.max_position_embeddings)
        x = self.drop(x + self.wpe(positions))
        for index, block in enumerate(self.h):
            x = block(x, mask, cache.layers[index] if cache is not None else None)
        return self.ln_f(x)


def check_positions(positions: Tensor, context: int) -> None:
    """Raise LoraLabError for a position that has no vector. On the CPU only: elsewhere looking would wait for the device."""
    if torch.compiler.is_compiling() or positions.device.type != "cpu":
        return
    outside = positions[(positions < 0) | (positions >= context)]
    if len(outside):
        raise LoraLabError(f"position {int(outside[0])} is outside the model's context of {context}, n_positions in config.json: shorten the input")


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with its language-model head. Arguments and outputs: see `CausalLM.forward`."""

    config_class: ClassVar[type[GPT2Config]] = GPT2Config
    decoder_class = GPT2Model
    embedding_path: ClassVar[str] = "transformer.wte"
    decoder_path: ClassVar[str] = "transformer"
    config: GPT2Config

    @classmethod
    def rename(cls, name: str) -> str | None:
        """The first checkpoints are of the decoder alone, and carry causal masks."""
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
