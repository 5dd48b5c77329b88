"""BERT and RoBERTa with a head: a class, several classes or a number for a text; or the words under the masks.

    classes        BERT: dropout, linear over the pooler's output.  RoBERTa: dropout, linear, tanh, dropout, linear over the first position
    masked words   norm(activation(linear(h))) @ words.T + bias, the words being the embedding's (Devlin et al. 2019, section 3.1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraLabError
from .activations import ACTIVATIONS
from .base import check_ids
from .bert import BaseModelOutput, BertModel, BertPretrainedModel, RobertaModel, initialise
from .bert_config import BertConfig, RobertaConfig
from .blocks import IGNORE
from .cache import KVCache
from .losses import labelled_loss


@dataclass
class SequenceClassifierOutput:
    """loss: scalar or None.  logits: [B, num_labels]."""

    loss: Tensor | None
    logits: Tensor


@dataclass
class MaskedLMOutput:
    """loss: scalar or None.  logits: [B, T, V], or None in training mode with labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


# Classes ----------------------------------------------------------------------------------------------------------------------


class SequenceClassifier(BertPretrainedModel):
    """What BERT's and RoBERTa's classifiers share: arguments, output and loss."""

    embedding_path: ClassVar[str] = "bert.embeddings.word_embeddings"
    own_head: ClassVar[str | None] = "classifier"

    def classify(self, encoded: BaseModelOutput) -> Tensor:
        """[B, num_labels]."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: KVCache | None = None) -> SequenceClassifierOutput:  # fmt: skip
        """The inputs of `BertModel.forward`; labels: see `classification_loss`."""
        encoder = self.get_submodule(self.base_prefix)
        logits = self.classify(encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss, logits)


class BertForSequenceClassification(SequenceClassifier):
    new_head = ("classifier", "bert.pooler")

    def __init__(self, config: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, **factory)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, **factory)
        initialise(self.classifier, config.initializer_range)

    def classify(self, encoded: BaseModelOutput) -> Tensor:
        return self.classifier(self.dropout(encoded.pooler_output))


class RobertaClassificationHead(nn.Module):
    """``out_proj(dropout(tanh(dense(dropout(first position)))))``: [B, T, H] -> [B, num_labels]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, **factory)
        self.dropout = nn.Dropout(c.head_dropout)
        self.out_proj = nn.Linear(c.hidden_size, c.num_labels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x[:, 0])))))


class RobertaForSequenceClassification(SequenceClassifier):
    config_class = RobertaConfig
    embedding_path = "roberta.embeddings.word_embeddings"
    base_prefix = "roberta"
    has_pooler = False
    new_head = ("classifier",)

    def __init__(self, config: RobertaConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config, add_pooling_layer=False, **factory)
        self.classifier = RobertaClassificationHead(config, **factory)
        initialise(self.classifier, config.initializer_range)

    def classify(self, encoded: BaseModelOutput) -> Tensor:
        return self.classifier(encoded.last_hidden_state)


