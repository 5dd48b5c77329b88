"""A table of the tasks beside a model: what each is, what it costs, how it began and at what scale it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .counting import count_parameters
from .embeddings import embedding_rms, rms
from .soft_prompt import Prompt

if TYPE_CHECKING:
    from .prompted_model import PromptedModel

COLUMNS = ("task", "method", "tokens", "parameters", "file bytes", "state", "rms", "began as")
RIGHT = (2, 3, 4, 6)  # columns of numbers
ITEM_BYTES = 4  # float32


def summary(prompted: PromptedModel) -> str:
    """One line for each task, then the scale of the model's words, and the totals.

    parameters: all that a method trains.  file bytes: of what the task inserts, in float32; a network's own file comes on top.
    rms: root mean square of what is inserted; of a prefix, keys and values.
    """
    rows = [COLUMNS, *(_row(prompted, name, prompt) for name, prompt in prompted.tasks.items())]  # type: ignore[arg-type]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) if i in RIGHT else cell.ljust(width) for i, cell, width in zip(range(len(row)), row, widths, strict=True))
             for row in rows]  # fmt: skip
    scale = f"the embedding's words have an rms of {embedding_rms(prompted.base):.3g}"
    return "\n".join([*(map(str.rstrip, lines) if prompted.tasks else ["no tasks"]), scale, str(count_parameters(prompted))])


def _row(prompted: PromptedModel, name: str, prompt: Prompt) -> tuple[str, ...]:
    with torch.no_grad():
        inserted = prompt()
    trains = any(parameter.requires_grad for parameter in prompt.parameters())
    state = ("active" if prompted.active == name else "off") + (", trains" if trains else ", frozen")
    method = prompt.method if prompt.hidden_size is None else f"{prompt.method} ({prompt.hidden_size} hidden)"
    method += "" if prompt.placement == "front" else f", {prompt.placement}"
    began = "" if prompt.initialization is None else str(prompt.initialization).partition(";")[0]
    count = sum(parameter.numel() for parameter in prompt.parameters())
    return (name, method, str(prompt.num_virtual_tokens), f"{count:,}", f"{inserted.numel() * ITEM_BYTES:,}", state, f"{rms(inserted):.3g}", began)
