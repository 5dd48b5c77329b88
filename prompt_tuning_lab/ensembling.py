"""Several tasks asked at once: every row with every task, and their answers put together.

    ensemble(prompted, ["a", "b", "c"], input_ids=ids)                     classes or words, by mean or by vote
    generate(Ensembled(prompted, ["a", "b", "c"]), prompts, tokenizer)     one text: the mean of their log-probabilities decides the next token

One batch of n times as many rows, one frozen model, one cache.
Source: Lester et al. 2021 (arXiv:2104.08691), section 6: five prompts by majority vote, one copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError, did_you_mean

from .mixed_tasks import per_sample
from .prompted_model import PromptedModel, check_prompted

COMBINE = ("mean", "vote")
NOT_TOGETHER = {
    "labels": "it answers and does not learn; compare its predictions with them",
    "past_key_values": "each task reads the text with its own prompt; to write with several tasks, generate with ensembling.Ensembled",
    "encoder_outputs": "each task has the encoder read the text with its own prompt; give input_ids",
}


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
    """
    check_members(prompted, tasks, "ensemble")
    if combine not in COMBINE:
        raise LoraLabError(f"combine={combine!r}: expected one of {', '.join(COMBINE)}{did_you_mean(combine, COMBINE)}")
    for name, why in NOT_TOGETHER.items():
        if inputs.get(name) is not None:
            raise LoraLabError(f"ensemble with {name}: {why}")
    with torch.no_grad():
        _, members = _asked(prompted, tasks, inputs)
    mean = _mean(members)
    if combine == "mean":
        return Ensemble(mean, mean.argmax(-1), members)
    chosen = members.argmax(-1).movedim(0, -1)  # [B, .., n]
    votes = torch.zeros_like(mean).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=mean.dtype))
    tied = mean.masked_fill(votes < votes.amax(-1, keepdim=True), -torch.inf)
    return Ensemble(votes, tied.argmax(-1), members)


class Ensembled(nn.Module):
    """Called like the model, for generation: its logits [B, T, V] are the members' mean log-probabilities; its cache has the rows of all.

    Raises LoraLabError for a task the model does not have, and without any.
    """

    def __init__(self, prompted: PromptedModel, tasks: Sequence[str]) -> None:
        super().__init__()
        check_members(prompted, tasks, "Ensembled")
        self.prompted, self.tasks = prompted, list(tasks)

    @property
    def lora_base(self) -> nn.Module:
        return self.prompted.base

    @property
    def config(self) -> Any:
        return self.prompted.config

    @property
    def virtual_tokens(self) -> int:
        """Of the longest member."""
        return 0 if self.prompted.kind.encodes else max(self.prompted.prompt(task).num_virtual_tokens for task in self.tasks)

    def forward(self, **inputs: Any) -> Any:
        out, members = _asked(self.prompted, self.tasks, inputs)
        out.logits = _mean(members)
        return out


def check_members(prompted: Any, tasks: Any, what: str) -> None:
    check_prompted(prompted, what)
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise LoraLabError(f"{what}({tasks!r}): expected a list of at least one task")
    prompted.check_tasks(tasks, f"{what}({list(tasks)!r})")


def _asked(prompted: PromptedModel, tasks: Sequence[str], inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """What the model answers to every row with every task, and its logits, [n, B, .., V]."""
    count, rows = len(tasks), _rows(inputs)
    repeated = {name: torch.cat([value] * count) if _is_batch(value, rows) else value for name, value in inputs.items()}
    with per_sample(prompted, [task for task in tasks for _ in range(rows)]):
        out = prompted(**repeated)
    if getattr(out, "logits", None) is None:
        raise LoraLabError(f"ensemble: a {type(prompted.base).__name__} gives no logits of classes or words to put together")
    return out, out.logits.unflatten(0, (count, rows))


def _mean(members: Tensor) -> Tensor:
    """Of log-probabilities, in float32 at least: [n, B, .., V] -> [B, .., V]."""
    return members.to(torch.promote_types(members.dtype, torch.float32)).log_softmax(-1).mean(0)


def _rows(inputs: dict[str, Any]) -> int:
    sizes = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    if not sizes:
        raise LoraLabError(f"ensemble got {sorted(inputs)}: expected tensors with the batch first, such as input_ids [B, T]")
    return max(sizes.values())


def _is_batch(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
