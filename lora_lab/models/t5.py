"""T5, by hand: an encoder and a decoder, RMSNorm, no biases, and positions that are numbers added to the attention scores.

    encoder, each block:   x = x + attention(norm(x));  x = x + mlp(norm(x))
    decoder, each block:   x = x + attention(norm(x));  x = x + attention(norm(x), encoded);  x = x + mlp(norm(x))
    scores = q k^T + bias[bucket(key - query)]          no division by sqrt(d_kv): the first values of q allow for it

Raffel et al. 2020 (arXiv:1910.10683), section 2.1; version 1.1 and FLAN-T5 have a gated MLP (Shazeer 2020, arXiv:2002.05202) and a
head of their own; mT5 (Xue et al. 2021, arXiv:2010.11934) is version 1.1 in other languages.
Module paths and parameter names are transformers'.

float16 ends at 65,504 and T5's hidden states do not. As in transformers, `wo` is stored and multiplied in float32 where the rest is
float16 (loading, `fit` with fp16-mixed): what it adds makes the residual stream float32, and infinities before are clamped. bfloat16
has float32's range and needs none of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functions import applied
from .attention import attend, attention_mask, padding_mask
from .base import PretrainedModel
from .blocks import GEGLUFunction, RMSNorm, RMSNormFunction, SwiGLUFunction, compute_dtype, gated
from .cache import EncoderDecoderCache, LayerCache
from .recompute import Recomputable, RecomputableCore
from .seq2seq import EncoderOutput, Seq2SeqLM, embedded
from .t5_config import MT5Config, T5Config, T5EncoderConfig

# Attention ------------------------------------------------------------------------------------------------------------------


def relative_position_bucket(distance: Tensor, *, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance key - query, whole numbers of any shape: 0 to buckets - 1.

    Half of the buckets are for one distance each, the others for ranges that grow with it, the last for max_distance and beyond.
    bidirectional: half of all are for keys ahead; without, these have the bucket of distance 0.
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; the formula is that of their released code (Mesh TensorFlow).

    >>> relative_position_bucket(torch.tensor([0, -1, -4, -9, -90, 1, 90]), bidirectional=True, buckets=16, max_distance=32).tolist()
    [0, 1, 4, 5, 7, 9, 15]
    """
    ahead = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        ahead = (distance > 0) * buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = buckets // 2
    far = (steps.clamp(min=exact).float() / exact).log() / math.log(max_distance / exact) * (buckets - exact)
    return ahead + torch.where(steps < exact, steps, (exact + far.long()).clamp(max=buckets - 1))


class T5Attention(RecomputableCore):
    """x: [B, T, d_model] -> the same; over itself, or with `source` [B, S, d_model] over that. mask: see `attend`.

    cache: of what is looked at; a source is put there once.
    """

    def __init__(self, c: T5Config, relative: bool = False, **factory: Any) -> None:
        super().__init__()
        self.head_dim, self.dropout_rate = c.d_kv, c.dropout_rate
        inner = c.num_heads * c.d_kv
        self.q, self.k, self.v = (nn.Linear(c.d_model, inner, bias=False, **factory) for _ in range(3))
        self.o = nn.Linear(inner, c.d_model, bias=False, **factory)
        if relative:
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads, **factory)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None, source: Tensor | None = None) -> Tensor:
        if source is not None and cache is not None and cache.length:
            keys, values = cache.keys, cache.values
            assert keys is not None and values is not None
        else:
            keys, values = (self._heads(proj(x if source is None else source)) for proj in (self.k, self.v))
            if cache is not None:
                keys, values = cache.append(keys, values)
        return self.o(attend(self, self._heads(self.q(x)), keys, values, mask, causal=False, scale=1.0, dropout=self.dropout_rate))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, N * D] -> [B, N, T, D], nothing moved."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


# MLP ------------------------------------------------------------------------------------------------------------------------


