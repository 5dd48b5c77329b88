"""Several tasks that write one text: each reads it with its own prompt, and the mean of their log-probabilities decides the next token.

    generate(Ensembled(prompted, ["a", "b", "c"]), prompts, tokenizer)

One batch of n times as many rows, one frozen model, one cache.
Source: Lester et al. 2021 (arXiv:2104.08691), section 6, where the members vote on classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .mixed_tasks import per_sample
from .prompted_model import PromptedModel


class Ensembled(nn.Module):
    """Called like the model, for generation: its logits [B, T, V] are the members' mean log-probabilities; its cache has the rows of all.

    Raises LoraLabError, when called, for a task the model does not have.
    """

    def __init__(self, prompted: PromptedModel, tasks: Sequence[str]) -> None:
        super().__init__()
        prompted.check_tasks(tasks, f"Ensembled({list(tasks)!r})")
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
        count = len(self.tasks)
        rows = next(len(inputs[name]) for name in ("input_ids", "decoder_input_ids", "inputs_embeds") if inputs.get(name) is not None)
        repeated = {name: torch.cat([value] * count) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with per_sample(self.prompted, [task for task in self.tasks for _ in range(rows)]):
            out = self.prompted(**repeated)
        members = out.logits.unflatten(0, (count, rows))
        out.logits = members.to(torch.promote_types(members.dtype, torch.float32)).log_softmax(-1).mean(0)
        return out
