"""What a row is to each kind of model: how it is encoded, made into batches, and counted.

    CausalObjective          {"input_ids", "labels"}, or text rows (formats.py)         the loss is a mean over labelled tokens
    Seq2SeqObjective         {"input_ids", "labels"}, or text rows (seq2seq.py)         the same, of an encoder-decoder
    ClassificationObjective  {"input_ids", "label"}, or {"text", "label"}               the loss is a mean over rows
    PackedObjective          as CausalObjective, without padding (packing.py)         the same loss

The training loop asks `objective_of(model)` once and knows no more than the methods of an `Objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import LoraLabError
from ..wrapping import base_of
from .batching import Batch, collate, collate_classes
from .classification import encode_labelled
from .formats import Row
from .packing import collate_packed
from .seq2seq import encode_answers
from .templates import IGNORE, encode_rows

SEQ2SEQ = ("ForConditionalGeneration", "ForSeq2SeqLM", "MTModel")
OTHERS = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "BertModel", "RobertaModel", "EncoderModel")


class Objective:
    """A kind of model: what its rows are."""

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int | None) -> list[Any]:
        """Each row as token ids and labels. Raises LoraLabError, naming the row, for one that cannot be learned from."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any], pad_id: int, device: Any = None) -> Batch:
        """The arguments of the model for these examples."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """What the model's loss is the mean over: a batch weighs as much in a step, and in an evaluation."""
        raise NotImplementedError

    def tokens(self, batch: Batch) -> int:
        """Text in the batch, padding not counted."""
        return int(batch["attention_mask"].sum())

    def positions(self, batch: Batch) -> int:
        """What the model computes of the batch, padding counted."""
        return int(batch["input_ids"].numel())


class CausalObjective(Objective):
    """Predict the next token."""

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int | None) -> list[Any]:
        return encode_rows(rows, tokenizer, max_length)

    def collate(self, examples: Sequence[Any], pad_id: int, device: Any = None) -> Batch:
        return collate(examples, pad_id, device)

    def count(self, batch: Batch) -> int:
        return label_tokens(batch)


class PackedObjective(CausalObjective):
    """Predict the next token; the rows of a batch are documents of a single one."""

    def collate(self, examples: Sequence[Any], pad_id: int, device: Any = None) -> Batch:
        return collate_packed(examples, device)

    def tokens(self, batch: Batch) -> int:
        return self.positions(batch)


class Seq2SeqObjective(CausalObjective):
    """Answer what the encoder has read. Labels are the answer itself, and each of them is predicted, the first from the start token."""

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int | None) -> list[Any]:
        return encode_answers(rows, tokenizer, max_length)

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        """Of both sides."""
        return super().tokens(batch) + self.count(batch)

    def positions(self, batch: Batch) -> int:
        return super().positions(batch) + int(batch["labels"].numel())


class ClassificationObjective(Objective):
    """Name a text's class, its several classes, or a number. labels: outputs of the head.  problem: transformers' problem_type, or None."""

    def __init__(self, labels: int, problem: str | None = None) -> None:
        self.labels, self.problem = labels, problem

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int | None) -> list[Any]:
        return encode_labelled(rows, tokenizer, max_length, self.labels, self.problem)

    def collate(self, examples: Sequence[Any], pad_id: int, device: Any = None) -> Batch:
        return collate_classes(examples, pad_id, device)

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


def objective_of(model: nn.Module) -> Objective:
    """What a row is to a model, ours or transformers', by the name of its class.

    Raises LoraLabError for one that `fit` does not train: it would take the labels for something else, without a word.
    """
    name, config = type(base_of(model)).__name__, getattr(model, "config", None)
    if name.endswith("ForSequenceClassification"):
        return ClassificationObjective(config.num_labels, config.problem_type)  # type: ignore[union-attr]
    if getattr(config, "is_encoder_decoder", False) and name.endswith(SEQ2SEQ):
        return Seq2SeqObjective()
    if getattr(config, "is_encoder_decoder", False) or name.endswith(OTHERS):
        encoder = name.endswith(("BertModel", "RobertaModel"))
        hint = ": models.load(..., task='sequence-classification') puts a classifier's head on it" if encoder else ""
        raise LoraLabError(f"fit trains causal language models (next-token prediction), encoder-decoders and sequence classifiers; a {name} has "
                           f"another task{hint}")  # fmt: skip
    return CausalObjective()


def packed_objective_of(model: nn.Module) -> Objective:
    """The same with packed batches. Raises LoraLabError for a model that does not take document_lengths: its documents would see each other."""
    objective = objective_of(model)
    if type(objective) is CausalObjective and "document_lengths" in inspect.signature(model.forward).parameters:
        return PackedObjective()
    way_out = ", or load the model with lora_lab.models.load: its causal language models do" if type(objective) is CausalObjective else ""
    raise LoraLabError(f"packing=True: a {type(model).__name__} does not take document_lengths, so the rows of a batch would see each other: leave "
                       f"packing out (length buckets, the default, keep padding low){way_out}")  # fmt: skip


def label_tokens(batch: Batch) -> int:
    """Positions with a label, as a causal model counts them: the first has nothing before it to be predicted from."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())
