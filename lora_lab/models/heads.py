"""One checkpoint, several tasks: an encoder's weights with a head for classes, for masked words, or with none.

    models.load("all-minilm-l6-v2", task="sequence-classification", num_labels=3)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLabError, did_you_mean
from .base import PretrainedModel

# task: how the classes are called that do it
TASKS = {"feature-extraction": ("Model", "EncoderModel"), "masked-lm": ("ForMaskedLM",), "sequence-classification": ("ForSequenceClassification",)}
CLASS_NAME = re.compile(r"(.+?)(Model|LMHeadModel|EncoderModel|For[A-Z]\w*)")


@dataclass(frozen=True)
class Head:
    """The head a checkpoint is asked to be loaded with. task: of TASKS; None is the one in config.json."""

    task: str | None = None
    num_labels: int | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise LoraLabError(f"task={self.task!r}: expected one of {', '.join(TASKS)}{did_you_mean(self.task, TASKS)}")
        if self.num_labels is not None and (isinstance(self.num_labels, bool) or not isinstance(self.num_labels, int) or self.num_labels < 1):
            raise LoraLabError(f"num_labels={self.num_labels!r}: expected a whole number of at least 1")

    def of(self, config: dict[str, Any], families: Collection[str]) -> dict[str, Any]:
        """The config.json of the model that is asked for. Raises LoraLabError where num_labels or problem_type have no classifier to be of."""
        found = class_of(config)
        name = found
        if self.task is not None and (match := CLASS_NAME.fullmatch(found)):
            names = [match[1] + ending for ending in TASKS[self.task]]
            name = next((each for each in names if each in families), names[0])
        own = {key: value for key in ("num_labels", "problem_type") if (value := getattr(self, key)) is not None}
        if own and not name.endswith("ForSequenceClassification"):
            raise LoraLabError(f"{', '.join(own)}: a {name} has no classes (task='sequence-classification' has)")
        labels = config.get("id2label")
        if self.num_labels not in (None, len(labels) if isinstance(labels, dict) else 0):
            config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        return {**config, **own, "architectures": [name]}


def class_of(config: dict[str, Any]) -> str:
    """The class config.json names."""
    names = config.get("architectures") or ["none given"]
    return str(names[0] if isinstance(names, list) else names)


def begin_head(model: PretrainedModel, missing: Collection[str]) -> dict[str, Tensor]:
    """Values for those of the missing parameters that are a new head's, as BERT began; warns that they are new.

    Weights are normal with the config's initializer_range, biases 0, norms 1.
    """
    new = [name for name in missing if name.startswith(tuple(f"{module}." for module in model.new_head))]
    if new:
        parts = sorted({name.rpartition(".")[0] for name in new})
        warnings.warn(f"the checkpoint has no {', '.join(parts)}: they begin at random, so train this {type(model).__name__} before using it",
                      stacklevel=5)  # fmt: skip
    return {name: _begun(name, model.get_parameter(name).shape, model.config.initializer_range) for name in sorted(new)}


def _begun(name: str, shape: torch.Size, spread: float) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.randn(shape) * spread if len(shape) > 1 else torch.ones(shape)