def classification_loss(logits: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """The mean over rows; a float32 scalar (float64 for float64). logits: [B, K].

    problem: as transformers' problem_type; None decides as it does:
        "regression"                   where K = 1; labels [B, K], or [B]: mean squared error
        "single_label_classification"  where labels are int64 or int32; [B]: cross-entropy, rows with -100 do not count
        "multi_label_classification"   else; labels [B, K], 1 or 0: the mean of K binary cross-entropies
    Raises LoraLabError for labels of another shape, and on the CPU for a class that there is not.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows, classes = logits.shape
    whole = labels.dtype in (torch.int64, torch.int32)
    problem = problem or ("regression" if classes == 1 else "single_label_classification" if whole else "multi_label_classification")
    expected = [rows] if problem == "single_label_classification" else [rows, classes]
    if list(labels.shape) != expected and not (labels.numel() == rows and (classes == 1 or expected == [rows])):
        raise LoraLabError(f"labels is {list(labels.shape)}, expected {expected} for {problem} with {classes} outputs")
    if problem == "single_label_classification":
        return _cross_entropy(logits, labels.reshape(-1))
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.reshape(logits.shape).to(logits.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        raise LoraLabError(f"labels are {labels.dtype}, expected whole numbers for single_label_classification")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = labels[((labels < 0) | (labels >= logits.shape[1])) & (labels != IGNORE)]
        if len(outside):
            raise LoraLabError(f"labels has the class {int(outside[0])}, the model has {logits.shape[1]}: load it with num_labels of your data")
    labels = labels.long()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / (labels != IGNORE).sum().clamp(min=1)


# Masked words -----------------------------------------------------------------------------------------------------------------


class MaskedLM(BertPretrainedModel):
    """What BERT's and RoBERTa's masked language models share."""

    embedding_path: ClassVar[str] = "bert.embeddings.word_embeddings"
    has_pooler = False

    def features(self, hidden: Tensor) -> Tensor:
        """What goes into the head's last matrix: [B, T, H] -> [B, T, H]."""
        raise NotImplementedError

    @property
    def tied(self) -> dict[str, str]:
        """The head's matrix is the embedding, and its bias stands beside it in the file."""
        assert self.head_path is not None
        head = self.head_path.removesuffix(".decoder")
        return {**super().tied, f"{head}.decoder.bias": f"{head}.bias"} if self.config.tie_word_embeddings else {}

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: KVCache | None = None) -> MaskedLMOutput:  # fmt: skip
        """The inputs of `BertModel.forward`.  labels: [B, T], the words under the masks, -100 elsewhere; not shifted.

        In training mode with labels `.logits` is None: those of labelled positions only are computed.
        """
        encoder, decoder = self.get_submodule(self.base_prefix), self.get_output_embeddings()
        self._check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values)
        features = self.features(encoder(*inputs).last_hidden_state)  # the encoder's output is not kept beside its features
        loss = None if labels is None else labelled_loss(features, labels, decoder)
        return MaskedLMOutput(loss, decoder(features) if labels is None or not self.training else None)

    def _check_labels(self, labels: Tensor | None, given: Tensor | None) -> None:
        if labels is None or given is None:
            return
        if labels.shape != given.shape[:2]:
            raise LoraLabError(f"labels is {list(labels.shape)}, expected {list(given.shape[:2])}, as the input")
        check_ids("labels", labels, self.config.vocab_size, also=IGNORE)


class BertPredictionTransform(nn.Module):
    """``norm(activation(dense(x)))``: [..., H] -> [..., H]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(c.hidden_size, c.hidden_size, **factory), ACTIVATIONS[c.hidden_act]
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class BertPredictionHead(nn.Module):
    """``decoder(transform(x))``: [..., H] -> [..., V]. `bias` is the decoder's."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(c, **factory)
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size, **factory)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertOnlyMLMHead(nn.Module):
    """A level of names that the pre-training model shares with its second head, the next sentence's."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.predictions = BertPredictionHead(c, **factory)


class BertForMaskedLM(MaskedLM):
    head_path = "cls.predictions.decoder"
    own_head = "cls"
    new_head = ("cls",)

    def __init__(self, config: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False, **factory)
        self.cls = BertOnlyMLMHead(config, **factory)
        initialise(self.cls, config.initializer_range)
        self.tie_weights()

    def features(self, hidden: Tensor) -> Tensor:
        return self.cls.predictions.transform(hidden)


class RobertaLMHead(nn.Module):
    """``decoder(layer_norm(gelu(dense(x))))``: [..., H] -> [..., V]. `bias` is the decoder's."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, **factory)
        self.layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size, **factory)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size, **factory))

    def features(self, x: Tensor) -> Tensor:
        return self.layer_norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.features(x))


class RobertaForMaskedLM(MaskedLM):
    config_class = RobertaConfig
    embedding_path = "roberta.embeddings.word_embeddings"
    base_prefix = "roberta"
    head_path = "lm_head.decoder"
    own_head = "lm_head"
    new_head = ("lm_head",)

    def __init__(self, config: RobertaConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config, add_pooling_layer=False, **factory)
        self.lm_head = RobertaLMHead(config, **factory)
        initialise(self.lm_head, config.initializer_range)
        self.tie_weights()

    def features(self, hidden: Tensor) -> Tensor:
        return self.lm_head.features(hidden)