class T5MLP(nn.Module):
    """``wo(relu(wi(x)))`` of 1.0, ``wo(gelu(wi_0(x)) * wi_1(x))`` of 1.1: [..., d_model] -> the same."""

    def __init__(self, c: T5Config, **factory: Any) -> None:
        super().__init__()
        gate, _, activation = c.feed_forward_proj.rpartition("-")
        self.gate = {"gelu": GEGLUFunction, "silu": SwiGLUFunction}[activation] if gate else None
        if self.gate is None:
            self.wi = nn.Linear(c.d_model, c.d_ff, bias=False, **factory)
        else:
            self.wi_0, self.wi_1 = (nn.Linear(c.d_model, c.d_ff, bias=False, **factory) for _ in range(2))
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False, **factory)
        self.wo.float32_instead_of_float16 = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        product = F.relu(self.wi(x)) if self.gate is None else gated(self.gate, self.wi_0(x), self.wi_1(x))
        return self._out(self.dropout(product))

    def _out(self, x: Tensor) -> Tensor:
        """wo, outside autocast and in float32 where it is stored so and x is float16."""
        weight = getattr(self.wo, "weight", None)  # a quantised layer has none
        if x.dtype != torch.float16 or weight is None or weight.dtype != torch.float32:
            return self.wo(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.wo(x.float())


# Blocks ---------------------------------------------------------------------------------------------------------------------


class T5LayerNorm(RMSNorm):
    """RMSNorm that gives its weight's dtype where that has 16 bit: behind a float32 residual stream the layers are 16 bit all the same."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype if self.weight.dtype.itemsize == 2 else compute_dtype(x)
        return applied(RMSNormFunction, x, self.weight, self.eps, dtype)


class T5Layer(nn.Module):
    """``x + dropout(part(norm(x), ...))``; the part is registered under the name that transformers gives it."""

    def __init__(self, c: T5Config, name: str, part: nn.Module, **factory: Any) -> None:
        super().__init__()
        self.add_module(name, part)
        self.part_name = name
        self.layer_norm = T5LayerNorm(c.d_model, c.layer_norm_epsilon, **factory)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.dropout(getattr(self, self.part_name)(self.layer_norm(x), *args))
        if x.dtype != torch.float16:
            return x
        limit = torch.finfo(torch.float16).max - 1000
        return x.clamp(-limit, limit)


class T5Block(Recomputable):
    """Self-attention, in a decoder attention over the encoder's output, MLP. x: [B, T, d_model]."""

    def __init__(self, c: T5Config, decodes: bool, relative: bool, **factory: Any) -> None:
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [("SelfAttention", T5Attention(c, relative, **factory))]
        if decodes:
            parts.append(("EncDecAttention", T5Attention(c, **factory)))
        parts.append(("DenseReluDense", T5MLP(c, **factory)))
        self.layer = nn.ModuleList(T5Layer(c, name, part, **factory) for name, part in parts)

    def compute(self, x: Tensor, mask: Tensor, cache: LayerCache | None, encoded: Tensor | None, encoded_mask: Tensor | None,
                cross: LayerCache | None) -> Tensor:  # fmt: skip
        x = self.layer[0](x, mask, cache)
        if encoded is not None:
            x = self.layer[1](x, encoded_mask, cross, encoded)
        return self.layer[-1](x)


class T5Stack(nn.Module):
    """The encoder or the decoder: [B, T, d_model] -> the same."""

    def __init__(self, c: T5Config, embed_tokens: nn.Embedding, decodes: bool, **factory: Any) -> None:
        super().__init__()
        self.decodes, self.buckets, self.max_distance = decodes, c.relative_attention_num_buckets, c.relative_attention_max_distance
        self.embed_tokens = embed_tokens
        count = c.num_decoder_layers if decodes else c.num_layers
        self.block = nn.ModuleList(T5Block(c, decodes, index == 0, **factory) for index in range(count))
        self.final_layer_norm = T5LayerNorm(c.d_model, c.layer_norm_epsilon, **factory)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x: Tensor, padding: Tensor | None, cache: EncoderDecoderCache | None = None, encoded: Tensor | None = None,
                encoder_padding: Tensor | None = None) -> Tensor:  # fmt: skip
        """padding: [B, past + T], of the cache, too.  encoded: [B, S, d_model], encoder_padding: [B, S]; of a decoder."""
        mask = self.position_bias(x, padding, cache.length if cache is not None else 0)
        encoded_mask = padding_mask(encoder_padding)
        x = self.dropout(x)
        for index, block in enumerate(self.block):
            own, cross = (None, None) if cache is None else (cache.layers[index], cache.cross[index])
            x = block(x, mask, own, encoded, encoded_mask, cross)
        return self.dropout(self.final_layer_norm(x))

    def position_bias(self, x: Tensor, padding: Tensor | None, past: int) -> Tensor:
        """What all blocks add to their scores, [1 or B, N, T, past + T]: a number for each distance, -infinity where no one may look.

        Behind a past the distance is that of text: padding between the two does not count.
        """
        length, table = x.shape[1], self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        columns = torch.arange(past + length, device=x.device)[None]
        places = columns if padding is None or past == 0 else padding.long().cumsum(1)  # [1 or B, S]
        distance = places[:, None, :] - places[:, past:, None]
        buckets = relative_position_bucket(distance, bidirectional=not self.decodes, buckets=self.buckets, max_distance=self.max_distance)
        bias: Tensor = table(buckets).permute(0, 3, 1, 2).to(compute_dtype(x))
        seen = padding_mask(padding) if not self.decodes else attention_mask(padding, x.shape[0], length, past, x.device)
        if seen is None and self.decodes and length > 1:
            seen = columns <= columns[0, past:, None]
        return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


