"""T5, FLAN-T5 and mT5: encoder and decoder, RMSNorm, no biases; the first block of each stack learns a bias per relative position.

    V d (twice where the head is not tied) + L (4 d i + m d f + 2 d) + L (8 d i + m d f + 3 d) + 2 * 32 a + 2 d,    i = a d_kv

with m = 2 matrices in the MLP of T5 1.0, and 3 in the gated one of 1.1 and FLAN. Source: transformers 5.23, modeling_t5.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import MemoryMathError
from .base import Architecture, Tensor, linear, matrix, norm
from .fields import Fields


@dataclass(frozen=True)
class T5(Architecture):
    """layers: of the encoder. gated: the MLP has wi_0 and wi_1. scaled_head: the decoder's output times d^-0.5 goes into the head.

    buckets: of relative positions, for each head of a stack.
    """

    decoder_layers: int = 0
    gated: bool = False
    scaled_head: bool = True
    buckets: int = 32

    family: ClassVar[str] = "t5"
    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5")
    class_names: ClassVar[tuple[str, ...]] = ("T5", "MT5")
    tasks: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "Model", "EncoderModel")

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> T5:
        heads = fields.whole("num_heads|num_attention_heads", "the heads")
        layers = fields.whole("num_layers|num_hidden_layers", "the number of blocks of the encoder")
        gated, activation = _feed_forward(fields)
        tied, scaled = _head(fields)
        return cls(
            fields.name,
            vocabulary=fields.whole("vocab_size", "the rows of the embedding"),
            hidden=fields.whole("d_model|hidden_size", "the width of the residual stream"),
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=fields.whole("d_kv|head_dim", "the width of one head", 64),
            mlp_width=fields.whole("d_ff", "the width of the MLP"),
            tied=tied,
            task=task,
            labels=labels,
            activation=activation,
            dropout=fields.share("dropout_rate", 0.1),
            attention_dropout=fields.share("dropout_rate", 0.1),
            decoder_layers=0 if task == "EncoderModel" else fields.whole("num_decoder_layers", "the blocks of the decoder", layers),
            gated=gated,
            scaled_head=scaled,
            buckets=fields.whole("relative_attention_num_buckets", "the buckets of relative positions", 32),
        )

    def with_loss(self) -> T5:
        """The bare encoder and decoder are trained with the output embedding on top."""
        return replace(self, task="ForConditionalGeneration") if self.task == "Model" else self

    def body(self) -> Iterator[Tensor]:
        yield matrix("shared.weight", self.vocabulary, self.hidden, "embedding")
        for layer in range(self.layers):
            path = f"encoder.block.{layer}.layer"
            yield from self.attention(f"{path}.0", "SelfAttention", relative=layer == 0)
            yield from self.mlp(f"{path}.1")
        yield from norm("encoder.final_layer_norm", self.hidden)
        for layer in range(self.decoder_layers):
            path = f"decoder.block.{layer}.layer"
            yield from self.attention(f"{path}.0", "SelfAttention", relative=layer == 0)
            yield from self.attention(f"{path}.1", "EncDecAttention")
            yield from self.mlp(f"{path}.2")
        if self.decoder_layers:
            yield from norm("decoder.final_layer_norm", self.hidden)

    def attention(self, path: str, name: str, relative: bool = False) -> Iterator[Tensor]:
        for part in "qkv":
            yield from linear(f"{path}.{name}.{part}", self.hidden, {part: self.query_width})
        yield from linear(f"{path}.{name}.o", self.query_width, {"o": self.hidden})
        if relative:
            yield matrix(f"{path}.{name}.relative_attention_bias.weight", self.buckets, self.heads, "relative positions")
        yield from norm(f"{path}.layer_norm", self.hidden)

    def mlp(self, path: str) -> Iterator[Tensor]:
        h, f = self.hidden, self.mlp_width
        first = (("wi_0", "gate"), ("wi_1", "up")) if self.gated else (("wi", "up"),)
        for name, part in first:
            yield from linear(f"{path}.DenseReluDense.{name}", h, {part: f})
        yield from linear(f"{path}.DenseReluDense.wo", f, {"down": h})
        yield from norm(f"{path}.layer_norm", h)

    def top(self) -> Iterator[Tensor]:
        if self.task == "ForConditionalGeneration" and not self.tied:
            yield matrix("lm_head.weight", self.vocabulary, self.hidden, "head")


def _feed_forward(fields: Fields) -> tuple[bool, str]:
    """(gated, activation) of "relu", "gated-gelu", ...: T5's gated gelu is the tanh approximation."""
    default = "gated-gelu" if fields.text("model_type", "t5") == "mt5" else "relu"
    written = fields.text("feed_forward_proj", default)
    first, dash, activation = written.partition("-")
    if (dash and first != "gated") or "-" in activation:
        raise MemoryMathError(f"{fields.name}: feed_forward_proj={written!r}: expected an activation like 'relu', or 'gated-' and one")
    if written == "gated-gelu":
        return True, "gelu_new"
    return bool(dash), activation if dash else first


def _head(fields: Fields) -> tuple[bool, bool]:
    """(tied, scaled). transformers 5 writes tie_word_embeddings=true for every T5, and remembers an untied one as scale_decoder_outputs=false:
    the checkpoint of such a model (1.1, FLAN) has a head of its own."""
    tied = fields.flag("tie_word_embeddings", fields.text("model_type", "t5") != "mt5")
    scaled = fields.flag("scale_decoder_outputs", tied)
    return tied and scaled, scaled
