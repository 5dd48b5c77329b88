"""Perplexity: how many words a model hesitates between, on average, before the right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...data.objectives import ClassificationObjective, objective_of
from ...errors import LoraLabError
from ...models.base import longest_row, pad_id_of
from ...targets import lora_layers
from ..config import TrainConfig
from ..loop import mean_loss
from .passes import check_batch_size


def perplexity(model: nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any = None, *, batch_size: int = 8, max_length: int | None = None,
               precision: str = "fp32", progress: bool = True) -> float:  # fmt: skip
    """exp(mean loss over labelled tokens): Jelinek et al. 1977. A model that knows nothing has the vocabulary's size, a perfect one 1.

    rows: as `fit` takes them; the prompt's tokens have no label and do not count.  max_length: tokens a row may have (None: the context).
    Numbers of models with other tokenizers cannot be compared: their tokens are not of one size.
    Raises LoraLabError for rows that cannot be evaluated, and for a model whose loss is none over tokens.
    """
    objective = objective_of(model)
    if isinstance(objective, ClassificationObjective):
        raise LoraLabError(f"a {type(model).__name__} names classes and has no perplexity: use predict_classes, accuracy and f1")
    check_batch_size(batch_size)
    examples = objective.encode(rows, tokenizer, longest_row(model, max_length))
    settings = TrainConfig(micro_batch_size=batch_size, precision=precision, progress=progress)
    loss = mean_loss(model, objective, examples, settings, pad_id_of(tokenizer))
    if math.isnan(loss):
        raise LoraLabError(f"the loss is not a number: the weights{' or adapters' if lora_layers(model) else ''} hold NaN or infinity")
    return math.exp(loss) if loss < 709 else math.inf  # beyond, exp leaves float64
