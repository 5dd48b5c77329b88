"""Counting what a prompted model trains."""

from __future__ import annotations

import math

from torch import nn

import lora_lab
from lora_lab.analysis import ParameterCount


class PromptCount(ParameterCount):
    """Numbers of parameters, a tied one counted once. adapter: all prompts, and LoRA where the base has it. base + adapter == total."""

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({percent_text(self.trainable_percent)} %)"


def count_parameters(prompted: nn.Module) -> PromptCount:
    """Trainable, prompt and base parameters of a prompted model; of any other, those that `lora_lab.count_parameters` counts.

    >>> print(count_parameters(nn.Linear(512, 64, bias=False)))
    32,768 of 32,768 parameters are trainable (100.00 %)
    """
    tasks, base = getattr(prompted, "tasks", None), getattr(prompted, "base", None)
    if not isinstance(tasks, nn.ModuleDict) or not isinstance(base, nn.Module):
        tasks, base = nn.ModuleDict(), prompted
    of_base, prompts = lora_lab.count_parameters(base), list(tasks.parameters())
    trainable = of_base.trainable + sum(p.numel() for p in prompts if p.requires_grad)
    return PromptCount(trainable, of_base.adapter + sum(p.numel() for p in prompts), of_base.base)


def percent_text(percent: float) -> str:
    """Two decimals; of less than one per cent, two figures.

    >>> percent_text(12.1), percent_text(0.00018391), percent_text(0.0)
    ('12.10', '0.00018', '0.00')
    """
    return f"{percent:.{max(2, 1 - math.floor(math.log10(percent))) if percent > 0 else 2}f}"
