"""Llama and what is built like it: RMSNorm, rotary positions, grouped-query attention, a gated MLP; Mixtral with experts in its place.

    V h (twice where the head is not tied) + L (2 h q + 2 h kv + 3 h f + 2 h) + h,    q = a hd, kv = kv_heads hd

Source: transformers 5.23, modeling_llama.py and those of mistral, qwen2, qwen3, gemma, mixtral.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import MemoryMathError
from .base import Architecture, LinearLayer, Tensor, linear, matrix, norm
from .fields import Fields

KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "mixtral": 8}  # what a config that leaves the field out stands for
MOST_EXPERTS = 4096  # with transformers 4's layers they are gone through one by one
HEAD_DIM = {"qwen3": 128, "gemma": 256}


@dataclass(frozen=True)
class Llama(Architecture):
    """Llama 1 to 3, Mistral, Qwen 2 and 3, Gemma 1.

    attention_bias: on q, k, v and o. qkv_bias: on q, k and v only (Qwen 2). qk_norm: RMSNorm over each head of q and k (Qwen 3).
    norm_plus_one: norms multiply by 1 + weight, scaled_embedding: by sqrt(h) (both Gemma). windows: of each block, the positions it looks back
    at, its own included; None where that is all (Mistral, Qwen).
    """

    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    scaled_embedding: bool = False
    windows: tuple[int | None, ...] = ()

    family: ClassVar[str] = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3", "gemma")
    class_names: ClassVar[tuple[str, ...]] = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> Llama:
        kind = fields.text("model_type", "llama")
        heads = fields.whole("num_attention_heads", "the query heads")
        hidden = fields.whole("hidden_size", "the width of the residual stream")
        gemma = kind == "gemma"
        return cls(
            fields.name,
            vocabulary=fields.whole("vocab_size", "the rows of the embedding"),
            hidden=hidden,
            layers=fields.whole("num_hidden_layers", "the number of blocks"),
            heads=heads,
            kv_heads=_kv_heads(fields, kind, heads),
            head_dim=_head_dim(fields, kind, hidden, heads),
            mlp_width=fields.whole("intermediate_size", "the width of the MLP"),
            tied=fields.flag("tie_word_embeddings", gemma),
            task=task,
            labels=labels,
            activation=fields.text("hidden_act", "gelu_pytorch_tanh" if gemma else "silu"),
            attention_dropout=fields.share("attention_dropout", 0.0),
            attention_bias=kind in ("llama", "qwen3", "gemma") and fields.flag("attention_bias", False),
            qkv_bias=kind == "qwen2",
            mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            norm_plus_one=gemma,
            scaled_embedding=gemma,
            windows=_windows(fields, kind, fields.whole("num_hidden_layers", "the number of blocks")),
        )

    def window(self, layer: int) -> int | None:
        """The positions that a block looks back at; None for all."""
        return self.windows[layer] if layer < len(self.windows) else None

    def body(self) -> Iterator[Tensor]:
        yield matrix(f"{self.root}embed_tokens.weight", self.vocabulary, self.hidden, "embedding")
        for path in (f"{self.root}layers.{layer}" for layer in range(self.layers)):
            yield from self.attention(f"{path}.self_attn")
            yield from self.mlp(f"{path}.mlp")
            yield from norm(f"{path}.input_layernorm", self.hidden)
            yield from norm(f"{path}.post_attention_layernorm", self.hidden)
        yield from norm(f"{self.root}norm", self.hidden)

    def attention(self, path: str) -> Iterator[Tensor]:
        h, q, kv = self.hidden, self.query_width, self.kv_width
        bias = self.attention_bias or self.qkv_bias
        for part, width in (("q", q), ("k", kv), ("v", kv)):
            yield from linear(f"{path}.{part}_proj", h, {part: width}, bias)
        yield from linear(f"{path}.o_proj", q, {"o": h}, self.attention_bias)
        if self.qk_norm:
            yield from norm(f"{path}.q_norm", self.head_dim)
            yield from norm(f"{path}.k_norm", self.head_dim)

    def mlp(self, path: str) -> Iterator[Tensor]:
        h, f = self.hidden, self.mlp_width
        for part, inputs, outputs in (("gate", h, f), ("up", h, f), ("down", f, h)):
            yield from linear(f"{path}.{part}_proj", inputs, {part: outputs}, self.mlp_bias)


@dataclass(frozen=True)
class Mixtral(Llama):
    """A Mistral with `experts` gated MLPs in each block, of which a router gives every token to `experts_per_token`.

    The experts are one stack of weights each for gate and up together and for down, and no linear layers. PEFT's "all-linear" adapts them all the
    same, and the router: it carries on as with the linear layers that transformers 4 had (`linear_experts`).
    """

    experts: int = 8
    experts_per_token: int = 2
    linear_experts: bool = False

    family: ClassVar[str] = "mixtral"
    model_types: ClassVar[tuple[str, ...]] = ("mixtral",)
    class_names: ClassVar[tuple[str, ...]] = ("Mixtral",)

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> Mixtral:
        experts = fields.whole("num_local_experts|num_experts", "the experts of a block", 8)
        chosen = fields.whole("num_experts_per_tok", "the experts of a token", 2)
        if experts > MOST_EXPERTS:
            raise MemoryMathError(f"{fields.name}: {experts:,} experts in a block: expected {MOST_EXPERTS} at most")
        return cls(**{**vars(Llama.read(fields, task, labels)), "experts": experts, "experts_per_token": chosen})

    def of_transformers_4(self) -> Mixtral:
        return replace(self, linear_experts=True)

    def mlp(self, path: str) -> Iterator[Tensor]:
        E, h, f = self.experts, self.hidden, self.mlp_width
        if self.linear_experts:
            path = f"{path.removesuffix('mlp')}block_sparse_moe"
            yield from linear(f"{path}.gate", h, {"router": E})
            for number in range(E):
                for name, inputs, outputs in (("w1", h, f), ("w2", f, h), ("w3", h, f)):
                    yield from linear(f"{path}.experts.{number}.{name}", inputs, {"experts": outputs})
            return
        yield matrix(f"{path}.gate.weight", E, h, "router")
        yield matrix(f"{path}.experts.gate_up_proj", E * 2 * f, h, "experts")
        yield matrix(f"{path}.experts.down_proj", E * h, f, "experts")

    def beside_linears(self) -> tuple[LinearLayer, ...]:
        """Router and experts, by the sizes of one expert."""
        if self.linear_experts:
            return ()
        h, f = self.hidden, self.mlp_width
        return tuple(
            LinearLayer(f"{self.root}layers.{layer}.mlp.{name}", inputs, outputs)
            for layer in range(self.layers)
            for name, inputs, outputs in (("gate", h, self.experts), ("experts.gate_up_proj", h, 2 * f), ("experts.down_proj", f, h))
        )


def _kv_heads(fields: Fields, kind: str, heads: int) -> int:
    """As many as query heads where the field is null, or where the class has no default of its own."""
    default = heads if "num_key_value_heads" in fields.config else KV_HEADS.get(kind, heads)
    kv_heads = fields.whole("num_key_value_heads", "the key/value heads", default)
    fields.split(heads, kv_heads, "num_attention_heads, num_key_value_heads and head_dim")
    return kv_heads


def _head_dim(fields: Fields, kind: str, hidden: int, heads: int) -> int:
    if fields.has("head_dim") or kind in HEAD_DIM:
        return fields.whole("head_dim", "the width of one head", HEAD_DIM.get(kind))
    return fields.split(hidden, heads, "num_attention_heads, num_key_value_heads and head_dim")


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int | None, ...]:
    """Mistral's blocks have sliding_window, all of them; Qwen's where use_sliding_window is set, those that layer_types names or, in files of
    transformers 4, those from max_window_layers on."""
    switched = kind == "mistral" or (kind in ("qwen2", "qwen3") and fields.flag("use_sliding_window", False))
    if not switched or ("sliding_window" in fields.config and not fields.has("sliding_window")):
        return (None,) * layers
    window = fields.whole("sliding_window", "the positions that a block looks back at", 4096)
    kinds, first = fields.config.get("layer_types"), 0 if kind == "mistral" else fields.whole("max_window_layers", "the blocks without", 28, least=0)
    if kind != "mistral" and isinstance(kinds, (list, tuple)):
        return tuple(window if name == "sliding_attention" else None for name in kinds)
    return tuple(window if layer >= first else None for layer in range(layers))
