"""Many tasks on one frozen model: which one, for the whole batch or row by row; and several of them asked at once.

    use(prompted, "sentiment")                                  one task for all rows; None is the model as it was
    with per_sample(prompted, ["a", None, "b"]): ...            a task for each row, in training and generation
    ensemble(prompted, ["a", "b", "c"], input_ids=ids)          every row with every task, in one batch
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.errors import LoraLabError, did_you_mean

from .prompted_model import PromptedModel, check_prompted

COMBINE = ("mean", "vote")
NOT_TOGETHER = {
    "labels": "it answers and does not learn; compare its predictions with them",
    "past_key_values": "each task reads the text with its own prompt; to write with several tasks, generate with ensembling.Ensembled",
    "encoder_outputs": "each task has the encoder read the text with its own prompt; give input_ids",
}


def use(prompted: PromptedModel, task: str | None) -> PromptedModel:
    """Make this the task of all rows; None switches prompts off. Returns the same model. What trains stays what it was.

    Raises LoraLabError for a task the model does not have.
    """
    check_prompted(prompted, "use")
    if task is not None:
        prompted.check_tasks([task], f"use({task!r})")
    prompted.active = task
    return prompted


@contextlib.contextmanager
def per_sample(prompted: PromptedModel, tasks: Sequence[str | None]) -> Iterator[None]:
    """Inside the block each row of the batch has the task of its name, or none: equal to running the rows one by one.

    tasks: a name or None for each row; methods and lengths may differ. A batch with k times as many rows takes each name for k rows in succession
    (beams); any other raises. Inside the block of `lora_lab.per_sample`, rows have adapters of their own as well.
    Raises LoraLabError for a task the model does not have.

    >>> import torch
    >>> from lora_lab.models import GPT2Config, GPT2LMHeadModel
    >>> from prompt_tuning_lab import inject
    >>> model = GPT2LMHeadModel(GPT2Config.from_dict({"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2})).eval()
    >>> prompted = inject(inject(model, 3, task="short"), 5, task="long")
    >>> ids = torch.arange(6)[None].expand(3, -1)
    >>> with per_sample(prompted, ["short", "long", None]):
    ...     logits = prompted(input_ids=ids).logits
    >>> torch.allclose(logits[2], model(input_ids=ids[:1]).logits[0], atol=1e-5)
    True
    """
    check_prompted(prompted, "per_sample")
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise LoraLabError(f"per_sample({tasks!r}): expected a list with a task (or None) for each row of the batch")
    prompted.check_tasks([task for task in tasks if task is not None], f"per_sample({list(tasks)!r})")
    before = prompted.rows
    try:
        prompted.rows = tuple(tasks)
        yield
    finally:
        prompted.rows = before


# Ensembles ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """What several tasks answer together. logits: [B, .., V], log-probabilities of "mean", numbers of votes of "vote".

    predictions: [B, ..], the answer.  members: [n, B, .., V], each task's own logits.
    """

    logits: Tensor
    predictions: Tensor
    members: Tensor


def ensemble(prompted: PromptedModel, tasks: Sequence[str], combine: str = "mean", **inputs: Any) -> Ensemble:
    """Ask every task about every row in one batch of n times as many rows, and put the answers together.

    combine: "mean" of log-probabilities, or majority "vote"; of equally many votes the mean decides.  inputs: the model's; each tensor has the batch
    first. Without gradients.
    Raises LoraLabError for an unknown task or combine, a model without logits, labels, and what a text has become before (a cache).
    Source: Lester et al. 2021 (arXiv:2104.08691), section 6: five prompts by majority vote, one copy of the model.
    """
    check_prompted(prompted, "ensemble")
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise LoraLabError(f"ensemble({tasks!r}): expected a list of at least one task")
    if combine not in COMBINE:
        raise LoraLabError(f"combine={combine!r}: expected one of {', '.join(COMBINE)}{did_you_mean(combine, COMBINE)}")
    for name, why in NOT_TOGETHER.items():
        if inputs.get(name) is not None:
            raise LoraLabError(f"ensemble with {name}: {why}")
    count, rows = len(tasks), _rows(inputs)
    repeated = {name: value.repeat(count, *[1] * (value.ndim - 1)) if _is_batch(value, rows) else value for name, value in inputs.items()}
    with per_sample(prompted, [task for task in tasks for _ in range(rows)]), torch.no_grad():
        out = prompted(**repeated)
    if getattr(out, "logits", None) is None:
        raise LoraLabError(f"ensemble: a {type(prompted.base).__name__} gives no logits of classes or words to put together")
    members = out.logits.unflatten(0, (count, rows))
    scores = members.to(torch.promote_types(members.dtype, torch.float32)).log_softmax(-1)
    mean = scores.mean(0)
    if combine == "mean":
        return Ensemble(mean, mean.argmax(-1), members)
    votes = torch.nn.functional.one_hot(members.argmax(-1), members.shape[-1]).sum(0).to(mean.dtype)
    tied = mean.masked_fill(votes < votes.amax(-1, keepdim=True), -torch.inf)
    return Ensemble(votes, tied.argmax(-1), members)


def _rows(inputs: dict[str, Any]) -> int:
    sizes = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    if not sizes:
        raise LoraLabError(f"ensemble got {sorted(inputs)}: expected tensors with the batch first, such as input_ids [B, T]")
    return max(sizes.values())


def _is_batch(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
