"""What transformers' BERT and RoBERTa keep, call by call: `modeling_bert.py` and `modeling_roberta.py` of transformers 5.23 on the tape.

Post-norm blocks with dropout, and one of four heads: masked words (logits of every position), a label for the sequence or for every token,
or, for a bare encoder, none. A bare encoder that is to train is trained as a sequence classifier (families/bert.py, `with_loss`). No
attention mask, as for rows of equal length.

Adapters are what PEFT puts in by ``get_peft_model(model, LoraConfig(target_modules="all-linear"))``: without a task_type it takes a
classifier for a linear layer like the others. (With task_type="SEQ_CLS" BERT's classifier has no adapter and trains itself, as a copy.) Prompt
and prefix tuning need the task_type, and so train the copy of the classifier beside the vectors.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.bert import MASKED_HEAD, Bert
from ..operations import Weight
from ..precision import INDEX_BYTES
from ..request import Request
from ..tape import Ledger, Sized
from . import norms
from .activations import activate
from .attention_dropout import Extras, attend, expanded
from .base import Model
from .labelled_loss import labelled_loss
from .peft_layers import LayerPrefix, linear, prefix_of, with_prompt

PROMPTED_CLASSES = {  # method -> the classes that PEFT 0.21 has a task_type for
    "prompt": ("ForSequenceClassification",), "prefix": ("ForSequenceClassification", "ForTokenClassification"),
}  # fmt: skip


class TransformersBert(Model):
    """BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel, and RoBERTa's."""

    arch: Bert

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        _check(request, self.arch)
        self.originals: list[Weight] = []
        if request.method in PROMPTED_CLASSES:
            self.weights |= {path: self._saved_module(weight) for path, weight in self.weights.items() if path.startswith("classifier")}
        self.buffers = self.ids(2 * self.arch.positions)  # position_ids and token_type_ids

    def _saved_module(self, original: Weight) -> Weight:
        """PEFT's modules_to_save: a copy that trains, in the model's dtype, beside the original."""
        self.originals.append(original)
        return Weight(self.ledger, original.name, original.rows, original.columns, original.itemsize, self.request.leaf())

    def batch(self) -> tuple[Sized, Sized]:
        """ids [B, T]; labels [B, T], or [B] of a sequence classifier."""
        ids, _ = super().batch()
        return ids, self.ids(self.request.batch_size) if self.arch.task == "ForSequenceClassification" else self.ids(ids.numel)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        hidden = self.hidden_states(ids)
        self.hold(hidden)
        self.ledger.enter("loss")
        return labelled_loss(self, hidden, self.logits, labels)

    def generation_pass(self) -> None:
        """One pass without gradients, head and all: an encoder has no next token."""
        self.tape = self._tape()
        hidden = self.hidden_states(self.ids(self.tokens))
        self.ledger.enter("logits")
        self.logits(hidden)

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        prefix = prefix_of(self, masked=False)
        embedded = x = self.embeddings(ids)  # the name lives as long as the forward does
        for layer in range(self.arch.layers):
            mine = prefix.layers[layer] if prefix else None
            x = self.run_block(layer, Block(self, f"{self.arch.root}encoder.layer.{layer}", mine).forward, x)
        del embedded
        return x

    def embeddings(self, ids: Sized) -> Sized:
        """Words, token types and positions. RoBERTa counts the positions of every row (padding has none); BERT's are a buffer, for one row."""
        tape, path = self.tape, f"{self.arch.root}embeddings"
        words = ops.embedding(tape, ids, self.weights[f"{path}.word_embeddings"])
        words = with_prompt(self, self.needed(words))
        if self.request.method == "prompt":
            self.hold(words)
        rows = self.tokens if self.arch.roberta else self.sequence
        types = ops.embedding(tape, self.numbers(rows), self.weights[f"{path}.token_type_embeddings"])
        x = ops.add(tape, "embeddings", words, types)
        placed = self.positions(f"{path}.position_embeddings")
        x = ops.add(tape, "embeddings", x, placed)
        return self.dropped(norms.layer_norm(self, x, f"{path}.LayerNorm"))

    def positions(self, path: str) -> Sized:
        table = self.weights[path]
        if self.arch.roberta:
            return ops.embedding(self.tape, self.numbers(self.tokens), table)
        one_row = self.tape.record(path, [table], lambda: self.tape.new(self.sequence * table.columns, table.itemsize))
        return expanded(self, one_row, self.tokens * table.columns)

    def numbers(self, stored: int) -> Sized:
        """An id for every token, of which `stored` are in memory."""
        return Sized(self.tokens, INDEX_BYTES, self.ids(stored).storage)

    def dropped(self, x: Sized) -> Sized:
        return ops.dropout(self.tape, x) if self.arch.dropout and self.request.trains else x

    def logits(self, hidden: Sized) -> Sized:
        """What the class makes of the last hidden states [B, T, H]."""
        if self.arch.task == "ForMaskedLM":
            return self.masked_words(hidden)
        if self.arch.task == "ForTokenClassification":
            return linear(self, self.dropped(hidden), "classifier")
        if self.arch.task == "ForSequenceClassification" and self.arch.roberta:
            return self.classification_head(hidden)
        pooled = self.pooler(hidden)
        return pooled if self.arch.task == "Model" else linear(self, self.dropped(pooled), "classifier")

    def pooler(self, hidden: Sized) -> Sized:
        return activate(self.tape, "tanh", linear(self, first_token(self, hidden), f"{self.arch.root}pooler.dense"))

    def classification_head(self, hidden: Sized) -> Sized:
        """RobertaClassificationHead."""
        x = linear(self, self.dropped(first_token(self, hidden)), "classifier.dense")
        return linear(self, self.dropped(activate(self.tape, "tanh", x)), "classifier.out_proj")

    def masked_words(self, hidden: Sized) -> Sized:
        """BertLMPredictionHead, RobertaLMHead: the embedding once more, with a bias per word."""
        path, dense, norm = MASKED_HEAD[self.arch.roberta]
        x = linear(self, hidden, dense)
        x = activate(self.tape, "gelu" if self.arch.roberta else self.arch.activation, x)
        x = norms.layer_norm(self, x, norm)
        table = f"{self.arch.root}embeddings.word_embeddings" if self.arch.tied else f"{path}.decoder"
        return ops.linear(self.tape, x, self.weights[table], self.weights[f"{path}.bias"], self.autocast, part="logits")


