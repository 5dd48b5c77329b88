"""What transformers' BERT and RoBERTa keep, call by call: `modeling_bert.py` and `modeling_roberta.py` of transformers 5.23 on the tape.

Post-norm blocks with dropout, and one of four heads: masked words (logits of every position), a label for the sequence or for every token,
or, for a bare encoder, none. A bare encoder that is to train is trained as a sequence classifier (families/bert.py, `with_loss`). No
attention mask, as for rows of equal length.

Adapters are what PEFT puts in by ``get_peft_model(model, LoraConfig(target_modules="all-linear"))``: without a task_type it takes a
classifier for a linear layer like the others. With task_type="SEQ_CLS" BERT's classifier has no adapter and trains itself, as a copy.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.base import LinearLayer
from ..families.bert import Bert
from ..request import Request
from ..tape import Ledger, Sized
from . import norms
from .activations import activate
from .attention_dropout import attend, expanded
from .base import Model
from .losses import labelled_loss
from .peft_layers import linear, with_prompt


class TransformersBert(Model):
    """BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel, and RoBERTa's."""

    arch: Bert

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        _check(request, self.arch)
        if self.adapters.keys() == {layer.name for layer in self.arch.linears()}:
            self.adapters |= {layer.name: self._adapter(layer.name, layer.inputs, layer.outputs) for layer in self.classifiers()}
        self.buffers = self.ids(2 * self.arch.positions)  # position_ids and token_type_ids

    def classifiers(self) -> list[LinearLayer]:
        """The linear layers of a classifier."""
        weights = [(path, weight) for path, weight in self.weights.items() if path.startswith("classifier") and not path.endswith("bias")]
        return [LinearLayer(path, weight.columns, weight.rows, bias=True) for path, weight in weights]

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
        embedded = x = self.embeddings(ids)  # the name lives as long as the forward does
        for layer in range(self.arch.layers):
            x = self.run_block(layer, Block(self, f"{self.arch.root}encoder.layer.{layer}").forward, x)
        del embedded
        return x

    def embeddings(self, ids: Sized) -> Sized:
        """Words, token types and positions; the last two for one row, where the ids do not say which positions are padding."""
        tape, path = self.tape, f"{self.arch.root}embeddings"
        words = ops.embedding(tape, ids, self.weights[f"{path}.word_embeddings"])
        words = with_prompt(self, self.needed(words))
        positions, kept = self.position_ids(ids)
        types = ops.embedding(tape, self.ids(positions.numel), self.weights[f"{path}.token_type_embeddings"], rows=self.tokens)
        x = ops.add(tape, "embeddings", words, types)
        placed = ops.embedding(tape, positions, self.weights[f"{path}.position_embeddings"])
        x = ops.add(tape, "embeddings", x, expanded(self, placed, x.numel))
        return self.dropped(norms.layer_norm(self, x, f"{path}.LayerNorm"))
