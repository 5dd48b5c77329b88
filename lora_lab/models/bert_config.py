"""The config.json of BERT and RoBERTa."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ..checks import is_number
from ..errors import LoraLabError
from .activations import check_activation
from .config import check_config, check_heads, flags, shares

MOST_LABELS = 100_000  # a new head is made before anything says how many are meant
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")  # transformers' words


@dataclass(frozen=True)
class BertConfig:
    """The fields of a config.json that shape the model; `source` keeps the whole file. classifier_dropout: None is hidden_dropout_prob."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    model_type: ClassVar[str] = "bert"
    family: ClassVar[str] = "BERT"

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> BertConfig:
        """Read a Hugging Face config, of transformers 4 or 5. Raises LoraLabError for a missing or unsupported field."""
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        optional = ("max_position_embeddings", "type_vocab_size", "num_labels")
        check_config(source, cls.family, needed, optional, "layer_norm_eps")
        check_heads(source["hidden_size"], source["num_attention_heads"])
        _check_modelled(source)
        given = {name: value for name, value in source.items() if value is not None or name == "pad_token_id"}
        given["hidden_act"] = check_activation(given.get("hidden_act", "gelu"), "hidden_act")
        given["num_labels"] = len(given["id2label"]) if given.get("id2label") else given.get("num_labels", 2)
        dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)
        own = {"classifier_dropout": 0.0} if "classifier_dropout" in given else {}
        chosen = {**given, **shares(given, {**dropouts, **own}), **flags(given, {"tie_word_embeddings": True})}
        config = cls(**{each.name: chosen[each.name] for each in fields(cls) if each.name in chosen and each.name != "source"}, source=source)
        config._check()
        return config

    def _check(self) -> None:
        pad, spread = self.pad_token_id, self.initializer_range
        if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < self.vocab_size):
            raise LoraLabError(f"pad_token_id={pad!r} in config.json: expected an id of the vocabulary, 0 to {self.vocab_size - 1}")
        if not is_number(spread) or spread < 0:
            raise LoraLabError(f"initializer_range={spread!r} in config.json: expected a small positive number")
        if self.num_labels > MOST_LABELS:
            raise LoraLabError(f"num_labels={self.num_labels} in config.json: expected {MOST_LABELS:,} classes at most")

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def first_position(self) -> int:
        return 0

    @property
    def position_padding(self) -> int | None:
        """The position of padding, which has a row of its own; None where padding has positions as text has."""
        return None

    @property
    def context_length(self) -> int:
        """Tokens a row may have."""
        return self.max_position_embeddings - self.first_position

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("source", "num_labels")}
        names = {str(index): f"LABEL_{index}" for index in range(self.num_labels)}
        if self.source.get("id2label") or self.num_labels != 2:
            names = self.source.get("id2label") or names
            ours |= {"id2label": names, "label2id": {label: int(index) for index, label in names.items()}}
        kept = {name: value for name, value in self.source.items() if name != "num_labels"}
        return {**kept, **ours, "model_type": self.model_type}


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """BERT's fields. Positions begin at pad_token_id + 1, so two of RoBERTa's 514 are never text's."""

    pad_token_id: int | None = 1

    model_type = "roberta"
    family = "RoBERTa"

    def _check(self) -> None:
        super()._check()
        if self.pad_token_id is None or self.context_length < 1:
            raise LoraLabError(f"pad_token_id={self.pad_token_id!r} in config.json: RoBERTa's positions begin after it, expected a small number "
                               f"(max_position_embeddings is {self.max_position_embeddings})")  # fmt: skip

    @property
    def first_position(self) -> int:
        return 0 if self.pad_token_id is None else self.pad_token_id + 1

    @property
    def position_padding(self) -> int | None:
        return self.pad_token_id


def _check_modelled(source: dict[str, Any]) -> None:
    """Refuse what would make it another model."""
    for name in ("is_decoder", "add_cross_attention"):
        if source.get(name):
            raise LoraLabError(f"{name}={source[name]!r} in config.json: an encoder is modelled here, which sees the whole text")
    kinds = {"position_embedding_type": ("absolute",), "problem_type": PROBLEMS}
    for name, choices in kinds.items():
        if source.get(name) not in (None, *choices):
            raise LoraLabError(f"{name}={source[name]!r} in config.json: expected {' or '.join(map(repr, choices))}")
    if source.get("id2label") is not None and not isinstance(source["id2label"], dict):
        raise LoraLabError(f"id2label={source['id2label']!r} in config.json: expected an object, number to name")
    if {*map(str, names := source.get("id2label") or {})} != {*map(str, range(len(names)))}:
        raise LoraLabError(f"id2label={names!r:.200} in config.json: expected a name for each output, from 0 on")
