"""The key-value caches a prefix is put into: ours and transformers', of decoders, encoders and both together.

A prefix is keys and values that each attention finds already there, before its own of the text: a cache that does not begin empty.
transformers is never imported: where an object of its own is needed, its model has brought it along.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import PretrainedModel, is_encoder_decoder
from lora_lab.models.bert import BertPretrainedModel
from lora_lab.models.cache import EncoderDecoderCache, KVCache
from lora_lab.models.causal import CausalLM
from lora_lab.models.seq2seq import EncoderOutput, Seq2SeqLM, embedded
from lora_lab.models.t5 import relative_position_bucket

from .base_model import cache_length, text_config

Pairs = list[tuple[Tensor, Tensor]]  # of each layer keys and values, [B, N, S, D] each
PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class PrefixShape(NamedTuple):
    """Of a prefix without its length P. layers: with self-attention, of an encoder-decoder the encoder's, then the decoder's.

    heads: those that have a key and a value, fewer than there are queries under grouped queries.  head_dim: numbers in each.
    """

    layers: int
    heads: int
    head_dim: int

    @property
    def per_token(self) -> int:
        """Parameters for one virtual token.

        >>> PrefixShape(layers=30, heads=3, head_dim=64).per_token  # SmolLM2-135M
        11520
        """
        return self.layers * 2 * self.heads * self.head_dim


def prefix_shape(base: nn.Module) -> PrefixShape:
    """What a prefix for this model is made of, from its config. Raises LoraLabError for a model that cannot have one."""
    refuse_base(base)
    config = text_config(base)
    if is_encoder_decoder(base):
        return PrefixShape(config.num_layers + config.num_decoder_layers, config.num_heads, config.d_kv)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PrefixShape(config.num_hidden_layers, _key_heads(base), head_dim)


def _key_heads(base: nn.Module) -> int:
    """Heads in the cache. transformers' Falcon repeats the keys of its new decoder for every query before they go there."""
    config = text_config(base)
    new_falcon, theirs = getattr(config, "new_decoder_architecture", False), not isinstance(base, PretrainedModel)
    if new_falcon and theirs:
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False) and not new_falcon:
        return 1
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return int(groups or config.num_attention_heads)


# What cannot have a prefix ------------------------------------------------------------------------------------------------------


def refuse_base(base: nn.Module) -> None:
    """Raise LoraLabError for a model whose attention has no place for keys and values from outside, or not the same in all layers."""
    config, kind = text_config(base), type(base).__name__
    ways_out = "method='prompt' or 'residual' puts rows before the text instead"
    if not isinstance(base, (CausalLM, Seq2SeqLM, BertPretrainedModel)) and not from_transformers(base):
        raise LoraLabError(f"a {kind} can have no prefix: expected a model of lora_lab.models or transformers that has a cache; {ways_out}")
    if is_encoder_decoder(base) and (getattr(config, "model_type", "t5") not in ("t5", "mt5") or not hasattr(base, "shared")):
        raise LoraLabError(f"a {kind} can have no prefix here: of encoder-decoders only T5 and mT5 can; {ways_out}")
    if from_transformers(base) and "past_key_values" not in inspect.signature(getattr(base, "base_model", base).forward).parameters:
        raise LoraLabError(f"a {kind} takes no past_key_values, which is where a prefix goes; {ways_out}")
    odd = {name for name in ("kv_lora_rank", "num_kv_shared_layers", "global_head_dim") if getattr(config, name, None)}
    odd |= {*(getattr(config, "layer_types", None) or [])} - PLAIN_LAYERS
    odd |= {"head_dim", "num_key_value_heads", "num_attention_heads"} & (getattr(config, "per_layer_attributes", None) or set())
    if odd:
        raise LoraLabError(f"a {kind} with {', '.join(sorted(odd))} has layers without keys and values of one shape: no prefix fits all; {ways_out}")
    if len({*(getattr(base, "hf_device_map", None) or {}).values()}) > 1:
        raise LoraLabError(f"a {kind} divided among devices (device_map): a prefix lies on one of them, and its layers on several; {ways_out}")


def refuse_dropped(base: nn.Module) -> None:
    """Raise LoraLabError where transformers' checkpointing would take the cache, and so the prefix, away from its layers."""
    if from_transformers(base) and torch.is_grad_enabled() and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise LoraLabError("a prefix under transformers' gradient checkpointing, which runs its layers without a cache and so without the prefix: "
                           "call gradient_checkpointing_disable(), load the model with lora_lab.models.load, whose checkpointing keeps the "
                           "cache, or use method='prompt' or 'residual'")  # fmt: skip


def from_transformers(base: nn.Module) -> bool:
    return not isinstance(base, PretrainedModel) and any(each.__module__.partition(".")[0] == "transformers" for each in type(base).__mro__)