class Block:
    """BertLayer. prefix: keys and values in front of its own, which are then in a cache, head by head."""

    def __init__(self, model: TransformersBert, path: str, prefix: LayerPrefix | None) -> None:
        self.model, self.path, self.prefix = model, path, prefix

    def forward(self, x: Sized) -> Sized:
        attended, weights = self.attention(x)  # the weights' name lives as long as the block
        between = self.intermediate(attended)
        x = self.output(between, attended, f"{self.path}.output")
        del weights, between
        return x

    def attention(self, x: Sized) -> tuple[Sized, Sized | None]:
        mixed, weights = self.self_attention(x)
        return self.output(mixed, x, f"{self.path}.attention.output"), weights

    def self_attention(self, x: Sized) -> tuple[Sized, Sized | None]:
        q, k, v = (linear(self.model, x, f"{self.path}.attention.self.{name}") for name in ("query", "key", "value"))
        if self.prefix is None:
            return attend(self.model, q, k, v)
        k, v, _ = self.prefix.before(k, v)
        self.model.hold(k, v)
        return attend(self.model, q, k, v, Extras(in_order=True))

    def intermediate(self, x: Sized) -> Sized:
        return activate(self.model.tape, self.model.arch.activation, linear(self.model, x, f"{self.path}.intermediate.dense"))

    def output(self, x: Sized, residual: Sized, path: str) -> Sized:
        """BertSelfOutput, BertOutput: dense, dropout, and the norm of the sum."""
        y = self.model.dropped(linear(self.model, x, f"{path}.dense"))
        return norms.layer_norm(self.model, ops.add(self.model.tape, "residual", y, residual), f"{path}.LayerNorm")


def _check(request: Request, arch: Bert) -> None:
    """What an encoder has no use for, or what is not written here."""
    classes = PROMPTED_CLASSES.get(request.method)
    if classes is not None and arch.task not in classes:
        there = " or ".join(classes)
        raise MemoryMathError(f"method={request.method!r} with {arch.name} as {arch.task}: PEFT 0.21 has that for {there} only")
    if request.compile:
        raise MemoryMathError(f"compile=True is not modelled for {arch.name}: leave it at False")


def first_token(model: Model, hidden: Sized) -> Sized:
    """A view: what keeps it keeps all positions."""
    count = model.request.batch_size * model.arch.hidden
    return model.tape.record("first token", [hidden], lambda: Sized(count, hidden.itemsize, hidden.storage))
