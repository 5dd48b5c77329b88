"""Classes by a classifier's head, and how many of them are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batching import collate_classes
from ...data.classification import MULTI, REGRESSION, encode_labelled, problem_of
from ...data.formats import Rows
from ...data.objectives import ClassificationObjective, objective_of
from ...errors import LoraLabError
from ...models.base import longest_row, pad_id_of
from .passes import evaluating, in_batches

Class = Hashable | Sequence[int]
NO_LABEL = {MULTI: lambda labels: [0] * labels, REGRESSION: lambda labels: [0.0] * labels if labels > 1 else 0.0}


# Predictions ----------------------------------------------------------------------------------------------------------------


def class_logits(model: nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any = None, *, batch_size: int = 32, max_length: int | None = None,
                 precision: str = "fp32", progress: bool = True) -> Tensor:  # fmt: skip
    """What the head says of each row, [rows, labels], float32 (float64 of a float64 model), on the CPU.

    model: a ...ForSequenceClassification, ours or transformers'.  rows: {"text"} or {"text", "text_pair"} or {"input_ids"}; a label is not
    looked at.  Raises LoraLabError for another model, a row that cannot be read, and an answer that is not a number.
    """
    objective = _classifier(model)
    examples = _encode(rows, tokenizer, objective, longest_row(model, max_length))
    device, pad = next(model.parameters()).device, pad_id_of(tokenizer)
    found: dict[int, Tensor] = {}
    with evaluating(model, precision):
        for indices in in_batches([len(example["input_ids"]) for example in examples], batch_size, "classify", progress):
            batch = collate_classes([examples[i] for i in indices], pad, device)
            logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
            found.update(zip(indices, logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)), strict=True))
    for index in range(len(examples)):
        if found[index].isnan().any():
            raise LoraLabError(f"the logits of row {index} are not numbers: the weights hold NaN, or the precision is too small ({precision})")
    return torch.stack([found[index] for index in range(len(examples))])


def predict_classes(model: nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any = None, **options: Any) -> list[Any]:
    """Of each row the likeliest class (the first of equal ones); of several at once 1 or 0 for each; of a regression the number.

    options: as `class_logits` takes them.
    """
    objective, logits = _classifier(model), class_logits(model, rows, tokenizer, **options)
    problem = _problem(objective, rows)
    if problem == REGRESSION:
        return [row[0] if objective.labels == 1 else row for row in logits.tolist()]
    if problem == MULTI:
        return [[int(value > 0) for value in row] for row in logits.tolist()]
    return [row.index(max(row)) for row in logits.tolist()]


def _classifier(model: nn.Module) -> ClassificationObjective:
    objective = objective_of(model)
    if not isinstance(objective, ClassificationObjective):
        raise LoraLabError(f"a {type(model).__name__} has no head for classes: load it with task='sequence-classification', or score_choices")
    return objective


def _problem(objective: ClassificationObjective, rows: Sequence[dict[str, Any]]) -> str:
    return objective.problem or problem_of(rows[0], objective.labels)


def _encode(rows: Sequence[dict[str, Any]], tokenizer: Any, objective: ClassificationObjective, max_length: int | None) -> list[dict[str, Any]]:
    if not len(rows):
        raise LoraLabError("the data holds no rows: there is nothing to classify")
    problem = _problem(objective, rows)
    label = NO_LABEL.get(problem, lambda labels: 0)(objective.labels)
    unlabelled = [{**row, "label": label} if isinstance(row, dict) else row for row in rows]
    source = Rows(unlabelled, rows.source, rows.lines) if isinstance(rows, Rows) else unlabelled
    return encode_labelled(source, tokenizer, max_length, objective.labels, problem)


# Scores ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class F1:
    """F1 = 2 TP / (2 TP + FP + FN). per_class: of each class that is in the labels or predictions (0 where no prediction is right).

    macro: their mean, every class the same weight.  micro: of all decisions together; with one class per row that is the accuracy.
    """

    macro: float
    micro: float
    per_class: dict[Any, float]


def accuracy(predictions: Sequence[Class], labels: Sequence[Class]) -> float:
    """The share of rows that are right; of several classes at once: right in all of them.

    >>> accuracy([0, 1, 1, 2], [0, 1, 2, 2])
    0.75
    """
    pairs = list(zip(*_checked(predictions, labels), strict=True))
    return sum(prediction == label for prediction, label in pairs) / len(pairs)


def f1(predictions: Sequence[Class], labels: Sequence[Class]) -> F1:
    """predictions, labels: a class for each row (a number or a word), or a list of 1 or 0 for each class.

    >>> f1([0, 1, 1, 2], [0, 1, 2, 2])
    F1(macro=0.7777777777777777, micro=0.75, per_class={0: 1.0, 1: 0.6666666666666666, 2: 0.6666666666666666})
    """
    given = _checked(predictions, labels)
    predicted, wanted = ([_classes(row) for row in rows] for rows in given)
    right = Counter(name for ours, theirs in zip(predicted, wanted, strict=True) for name in ours & theirs)
    named = Counter(name for rows in (predicted, wanted) for row in rows for name in row)  # 2 TP + FP + FN
    first = given[1][0]
    classes = range(len(first)) if isinstance(first, tuple) else sorted(named, key=lambda name: (str(type(name)), name))
    per_class = {name: 2 * right[name] / max(named[name], 1) for name in classes}
    return F1(sum(per_class.values()) / len(per_class), 2 * right.total() / max(named.total(), 1), per_class)


def _classes(row: Any) -> set[Any]:
    return {index for index, chosen in enumerate(row) if chosen} if isinstance(row, tuple) else {row}


def _checked(predictions: Sequence[Class], labels: Sequence[Class]) -> tuple[list[Any], list[Any]]:
    """Both as lists of plain values. Raises LoraLabError for lists that cannot be compared."""
    sides = [[tuple(row) if isinstance(row, (list, tuple)) else row for row in _plain(rows)] for rows in (predictions, labels)]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise LoraLabError(f"{len(sides[0])} predictions and {len(sides[1])} labels: expected as many of both, and at least one")
    kinds = {_kind(row) for rows in sides for row in rows}
    if len(kinds) > 1:
        raise LoraLabError(f"predictions and labels are of different kinds ({', '.join(sorted(kinds))}): expected one class for each row, all "
                           "numbers or all words, or 1 or 0 for each of the same classes")  # fmt: skip
    return sides[0], sides[1]


def _kind(row: Any) -> str:
    return f"lists of {len(row)}" if isinstance(row, tuple) else "words" if isinstance(row, str) else "numbers"


def _plain(rows: Any) -> Any:
    return rows.tolist() if hasattr(rows, "tolist") else rows
