"""What every evaluation does around the model: eval mode, no gradients, like lengths together; and what a prompt is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...data.batching import length_buckets
from ...data.seq2seq import question_of
from ...data.templates import prompt_of
from ...errors import LoraLabError, did_you_mean
from ...models.base import in_mode
from ...models.progress import watched
from ..precision import PRECISIONS

Prompt = str | Sequence[int] | Mapping[str, Any]


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Eval mode, no gradients, and the autocast of a mixed precision; each module's mode comes back."""
    if precision not in PRECISIONS:
        raise LoraLabError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}")
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.no_grad(), PRECISIONS[precision].autocast(device):
        yield


def in_batches(lengths: Sequence[int], batch_size: int, what: str, progress: bool) -> Iterable[list[int]]:
    """Indices in batches, like lengths together; a bar on stderr where it takes long."""
    check_batch_size(batch_size)
    return watched(length_buckets(lengths, batch_size), what, progress)


def check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise LoraLabError(f"batch_size={batch_size!r}: expected a whole number of at least 1")


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Any, answers: bool) -> list[list[int]]:
    """Token ids of each prompt: a text as `models.generate` takes it, ids, or a row whose answer is left out.

    answers: of an encoder-decoder, which reads plain words with its tokenizer's special tokens.
    Raises LoraLabError, naming the prompt, for one that is empty or none of these.
    """
    if isinstance(prompts, (str, Mapping)) or not len(prompts):
        raise LoraLabError(f"prompts is {prompts!r:.60}: expected a list with at least one prompt in it")
    return [_ids(prompt, f"prompt {index}", tokenizer, answers) for index, prompt in enumerate(prompts)]


def _ids(prompt: Prompt, where: str, tokenizer: Any, answers: bool) -> list[int]:
    if isinstance(prompt, (str, Mapping)) and tokenizer is None:
        raise LoraLabError(f"{where} is text, so a tokenizer is needed")
    if isinstance(prompt, Mapping):
        if "messages" not in prompt and "instruction" not in prompt:
            raise LoraLabError(f"{where} has the fields {sorted(prompt)}: expected a text, token ids, or a row with instruction or messages")
        prompt = question_of(dict(prompt)) if answers else prompt_of(dict(prompt), tokenizer)
    try:
        ids = tokenizer.encode(prompt, add_special_tokens=answers) if isinstance(prompt, str) else [int(i) for i in prompt]
    except (TypeError, ValueError):
        raise LoraLabError(f"{where} is {prompt!r:.60}: expected a text, token ids, or a row with instruction or messages") from None
    if not ids:
        raise LoraLabError(f"{where} is empty: expected at least one token")
    return list(ids)
