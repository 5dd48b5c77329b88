"""A classifier on a sentence encoder: linear over the pooled hidden states, which is what the encoder was trained to be read by.

    logits = classifier(pooling(hidden states of the text))

BERT's own classifier (bert_heads.py) reads the first position through a pooler, which sentence encoders such as all-MiniLM were not trained with.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, nn

from ..errors import LoraLabError
from .bert import BertModel, RobertaModel
from .bert_heads import SequenceClassifier, SequenceClassifierOutput, classification_loss
from .cache import KVCache
from .embedding import Pooling, pooling_of


class PooledForSequenceClassification(SequenceClassifier):
    """encoder: a BERT, which becomes part of this model and loses its pooler.  head: [classes, H].  pooling: of the hidden states, not normalised."""

    new_head: ClassVar[tuple[str, ...]] = ("classifier",)

    def __init__(self, encoder: BertModel, head: nn.Linear, pooling: Pooling) -> None:
        super().__init__()
        self.config = dataclasses.replace(encoder.config, num_labels=head.out_features, problem_type="single_label_classification")
        self.name_or_path, self.source_folder = encoder.name_or_path, encoder.source_folder
        encoder.pooler = None
        self.add_module(self.base_prefix, encoder)
        self.classifier, self.pooling = head, pooling

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: KVCache | None = None) -> SequenceClassifierOutput:  # fmt: skip
        """The inputs of `BertModel.forward`; labels: see `classification_loss`."""
        encoder = self.get_submodule(self.base_prefix)
        hidden = encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values).last_hidden_state
        text = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask[:, -hidden.shape[1] :]  # without a prefix's columns
        logits = self.classifier(self.pooling(hidden, text).to(self.classifier.weight.dtype))
        return SequenceClassifierOutput(None if labels is None else classification_loss(logits, labels, self.config.problem_type), logits)


class RobertaPooledForSequenceClassification(PooledForSequenceClassification):
    embedding_path = "roberta.embeddings.word_embeddings"
    base_prefix = "roberta"


def with_pooled_head(encoder: nn.Module, head: nn.Linear) -> PooledForSequenceClassification:
    """The encoder with this head on it, in eval mode, pooled as its folder says. Raises LoraLabError for what is no BERT and no RoBERTa."""
    if not isinstance(encoder, BertModel):
        raise LoraLabError(f"a {type(encoder).__name__} gets no head for classes here: expected a BERT or RoBERTa without one (all-minilm-l6-v2)")
    family = RobertaPooledForSequenceClassification if isinstance(encoder, RobertaModel) else PooledForSequenceClassification
    device = encoder.get_input_embeddings().weight.device
    return family(encoder, head.to(device), dataclasses.replace(pooling_of(encoder), normalize=False)).eval()