def looks_both_ways(base: nn.Module) -> bool:
    """Is this an encoder, whose every position sees all others?"""
    if isinstance(base, PretrainedModel):
        return isinstance(base, BertPretrainedModel)
    return not next((module.is_causal for module in base.modules() if hasattr(module, "is_causal")), True)


# Caches -------------------------------------------------------------------------------------------------------------------------


def new_cache(base: nn.Module, layers: int) -> Any:
    """Without anything in it. transformers' keeps all it is given: told of a sliding window, it would drop what the window has passed."""
    if isinstance(base, PretrainedModel):
        return (EncoderDecoderCache if is_encoder_decoder(base) else KVCache)(layers)
    theirs: Any = sys.modules["transformers"]
    cache = theirs.DynamicCache()
    return theirs.EncoderDecoderCache(cache, theirs.DynamicCache()) if is_encoder_decoder(base) else cache


def fill(cache: Any, pairs: Pairs) -> Any:
    """The same cache, these keys and values at its end."""
    own = getattr(cache, "self_attention_cache", cache)
    for index, (keys, values) in enumerate(pairs):
        if isinstance(own, KVCache):
            own.layers[index].append(keys, values)
        else:
            own.update(keys, values, index)
    return cache


def pairs_of(cache: Any) -> Pairs:
    """Keys and values of self-attention, layer by layer."""
    own = getattr(cache, "self_attention_cache", cache)
    return [(each[0], each[1]) for each in own]


# T5's encoder -------------------------------------------------------------------------------------------------------------------


def encode(base: nn.Module, inputs: dict[str, Any], cache: Any, prefix_mask: Tensor | None) -> Any:
    """What a T5's encoder makes of input_ids or inputs_embeds where its layers find this cache; it is filled up with the text's own.

    prefix_mask: [B, P], 1 where a row has a prefix; None where the cache is empty, or all of it is seen.
    """
    mask = inputs.get("attention_mask")
    if isinstance(base, Seq2SeqLM):
        x = embedded(base.get_input_embeddings(), inputs.get("input_ids"), inputs.get("inputs_embeds"))
        return EncoderOutput(base.encode(x, extended(mask, prefix_mask, x, cache_length(cache)), cache))
    wanted = ("input_ids", "inputs_embeds", "attention_mask", "output_attentions", "output_hidden_states")
    given = next(inputs[name] for name in wanted[:2] if inputs.get(name) is not None)
    with _looking_at(base, cache.self_attention_cache, extended(mask, prefix_mask, given, cache_length(cache))):
        return base.get_encoder()(**{name: inputs[name] for name in wanted if inputs.get(name) is not None})  # type: ignore[operator]


def extended(mask: Tensor | None, prefix_mask: Tensor | None, x: Tensor, past: int) -> Tensor | None:
    """The mask of prefix and text, [B, P + T]; None where all is seen. x: the text, [B, T, ...]."""
    if mask is None and prefix_mask is None:
        return None
    mask = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask
    before = mask.new_ones(len(x), past) if prefix_mask is None else prefix_mask.to(mask.dtype)
    return torch.cat((before, mask), dim=1)


@contextlib.contextmanager
def _looking_at(base: nn.Module, cache: Any, whole: Tensor | None) -> Iterator[None]:
    """Give the self-attention of each of the encoder's layers a cache: it knows what to do with one, only its encoder has none to give.

    A hook on each, for one call. whole: the mask of cache and text, [B, P + T], or None for all. The first layer makes the relative positions
    of all of them, by columns; where there is a mask it is given ours, of text.
    """

    def hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = {**kwargs, "past_key_values": cache}
        if whole is not None:
            changed["mask"] = _additive(whole, args[0].dtype)
            if changed.get("position_bias") is None:
                changed["position_bias"] = _position_bias(attention, whole, args[0].shape[1])
        return args, changed

    blocks = base.get_encoder().block  # type: ignore[operator]
    handles = [block.layer[0].SelfAttention.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _additive(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, P + T] -> [B, 1, 1, P + T], 0 where it is 1 and next to minus infinity where not, which every kind of attention takes."""
    return torch.zeros_like(whole, dtype=dtype).masked_fill(whole == 0, torch.finfo(dtype).min)[:, None, None, :]


def _position_bias(attention: Any, whole: Tensor, length: int) -> Tensor:
    """T5's numbers for the distances between text and what it looks at, [B, N, T, P + T]; padding between is no distance."""
    places = whole.long().cumsum(1)
    buckets = relative_position_bucket(places[:, None, :] - places[:, -length:, None], bidirectional=True,
                                       buckets=attention.relative_attention_num_buckets,
                                       max_distance=attention.relative_attention_max_distance)  # fmt: skip
    bias: Tensor = attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
    return bias
