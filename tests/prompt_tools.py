"""Prompted models with random prompts, and the reference they are compared with: torch.cat of embeddings, a row at a time, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prompt_tuning_lab import PromptedModel, inject

LENGTHS = {"a": 5, "b": 2, "c": 7}  # tasks and their virtual tokens
ROWS = [[5, 9, 3, 40, 22, 17, 8], [11, 4, 30, 6, 25], [50, 7, 33, 12]]
EXACT = {"rtol": 0.0, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}  # transformers' RMSNorms and losses are float32 whatever the model


@torch.no_grad()
def randomised(prompted: PromptedModel, std: float = 0.5, seed: int = 3) -> PromptedModel:
    """Every number of every prompt random, in the base's dtype where that is float64, so that equality is algebra."""
    generator = torch.Generator().manual_seed(seed)
    if next(prompted.base.parameters()).dtype == torch.float64:
        prompted.tasks.double()
    for parameter in prompted.tasks.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return prompted


def with_tasks(base: nn.Module, lengths: dict[str, int] | None = None, **options: Any) -> PromptedModel:
    """Tasks a, b, c of 5, 2 and 7 virtual tokens; c is the active one."""
    prompted: Any = base
    for task, length in (lengths or LENGTHS).items():
        prompted = inject(prompted, length, init="random", task=task, **options)
    return randomised(prompted)


def rows_of(prompted: PromptedModel, task: str | None) -> Tensor:
    """[P, H]; nothing for None."""
    if task is None:
        return torch.zeros(0, prompted.get_input_embeddings().embedding_dim)
    return prompted.prompt(task)()


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """ids and mask, [B, T] each."""
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)]
    mask = [[1] * len(row) + pad if side == "right" else pad + [1] * len(row) for row, pad in zip(rows, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def joined(prompted: PromptedModel, task: str | None, row: list[int], after: int = 0) -> Tensor:
    """[1, P + T, H], prompt and text by hand. after: words of the text before the prompt."""
    words = prompted.get_input_embeddings()(torch.tensor(row))
    return torch.cat((words[:after], rows_of(prompted, task).to(words.dtype), words[after:]))[None]


def alone(prompted: PromptedModel, task: str | None, row: list[int], after: int = 0, **inputs: Any) -> Tensor:
    """Logits of one row's words, [T, V], by the reference."""
    length = len(rows_of(prompted, task))
    logits = prompted.base(inputs_embeds=joined(prompted, task, row, after), **inputs).logits[0]
    return torch.cat((logits[:after], logits[after + length :]))


def real(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Of each row those of its words."""
    return [each[kept.bool()] for each, kept in zip(logits, mask, strict=True)]


def gradients(prompted: PromptedModel, **inputs: Any) -> dict[str, Tensor]:
    """Of the loss, of every parameter that has one."""
    prompted.zero_grad()
    prompted(**inputs).loss.backward()
    found = {name: p.grad.clone() for name, p in prompted.named_parameters() if p.grad is not None}
    prompted.zero_grad()
    return found
