"""Llama and its kin, by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    h = embed_tokens[ids]
    for each layer:  h = h + attention(norm(h));  h = h + mlp(norm(h))
    logits = lm_head(norm(h))

Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2), of which SmolLM2 is one; Mistral looks back a window only (Jiang et al. 2023,
arXiv:2310.06825); Qwen2 has biases in q, k and v (arXiv:2407.10671); Qwen3 norms each head of q and k instead (arXiv:2505.09388).
Module paths and parameter names are transformers', so that checkpoints and adapters carry over.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import LoraLabError
from .attention import Attention, Documents, Mask, attention_mask
from .blocks import GatedMLP, RMSNorm
from .cache import KVCache, LayerCache
from .causal import CausalLM, Decoder
from .config import check_config, flags, shares
from .recompute import Recomputable
from .rotary import Rope


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that shape the model; `source` keeps the whole file. windows: of each layer, None where it sees everything."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope
    attention_dropout: float = 0.0
    windows: tuple[int | None, ...] = ()
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    family: ClassVar[str] = "Llama"
    defaults: ClassVar[dict[str, Any]] = {}
    out_bias: ClassVar[bool | None] = None  # of o_proj; None: as q, k and v
    qk_norm: ClassVar[bool] = False
    written: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")  # fields that only some of the families have

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config, of transformers 4 or 5. Raises LoraLabError for a missing or unsupported field."""
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_config(source, cls.family, needed, ("num_key_value_heads", "head_dim", "max_position_embeddings"))
        check_config(given := {**cls.defaults, **source}, cls.family, (), ("sliding_window",))
        if (activation := source.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise LoraLabError(f"hidden_act={activation!r}: expected 'silu', the gate of every released {cls.family}")
        given |= flags(given, {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}) | shares(given, {"attention_dropout": 0.0})
        heads = source["num_attention_heads"]
        head_dim = given.get("head_dim") or source["hidden_size"] // heads
        kv_heads = given.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise LoraLabError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        shape = {name: source[name] for name in needed}
        return cls(**shape, num_key_value_heads=kv_heads, head_dim=head_dim,
                   rms_norm_eps=given.get("rms_norm_eps", 1e-6), max_position_embeddings=given.get("max_position_embeddings", 2048),
                   tie_word_embeddings=given["tie_word_embeddings"], attention_bias=given["attention_bias"],
                   mlp_bias=given["mlp_bias"], attention_dropout=given["attention_dropout"],
                   rope=Rope.from_config(given, head_dim), windows=cls.windows_of(given),
                   source=source)  # fmt: skip

    @classmethod
    def windows_of(cls, given: dict[str, Any]) -> tuple[int | None, ...]:
        return (None,) * given["num_hidden_layers"]

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        apart = {"rope", "source", "windows", *LlamaConfig.written} - set(self.written)
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in apart}
        kept = {name: value for name, value in self.source.items() if name != "rope_parameters"}
        names = {"model_type": self.family.lower(), "architectures": [f"{self.family}ForCausalLM"]}
        return {**kept, **ours, **self.rope.to_dict(), "hidden_act": "silu", **names}


def layer_windows(given: dict[str, Any], window: int | None) -> tuple[int | None, ...]:
    """layer_types says which layers have the window (transformers 5); before, Qwen's were those from max_window_layers on."""
    count, kinds = given["num_hidden_layers"], given.get("layer_types")
    if kinds is None:
        if isinstance(first := given.get("max_window_layers", 0), bool) or not isinstance(first, int):
            raise LoraLabError(f"max_window_layers={first!r} in config.json: expected the number of the first layer with a window")
        return tuple(window if layer >= first else None for layer in range(count))
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
        raise LoraLabError(f"layer_types={kinds!r} in config.json: expected 'full_attention' or 'sliding_attention' for each of {count} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    family = "Mistral"
    defaults: ClassVar[dict[str, Any]] = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
    written: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def windows_of(cls, given: dict[str, Any]) -> tuple[int | None, ...]:
        return (given["sliding_window"],) * given["num_hidden_layers"]


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    family = "Qwen2"
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 32, "max_position_embeddings": 32_768, "attention_bias": True, "max_window_layers": 28,
    }  # fmt: skip
    out_bias: ClassVar[bool | None] = False
    written: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def windows_of(cls, given: dict[str, Any]) -> tuple[int | None, ...]:
        window = given.get("sliding_window", 4096) if given.get("use_sliding_window") else None
        return layer_windows(given, window)


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    family = "Qwen3"
    defaults: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "head_dim": 128, "max_window_layers": 28}
    out_bias: ClassVar[bool | None] = None
    qk_norm: ClassVar[bool] = True
    written: ClassVar[tuple[str, ...]] = ("attention_bias",)


class LlamaDecoderLayer(Recomputable):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; x: [B, T, H]."""

    def __init__(self, c: LlamaConfig, window: int | None, **factory: Any) -> None:
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias, out_bias=c.out_bias,
                                   qk_norm=c.rms_norm_eps if c.qk_norm else None, window=window, dropout=c.attention_dropout, **factory)  # fmt: skip
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias, **factory)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)

    def compute(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(Decoder):
    """Embeddings to hidden states: [B, T, H] -> [B, T, H]."""

    def __init__(self, c: LlamaConfig, **factory: Any) -> None:
        super().__init__(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.layers = nn.ModuleList(LlamaDecoderLayer(c, window, **factory) for window in c.windows)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Tensor:
        rotary = self.config.rope(positions)
        masks = {None: mask, **{window: self._within(window, x, mask, cache, padding) for window in {*self.config.windows} - {None}}}
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, masks[self.config.windows[index]], cache.layers[index] if cache is not None else None)
        return self.norm(x)

    def _within(self, window: Any, x: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Mask:
        """The mask of the layers with this window; each document of a packed row has its own."""
        if isinstance(mask, Documents):
            return mask
        return attention_mask(padding, x.shape[0], x.shape[1], cache.length if cache is not None else 0, x.device, window)


class LlamaForCausalLM(CausalLM):
    """Llama with its language-model head. Arguments and outputs: see `CausalLM.forward`."""

    config_class: ClassVar[type[LlamaConfig]] = LlamaConfig
    decoder_class = LlamaModel
    config: LlamaConfig


class MistralForCausalLM(LlamaForCausalLM):
    config_class = MistralConfig


class Qwen2ForCausalLM(LlamaForCausalLM):
    config_class = Qwen2Config


class Qwen3ForCausalLM(LlamaForCausalLM):
    config_class = Qwen3Config
