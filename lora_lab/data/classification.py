"""Texts with a label, for sequence classifiers.

    {"text": "...", "label": 2}                              a class, 0 to num_labels - 1
    {"text": "...", "text_pair": "...", "label": 0}          of two texts
    {"text": "...", "label": 3.5}                            a number (regression: num_labels=1)
    {"text": "...", "label": [1, 0, 1]}                      several classes at once: 1 or 0 for each

or "input_ids" (and "token_type_ids", of a pair) instead of the texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import LoraLabError
from .formats import Row, check_labelled, each_encoded
from .templates import check_size, need_tokenizer, token_ids

Label = int | float | list[float]
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' words


def encode_labelled(rows: Sequence[Row], tokenizer: Any, max_length: int | None, labels: int, problem: str | None = None) -> list[dict[str, Any]]:
    """Each row as {"input_ids", "label"}, and "token_type_ids" where it has two texts.

    labels: outputs of the head.  problem: transformers' problem_type; None is decided by `labels` and the rows.
    Raises LoraLabError, naming the row, for one without text or label, with a label the head has no output for, or beyond max_length.
    """

    def encode(row: Row, where: str) -> dict[str, Any]:
        nonlocal problem
        example = _encode(row, tokenizer, where, max_length)
        _check_length(len(example["input_ids"]), max_length, where)
        problem = problem or problem_of(row, labels)  # the first row's is that of all
        return {**example, "label": label_of(row, labels, problem, where)}

    return each_encoded(rows, encode)


def problem_of(row: Row, labels: int) -> str:
    """What transformers would take the first row's label for: one output is a number, a list several classes, else one class."""
    if labels == 1:
        return REGRESSION
    return MULTI if isinstance(row.get("label"), (list, tuple)) else SINGLE


def label_of(row: Row, labels: int, problem: str, where: str) -> Label:
    """The row's label as the loss takes it: an int, a float, or a list of floats. Raises LoraLabError, beginning with `where`."""
    if "label" not in row:
        raise LoraLabError(f"{where}: the row has no 'label' (its fields are {sorted(row)}): a classifier's rows are text (or input_ids) and label")
    label = row["label"]
    if problem == SINGLE:
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= int(label) < labels:
            raise LoraLabError(f"{where}: label {label!r}, expected a class, 0 to {labels - 1} (the model has num_labels={labels})")
        return int(label)
    if problem == REGRESSION and labels == 1:
        return _number(label, "a number", where)
    if not isinstance(label, (list, tuple)) or len(label) != labels:
        expected = "1 or 0 for each class" if problem == MULTI else "numbers"
        raise LoraLabError(f"{where}: label {label!r}, expected a list of {labels} {expected} (the model has num_labels={labels})")
    return [_number(each, "numbers in the list", where) for each in label]


def _number(value: Any, expected: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise LoraLabError(f"{where}: label {value!r}, expected {expected}")
    return float(value)


def _encode(row: Row, tokenizer: Any, where: str, max_length: int | None) -> dict[str, list[int]]:
    if not isinstance(row, Mapping):
        raise LoraLabError(f"{where}: a row is a {type(row).__name__}, expected an object with text (or input_ids) and label")
    if "input_ids" in row:
        return _encoded_already(row, where)
    check_labelled(row, where)
    texts = [row["text"], *([row["text_pair"]] if row.get("text_pair") else [])]  # an empty second text is none
    check_size(texts, max_length, where)
    need_tokenizer(tokenizer, where)
    encoded = tokenizer(*texts)
    return _without_idle_types({name: [int(i) for i in encoded[name]] for name in ("input_ids", "token_type_ids") if name in encoded})


def _encoded_already(row: Row, where: str) -> dict[str, list[int]]:
    """Ids and token types as given; positions that the row's own attention_mask calls padding are dropped."""
    given = {name: token_ids(row[name], where) for name in ("input_ids", "token_type_ids", "attention_mask") if name in row}
    mask = given.pop("attention_mask", [1] * len(given["input_ids"]))
    for name, values in {**given, "attention_mask": mask}.items():
        if len(values) != len(given["input_ids"]):
            raise LoraLabError(f"{where}: {len(given['input_ids'])} input_ids but {len(values)} {name}: expected one each")
    kept = [index for index, text in enumerate(mask) if text]
    return _without_idle_types({name: [values[index] for index in kept] for name, values in given.items()})


def _without_idle_types(example: dict[str, list[int]]) -> dict[str, list[int]]:
    """All token types 0 is what a model takes without any."""
    return example if any(example.get("token_type_ids", ())) else {"input_ids": example["input_ids"]}


def _check_length(tokens: int, max_length: int | None, where: str) -> None:
    if not tokens:
        raise LoraLabError(f"{where}: the row has no tokens: there is nothing to learn from it")
    if max_length is not None and tokens > max_length:
        raise LoraLabError(f"{where}: the row has {tokens} tokens, but max_length, or the model's context, is {max_length}: shorten the text, give "
                           f"input_ids=tokenizer(text, truncation=True, max_length={max_length})['input_ids'], or raise max_length")  # fmt: skip
