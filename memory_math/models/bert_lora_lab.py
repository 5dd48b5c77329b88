"""What this project's own BERT and RoBERTa keep, call by call: lora_lab/models/bert.py and bert_heads.py on the tape.

With a class for each text, or with words under masks, of which the labelled ones alone are computed; a bare encoder that is to train is trained
as a classifier. Adapters are what ``lora_lab.inject(model)`` puts in: the classifier has none, and stays as it is.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.bert import Bert
from ..operations import Weight
from ..precision import INDEX_BYTES
from ..request import Request
from ..tape import Ledger, Sized
from .activations import keeps_result as tanh
from .attention_dropout import expanded
from .attention_lora_lab import Scores, attend
from .base import Model
from .bert import MASKED_HEAD
from .causal_lora_lab import labelled_loss
from .layers_lora_lab import activate, dropped, lora_linear
from .norms import layer_norm


class LoraLabBert(Model):
    """BertForSequenceClassification, BertForMaskedLM, BertModel, and RoBERTa's."""

    arch: Bert

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        if self.arch.task == "ForTokenClassification":
            raise MemoryMathError(f"{self.arch.name} as {self.arch.task} is not modelled with implementation='lora_lab', which has no such class")

    @property
    def head(self) -> Weight:
        """Of masked words: the embedding once more, or a matrix of its own."""
        return self.weights[f"{self.arch.root}embeddings.word_embeddings" if self.arch.tied else f"{MASKED_HEAD[self.arch.roberta][0]}.decoder"]

    def batch(self) -> tuple[Sized, Sized]:
        """ids [B, T]; labels [B, T], or [B] of a classifier."""
        ids, labels = super().batch()
        return ids, labels if self.arch.task == "ForMaskedLM" else self.ids(self.request.batch_size)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        words = self.arch.task == "ForMaskedLM"
        x = (self.features if words else self.classify)(self.hidden_states(ids))
        self.ledger.enter("loss")
        if not words:
            return self.classification_loss(x, labels)
        bias = self.weights[f"{MASKED_HEAD[self.arch.roberta][0]}.{'bias' if self.arch.tied else 'decoder.bias'}"]
        return labelled_loss(self, x, labels, self.tokens, bias=bias)

    def generation_pass(self) -> None:
        """One pass without gradients, head and all: an encoder has no next token."""
        self.tape = self._tape()
        top = {"ForMaskedLM": self.features, "Model": self.pooler}.get(self.arch.task, self.classify)
        x = top(self.hidden_states(self.ids(self.tokens)))
        self.ledger.enter("logits")
        if self.arch.task == "ForMaskedLM":
            ops.linear(self.tape, x, self.head, part="logits")

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """BertModel without its pooler."""
        embedded = x = self.embeddings(ids)  # the name lives as long as the forward does
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, f"{self.arch.root}encoder.layer.{layer}").forward, x)
        del embedded
        return x

    def embeddings(self, ids: Sized) -> Sized:
        """BertEmbeddings: one token type for all, positions of one row; RoBERTa counts those of every row."""
        tape, path, count = self.tape, f"{self.arch.root}embeddings", self.tokens * self.arch.hidden
        words = ops.embedding(tape, ids, self.weights[f"{path}.word_embeddings"])
        words = self.source(words) if self.request.method == "frozen" else words
        numbers = self.ids(1), self.ids(self.tokens if self.arch.roberta else self.sequence)
        types = ops.embedding(tape, numbers[0], self.weights[f"{path}.token_type_embeddings"])
        x = ops.add(tape, "embeddings", words, expanded(self, types, count))
        places = ops.embedding(tape, numbers[1], self.weights[f"{path}.position_embeddings"])
        x = ops.add(tape, "embeddings", x, expanded(self, places, count))
        return dropped(self, layer_norm(self, x, f"{path}.LayerNorm"), self.arch.dropout)

    def pooler(self, hidden: Sized) -> Sized:
        return tanh(self.tape, lora_linear(self, self.first_position(hidden), f"{self.arch.root}pooler.dense"))

    def first_position(self, hidden: Sized) -> Sized:
        """A view: what keeps it keeps all positions."""
        count = self.request.batch_size * self.arch.hidden
        return self.tape.record("first position", [hidden], lambda: Sized(count, hidden.itemsize, hidden.storage))

    def classify(self, hidden: Sized) -> Sized:
        """[B, classes]."""
        if not self.arch.roberta:
            return lora_linear(self, dropped(self, self.pooler(hidden), self.arch.dropout), "classifier")
        x = lora_linear(self, dropped(self, self.first_position(hidden), self.arch.dropout), "classifier.dense")
        return lora_linear(self, dropped(self, tanh(self.tape, x), self.arch.dropout), "classifier.out_proj")

    def classification_loss(self, logits: Sized, labels: Sized) -> Sized:
        """In float32: the sum, divided by the number of labels, which is kept."""
        summed = ops.cross_entropy(self.tape, ops.cast(self.tape, logits, 4, part="logits"), labels)
        return ops.elementwise(self.tape, "loss", summed, keeps=[self.tape.new(1, INDEX_BYTES, "other")])

    def features(self, hidden: Sized) -> Sized:
        """BertPredictionTransform, RobertaLMHead.features: what goes into the matrix of words."""
        _, dense, norm = MASKED_HEAD[self.arch.roberta]
        x = lora_linear(self, hidden, dense)
        x = ops.elementwise(self.tape, "activation", x, keeps=[x]) if self.arch.roberta else activate(self, x)
        return layer_norm(self, x, norm)


class Block:
    """BertLayer."""

    def __init__(self, model: LoraLabBert, path: str) -> None:
        self.model, self.path = model, path

    def forward(self, x: Sized) -> Sized:
        x = self.output(self.attention(x), x, f"{self.path}.attention.output")
        return self.output(self.intermediate(x), x, f"{self.path}.output")

    def attention(self, x: Sized) -> Sized:
        q, k, v = (lora_linear(self.model, x, f"{self.path}.attention.self.{name}") for name in ("query", "key", "value"))
        return attend(self.model, q, k, v, Scores(causal=False, dropout=self.model.arch.attention_dropout))

    def intermediate(self, x: Sized) -> Sized:
        return activate(self.model, lora_linear(self.model, x, f"{self.path}.intermediate.dense"))

    def output(self, x: Sized, residual: Sized, path: str) -> Sized:
        """BertOutput: dense, dropout, and the norm of the sum."""
        return layer_norm(self.model, ops.add(self.model.tape, "residual", self.dense(x, path), residual), f"{path}.LayerNorm")

    def dense(self, x: Sized, path: str) -> Sized:
        return dropped(self.model, lora_linear(self.model, x, f"{path}.dense"), self.model.arch.dropout)
