"""What this project's own BERT and RoBERTa keep, call by call: lora_lab/models/bert.py and bert_heads.py on the tape.

With a class for each text, or with words under masks, of which the labelled ones alone are computed; a bare encoder that is to train is trained
as a classifier. Adapters are what ``lora_lab.inject(model)`` puts in: the classifier has none, and stays as it is.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.bert import MASKED_HEAD, Bert
from ..operations import Weight
from ..precision import INDEX_BYTES
from ..request import Request
from ..tape import Ledger, Sized
from .activations import keeps_result as tanh
from .attention_dropout import expanded
from .attention_lora_lab import Scores, attend
from .bert import first_token
from .causal_lora_lab import labelled_loss
from .layers_lora_lab import activate, dropped, lora_linear
from .norms import layer_norm
from .prompts_lora_lab import BlockPast, Prompted


class LoraLabBert(Prompted):
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
        return labelled_loss(self, x, labels, self.text_tokens, bias=bias)

    def generation_pass(self) -> None:
        """One pass without gradients, head and all: an encoder has no next token."""
        self.tape = self._tape()
        top = {"ForMaskedLM": self.features, "Model": self.pooler}.get(self.arch.task, self.classify)
        x = top(self.hidden_states(self.ids(self.text_tokens)))
        self.ledger.enter("logits")
        if self.arch.task == "ForMaskedLM":
            ops.linear(self.tape, x, self.head, part="logits")

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """BertModel without its pooler; of a text behind a prompt its own positions."""
        pasts, words = self.pasts(), self.words(ids)
        given = words if self.request.virtual == "prompt" else None  # as inputs_embeds, which the caller holds
        embedded = x = self.embeddings(words)  # the name lives as long as the forward does
        del words
        for layer, past in enumerate(pasts):
            x = self.run_block(layer, Block(self, f"{self.arch.root}encoder.layer.{layer}", past).forward, x)
        del embedded, given, pasts
        count = self.text_tokens * self.arch.hidden
        return x if x.numel == count else self.tape.record("text", [x], lambda: Sized(count, x.itemsize, x.storage))

    def words(self, ids: Sized) -> Sized:
        words = ops.embedding(self.tape, ids, self.weights[f"{self.arch.root}embeddings.word_embeddings"])
        return self.source(words) if self.request.method == "frozen" else self.with_rows(words)

    def embeddings(self, words: Sized) -> Sized:
        """BertEmbeddings: one token type for all, positions of one row; of every row where a prefix moves them, or RoBERTa looks at the ids."""
        tape, path, count = self.tape, f"{self.arch.root}embeddings", self.tokens * self.arch.hidden
        counted = self.request.prefix or (self.arch.roberta and self.tokens == self.text_tokens)
        numbers = self.ids(1), self.ids(self.tokens if counted else self.sequence)
        types = ops.embedding(tape, numbers[0], self.weights[f"{path}.token_type_embeddings"])
        x = ops.add(tape, "embeddings", words, expanded(self, types, count))
        places = ops.embedding(tape, numbers[1], self.weights[f"{path}.position_embeddings"])
        x = ops.add(tape, "embeddings", x, expanded(self, places, count))
        return dropped(self, layer_norm(self, x, f"{path}.LayerNorm"), self.arch.dropout)

    def pooler(self, hidden: Sized) -> Sized:
        return tanh(self.tape, lora_linear(self, first_token(self, hidden), f"{self.arch.root}pooler.dense"))

    def classify(self, hidden: Sized) -> Sized:
        """[B, classes]."""
        if not self.arch.roberta:
            return lora_linear(self, dropped(self, self.pooler(hidden), self.arch.dropout), "classifier")
        x = lora_linear(self, dropped(self, first_token(self, hidden), self.arch.dropout), "classifier.dense")
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

    def __init__(self, model: LoraLabBert, path: str, past: BlockPast) -> None:
        self.model, self.path, self.past = model, path, past

    def forward(self, x: Sized) -> Sized:
        x = self.output(self.attention(x), x, f"{self.path}.attention.output")
        return self.output(self.intermediate(x), x, f"{self.path}.output")

    def attention(self, x: Sized) -> Sized:
        q, k, v = (lora_linear(self.model, x, f"{self.path}.attention.self.{name}") for name in ("query", "key", "value"))
        k, v = self.past.append(k, v)
        return attend(self.model, q, k, v, Scores(causal=False, dropout=self.model.arch.attention_dropout))

    def intermediate(self, x: Sized) -> Sized:
        return activate(self.model, lora_linear(self.model, x, f"{self.path}.intermediate.dense"))

    def output(self, x: Sized, residual: Sized, path: str) -> Sized:
        """BertOutput: dense, dropout, and the norm of the sum."""
        return layer_norm(self.model, ops.add(self.model.tape, "residual", self.dense(x, path), residual), f"{path}.LayerNorm")

    def dense(self, x: Sized, path: str) -> Sized:
        return dropped(self.model, lora_linear(self.model, x, f"{path}.dense"), self.model.arch.dropout)
