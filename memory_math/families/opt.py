"""OPT: learned positions that begin two rows in, LayerNorm before or (350m) after each half of a block, a ReLU MLP.

OPT-350m embeds in fewer dimensions than it computes in: project_in and project_out go between the two.
Source: transformers 5.23, modeling_opt.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .base import Architecture, Tensor, linear, matrix, norm
from .fields import Fields

POSITION_OFFSET = 2  # OPTLearnedPositionalEmbedding: two rows more than there are positions


@dataclass(frozen=True)
class OPT(Architecture):
    """positions: the longest sequence. embedding_width: columns of the embedding. norm_first: LayerNorm comes before each half.

    final_norm: one more after the last block. biased: linear layers have biases. affine_norms: norms have weights and biases at all.
    """

    positions: int = 2048
    embedding_width: int = 0
    norm_first: bool = True
    final_norm: bool = True
    biased: bool = True
    affine_norms: bool = True

    family: ClassVar[str] = "opt"
    model_types: ClassVar[tuple[str, ...]] = ("opt",)
    class_names: ClassVar[tuple[str, ...]] = ("OPT",)

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> OPT:
        sizes = fields.multi_head_sizes()
        norm_first = fields.flag("do_layer_norm_before", True)
        return cls(
            fields.name,
            **sizes,
            mlp_width=fields.whole("ffn_dim", "the width of the MLP"),
            tied=fields.flag("tie_word_embeddings", True),
            task=task,
            labels=labels,
            activation=fields.text("activation_function", "relu"),
            dropout=fields.share("dropout", 0.1),
            attention_dropout=fields.share("attention_dropout", 0.0),
            positions=fields.whole("max_position_embeddings", "the rows of the position embedding", 2048),
            embedding_width=fields.whole("word_embed_proj_dim", "the columns of the embedding", sizes["hidden"]),
            norm_first=norm_first,
            final_norm=norm_first and not fields.flag("_remove_final_layer_norm", False),
            biased=fields.flag("enable_bias", True),
            affine_norms=fields.flag("layer_norm_elementwise_affine", True),
        )

    def body(self) -> Iterator[Tensor]:
        root, narrow = f"{self.root}decoder", self.embedding_width
        yield matrix(f"{root}.embed_tokens.weight", self.vocabulary, narrow, "embedding")
        yield matrix(f"{root}.embed_positions.weight", self.positions + POSITION_OFFSET, self.hidden, "positions")
        if narrow != self.hidden:
            yield from linear(f"{root}.project_in", narrow, {"embedding": self.hidden})
        for layer in range(self.layers):
            yield from self.block(f"{root}.layers.{layer}")
        if self.final_norm:
            yield from self.norm(f"{root}.final_layer_norm")
        if narrow != self.hidden:
            yield from linear(f"{root}.project_out", self.hidden, {"head": narrow})

    def block(self, path: str) -> Iterator[Tensor]:
        h, q, f = self.hidden, self.query_width, self.mlp_width
        for part in "qkv":
            yield from linear(f"{path}.self_attn.{part}_proj", h, {part: q}, self.biased)
        yield from linear(f"{path}.self_attn.out_proj", q, {"o": h}, self.biased)
        yield from self.norm(f"{path}.self_attn_layer_norm")
        yield from linear(f"{path}.fc1", h, {"up": f}, self.biased)
        yield from linear(f"{path}.fc2", f, {"down": h}, self.biased)
        yield from self.norm(f"{path}.final_layer_norm")

    def norm(self, path: str) -> Iterator[Tensor]:
        return norm(path, self.hidden, bias=True) if self.affine_norms else iter(())

    def top(self) -> Iterator[Tensor]:
        if self.task == "ForCausalLM" and not self.tied:
            yield matrix("lm_head.weight", self.vocabulary, self.embedding_width, "head")
        if self.task == "ForSequenceClassification":
            yield matrix("score.weight", self.labels, self.embedding_width, "classifier")