# Models ---------------------------------------------------------------------------------------------------------------------


class T5ForConditionalGeneration(Seq2SeqLM):
    """T5 with its language-model head. Arguments and outputs: see `Seq2SeqLM.forward`."""

    config_class: ClassVar[type[T5Config]] = T5Config
    embedding_path = "shared"
    config: T5Config
    _keep_in_fp32_modules: ClassVar[list[str]] = ["wo"]  # the name by which transformers says, and `quantize` asks, what stays as it is

    def __init__(self, config: T5Config, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model, **factory)
        self.encoder = T5Stack(config, self.shared, decodes=False, **factory)
        self.decoder = T5Stack(config, self.shared, decodes=True, **factory)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, **factory)
        self.tie_weights()

    def encode(self, x: Tensor, padding: Tensor | None, past: EncoderDecoderCache | None = None) -> Tensor:
        return self.encoder(x, padding, past)

    def decode(self, x: Tensor, encoded: Tensor, encoder_padding: Tensor | None, padding: Tensor | None, cache: EncoderDecoderCache | None) -> Tensor:
        hidden: Tensor = self.decoder(x, padding, cache, encoded, encoder_padding)
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    @property
    def tied(self) -> dict[str, str]:
        """The stacks' names of the embedding, and the head's where it has no weight of its own."""
        return {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight", **super().tied}

    @classmethod
    def rename(cls, name: str) -> str | None:
        """None for the bias between decoder and encoder that old files carry, and nothing uses."""
        return None if name.endswith("EncDecAttention.relative_attention_bias.weight") else name

    def without(self, missing: set[str]) -> set[str]:
        """A 1.1 that transformers 5 made, rather than loaded, has no head of its own, and its config says the same as one that has."""
        if missing == {"lm_head.weight"} and self.config.source.get("tie_word_embeddings", True):
            self.config = replace(self.config, tie_word_embeddings=True)
            return set()
        return missing


class MT5ForConditionalGeneration(T5ForConditionalGeneration):
    config_class = MT5Config


class T5EncoderModel(PretrainedModel):
    """The encoder alone. forward returns an object with .last_hidden_state [B, T, d_model]."""

    config_class: ClassVar[type[T5EncoderConfig]] = T5EncoderConfig
    embedding_path = "shared"
    head_path = None
    config: T5EncoderConfig
    _keep_in_fp32_modules: ClassVar[list[str]] = ["wo"]

    def __init__(self, config: T5EncoderConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model, **factory)
        self.encoder = T5Stack(config, self.shared, decodes=False, **factory)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None) -> EncoderOutput:
        """input_ids: [B, T] or inputs_embeds: [B, T, d_model].  attention_mask: [B, T], 1 for text."""
        return EncoderOutput(self.encoder(embedded(self.shared, input_ids, inputs_embeds), attention_mask))

    @classmethod
    def rename(cls, name: str) -> str | None:
        """None for what a whole T5 has beside its encoder."""
        return None if name.startswith(("decoder.", "lm_head.")) else name

    @property
    def tied(self) -> dict[str, str]:
        return {"encoder.embed_tokens.weight": "shared.weight"}
