"""BERT, RoBERTa, MiniLM: an encoder of post-norm blocks with learned positions and token types; five classes with their heads.

    (V + P + 2) h + 2 h + L (4 h^2 + 4 h + 2 h f + f + h + 4 h) + h^2 + h    for BertModel with its pooler

Source: transformers 5.23, modeling_bert.py and modeling_roberta.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .base import Architecture, LinearLayer, Tensor, linear, matrix, norm, vector
from .fields import Fields

MASKED_HEAD = {  # by whether it is RoBERTa: the head, its dense layer, its norm
    False: ("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    True: ("lm_head", "lm_head.dense", "lm_head.layer_norm"),
}


@dataclass(frozen=True)
class Bert(Architecture):
    """roberta: its names, its heads, and its positions, which begin two rows in (those two are in `positions`)."""

    positions: int = 512
    token_types: int = 2
    roberta: bool = False

    family: ClassVar[str] = "bert"
    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta")
    class_names: ClassVar[tuple[str, ...]] = ("Bert", "Roberta")
    tasks: ClassVar[tuple[str, ...]] = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")

    @classmethod
    def read(cls, fields: Fields, task: str, labels: int) -> Bert:
        fields.refuse("add_cross_attention")
        sizes = fields.multi_head_sizes()
        return cls(
            fields.name,
            **sizes,
            mlp_width=fields.whole("intermediate_size", "the width of the MLP"),
            tied=fields.flag("tie_word_embeddings", True),
            task=task,
            labels=labels,
            activation=fields.text("hidden_act", "gelu"),
            dropout=fields.share("hidden_dropout_prob", 0.1),
            attention_dropout=fields.share("attention_probs_dropout_prob", 0.1),
            positions=fields.whole("max_position_embeddings", "the rows of the position embedding", 512),
            token_types=fields.whole("type_vocab_size", "the rows of the token type embedding", 2),
            roberta=fields.text("model_type", "bert") == "roberta",
        )

    @property
    def learned_positions(self) -> int:
        return self.positions - 2 * self.roberta  # RoBERTa's first two rows are for padding

    @property
    def root(self) -> str:
        return "" if self.task == "Model" else "roberta." if self.roberta else "bert."

    @property
    def pooled(self) -> bool:
        """Whether the class has a pooler: the bare model, and BERT's sequence classifier (RoBERTa's brings a layer of its own)."""
        return self.task == "Model" or (self.task == "ForSequenceClassification" and not self.roberta)

    def beside_linears(self) -> tuple[LinearLayer, ...]:
        """The layers of a classifier, which PEFT knows for one only by task_type="SEQ_CLS"."""
        matrices = [tensor for tensor in self.top() if tensor.path.startswith("classifier") and tensor.path.endswith(".weight")]
        return tuple(LinearLayer(tensor.path.removesuffix(".weight"), tensor.columns, tensor.rows, bias=True) for tensor in matrices)

    def with_loss(self) -> Bert:
        """A bare encoder is trained with a classifier on top."""
        return replace(self, task="ForSequenceClassification") if self.task == "Model" else self

    def body(self) -> Iterator[Tensor]:
        root, h = self.root, self.hidden
        yield matrix(f"{root}embeddings.word_embeddings.weight", self.vocabulary, h, "embedding")
        yield matrix(f"{root}embeddings.position_embeddings.weight", self.positions, h, "positions")
        yield matrix(f"{root}embeddings.token_type_embeddings.weight", self.token_types, h, "token types")
        yield from norm(f"{root}embeddings.LayerNorm", h, bias=True)
        for layer in range(self.layers):
            yield from self.block(f"{root}encoder.layer.{layer}")
        if self.pooled:
            yield from linear(f"{root}pooler.dense", h, {"pooler": h}, bias=True)

    def block(self, path: str) -> Iterator[Tensor]:
        h, q, f = self.hidden, self.query_width, self.mlp_width
        for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{path}.attention.self.{name}", h, {part: q}, bias=True)
        yield from linear(f"{path}.attention.output.dense", q, {"o": h}, bias=True)
        yield from norm(f"{path}.attention.output.LayerNorm", h, bias=True)
        yield from linear(f"{path}.intermediate.dense", h, {"up": f}, bias=True)
        yield from linear(f"{path}.output.dense", f, {"down": h}, bias=True)
        yield from norm(f"{path}.output.LayerNorm", h, bias=True)

    def top(self) -> Iterator[Tensor]:
        if self.task == "ForMaskedLM":
            yield from self.masked_head()
        elif self.task == "ForSequenceClassification" and self.roberta:
            yield from self.classifier("classifier.dense", self.hidden)
            yield from self.classifier("classifier.out_proj", self.labels)
        elif self.task != "Model":
            yield from self.classifier("classifier", self.labels)

    def classifier(self, path: str, outputs: int) -> Iterator[Tensor]:
        yield matrix(f"{path}.weight", outputs, self.hidden, "classifier")
        yield vector(f"{path}.bias", outputs, "classifier")

    def masked_head(self) -> Iterator[Tensor]:
        """A dense layer and a norm, then the embedding once more with a bias per word."""
        path, dense, layer_norm = MASKED_HEAD[self.roberta]
        yield from linear(dense, self.hidden, {"head": self.hidden}, bias=True)
        yield from norm(layer_norm, self.hidden, bias=True)
        yield vector(f"{path}.bias", self.vocabulary, "biases")
        if not self.tied:  # then the decoder has its own bias as well, beside the one above
            yield matrix(f"{path}.decoder.weight", self.vocabulary, self.hidden, "head")
            yield vector(f"{path}.decoder.bias", self.vocabulary, "biases")
