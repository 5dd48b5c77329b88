"""Many tasks on one frozen model: which one, for the whole batch or row by row.

    use(prompted, "sentiment")                                  one task for all rows; None is the model as it was
    with per_sample(prompted, ["a", None, "b"]): ...            a task for each row, in training and generation
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from lora_lab.errors import LoraLabError

from .prompted_model import PromptedModel, check_prompted


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
