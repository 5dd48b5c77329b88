"""Llama, by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv:2302.13971, section 2.2).

    h = embed_tokens[ids]
    for each layer:  h = h + attention(norm(h));  h = h + mlp(norm(h))
    logits = lm_head(norm(h))

Module paths and parameter names are transformers', so that checkpoints and adapters carry over. SmolLM2 is a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters import checkpoint_contexts
from ..errors import LoraLabError
from .base import CausalLMOutput, PretrainedModel, check_ids
from .blocks import IGNORE, Attention, GatedMLP, KVCache, LayerCache, RMSNorm, attention_mask, padding_cannot_matter
from .losses import next_token_loss
from .rotary import Rope


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that shape the model; `source` keeps the whole file."""

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
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config, of transformers 4 or 5. Raises LoraLabError for a missing or unsupported field."""
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in needed if name not in source]:
            raise LoraLabError(f"config.json lacks {', '.join(missing)}: a Llama cannot be built without")
        check_fields(source, (*needed, "num_key_value_heads", "head_dim", "max_position_embeddings"))
        if (activation := source.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise LoraLabError(f"hidden_act={activation!r}: expected 'silu', the gate of every released Llama")
        heads = source["num_attention_heads"]
        head_dim = source.get("head_dim") or source["hidden_size"] // heads
        kv_heads = source.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise LoraLabError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        shape = {name: source[name] for name in needed}
        return cls(**shape, num_key_value_heads=kv_heads, head_dim=head_dim,
                   rms_norm_eps=source.get("rms_norm_eps", 1e-6), max_position_embeddings=source.get("max_position_embeddings", 2048),
                   tie_word_embeddings=source.get("tie_word_embeddings", False), attention_bias=source.get("attention_bias", False),
                   mlp_bias=source.get("mlp_bias", False), rope=Rope.from_config(source, head_dim), source=source)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("rope", "source")}
        kept = {name: value for name, value in self.source.items() if name != "rope_parameters"}
        return {**kept, **ours, **self.rope.to_dict(), "hidden_act": "silu", "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def check_fields(source: dict[str, Any], whole_numbers: tuple[str, ...]) -> None:
    """Raise LoraLabError for a field of a config.json that has the wrong kind of value, or means what is not modelled here."""
    for name in whole_numbers:
        value = source.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise LoraLabError(f"{name}={value!r} in config.json: expected a whole number of at least 1")
    eps = source.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps < 0:
        raise LoraLabError(f"rms_norm_eps={eps!r} in config.json: expected a small positive number")
    if source.get("quantization_config"):
        raise LoraLabError("config.json has a quantization_config: quantised weights are not read here; load the original model")


class LlamaDecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; x: [B, T, H]."""

    def __init__(self, c: LlamaConfig, **factory: Any) -> None:
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias, **factory)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias, **factory)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer_cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Token ids to hidden states: [B, T] -> [B, T, H]."""

    gradient_checkpointing = False

    def __init__(self, c: LlamaConfig, **factory: Any) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.layers = nn.ModuleList(LlamaDecoderLayer(c, **factory) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)

    def forward(self, x: Tensor, padding: Tensor | None, positions: Tensor | None, cache: KVCache | None) -> Tensor:
        """x: embeddings [B, T, H].  padding: [B, S].  positions: [B or 1, T]; None counts on from the cache."""
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = attention_mask(padding, x.shape[0], x.shape[1], past, x.device)
        rotary = self.config.rope(positions)
        for index, layer in enumerate(self.layers):
            x = self._run(layer, x, rotary, mask, cache.layers[index] if cache is not None else None)
        return self.norm(x)

    def _run(self, layer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: LayerCache | None) -> Tensor:
        """Call a layer; with gradient checkpointing keep only its input, and recompute it in backward with the same adapters."""
        if not self.recomputes:
            return layer(x, rotary, mask, past)

        def run(x: Tensor) -> Tensor:  # twice: each run gets the past as it is now, and its additions are not kept
            return layer(x, rotary, mask, past.fork() if past is not None else None)

        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": lambda: checkpoint_contexts(layer)}
        return checkpoint(run, x, use_reentrant=False, **contexts)

    @property
    def recomputes(self) -> bool:
        """Is gradient checkpointing at work in a forward pass made now?"""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()


class LlamaForCausalLM(PretrainedModel):
    """Llama with its language-model head. Arguments and outputs are named as in transformers."""

    config_class = LlamaConfig
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.tie_weights()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, past_key_values: Any = None,
                use_cache: bool = False, logits_to_keep: int = 0) -> CausalLMOutput:  # fmt: skip
        """input_ids: [B, T] or inputs_embeds: [B, T, H].  attention_mask: [B, S], 1 for text.  position_ids: [B, T].

        labels: [B, T], -100 where none; shifted here, loss is the mean over the others. In training mode with labels `.logits` is
        None: only labelled positions are computed.  logits_to_keep: compute logits of the last so many positions only (0: all).
        Raises LoraLabError for both or neither of input_ids and inputs_embeds, shapes that differ, use_cache=True under gradient
        checkpointing, and on the CPU for an id outside the vocabulary (a GPU stops by itself).
        """
        x = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        self._check(x, attention_mask, position_ids, labels, cache)
        if self.training and labels is not None and padding_cannot_matter(attention_mask, labels):
            attention_mask = None
        hidden = self.model(x, attention_mask, position_ids, cache)
        loss = None if labels is None else next_token_loss(hidden, labels, self.lm_head)
        logits = self.lm_head(hidden[:, -logits_to_keep:]) if labels is None or not self.training else None
        return CausalLMOutput(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise LoraLabError("give either input_ids [B, T] or inputs_embeds [B, T, H], not both and not neither")
        if input_ids is None:
            return inputs_embeds  # type: ignore[return-value]
        embedding = self.get_input_embeddings()
        check_ids("input_ids", input_ids, len(embedding.weight))
        return embedding(input_ids)

    def _cache(self, past: Any, use_cache: bool) -> KVCache | None:
        if use_cache and self.model.recomputes:
            raise LoraLabError("use_cache=True under gradient checkpointing in training mode: the recompute would fill the cache twice")
        if past is None:
            return KVCache(self.config.num_hidden_layers) if use_cache else None
        return past if isinstance(past, KVCache) else KVCache(past)

    def _check(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, labels: Tensor | None, cache: KVCache | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size:
            raise LoraLabError(f"the input's embeddings are {list(x.shape)}, expected [B, T, {self.config.hidden_size}] from input_ids [B, T]")
        if cache is not None and len(cache) != self.config.num_hidden_layers:
            raise LoraLabError(f"past_key_values has {len(cache)} layers, the model has {self.config.num_hidden_layers}")
        batch, length, past = x.shape[0], x.shape[1], cache.length if cache is not None else 0
        for name, given, *shapes in (("attention_mask", attention_mask, [batch, past + length]), ("labels", labels, [batch, length]),
                                     ("position_ids", position_ids, [batch, length], [1, length])):  # fmt: skip
            if given is not None and list(given.shape) not in shapes:
                raise LoraLabError(f"{name} is {list(given.shape)}, expected {shapes[0]} (the input has {length} positions, the cache {past})")
        if labels is not None:
            check_ids("labels", labels, len(self.get_input_embeddings().weight), also=IGNORE)
