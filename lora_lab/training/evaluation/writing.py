"""What a model writes, in batches, and whether it comes to an end by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.base import is_encoder_decoder
from ...models.generation import generate
from .passes import Prompt, in_batches, prompt_ids


@dataclass(frozen=True)
class Written:
    """ended: the model stopped by itself, before the room it had was used up."""

    text: str
    ended: bool


def write(model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, *, batch_size: int = 8, seed: int = 0, progress: bool = True,
          **generation: Any) -> list[Written]:  # fmt: skip
    """The model's text for each prompt, in their order, generated in batches of like length.

    prompts: texts, token ids, or rows, whose own answer is left out.  seed: prompt i samples from its own stream seed + i.
    generation: as `models.generate` takes it (max_new_tokens, temperature, ...); greedy without, and then a prompt that comes again is not
    answered again.
    """
    rows, written = prompt_ids(prompts, tokenizer, is_encoder_decoder(model)), dict[int, Written]()
    alike = [*range(len(rows))] if generation.get("temperature") else first_alike(rows)
    asked = sorted({*alike})
    for batch in in_batches([len(rows[i]) for i in asked], batch_size, "generate", progress):
        indices = [asked[place] for place in batch]
        made = generate(model, [rows[i] for i in indices], tokenizer, seed=[seed + i for i in indices], **generation)
        for index, text, ended in zip(indices, made.texts, made.ended, strict=True):
            written[index] = Written(text, ended)
    return [written[index] for index in alike]


def first_alike(rows: Sequence[Sequence[int]]) -> list[int]:
    """For each row, the place of the first that is the same.

    >>> first_alike([[1, 2], [3], [1, 2]])
    [0, 1, 0]
    """
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(row), place) for place, row in enumerate(rows)]


def clean_endings(written: Sequence[Written]) -> float:
    """The share of texts that say something and then stop, 0 to 1.

    >>> clean_endings([Written("Yes.", True), Written("Yes, and then", False), Written(" ", True), Written("No.", True)])
    0.5
    """
    return sum(each.ended and bool(each.text.strip()) for each in written) / len(written)
