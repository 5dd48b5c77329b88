"""What was forgotten: what a model could do before it was taught, measured before and after.

    a model that writes     the perplexity of answers of another task
    an encoder              how often the nearest of all summaries is the dialogue's own: what its vectors were for
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.formats import Row
from ..data.tables.folders import ALL
from ..errors import LoraLabError
from ..models.base import longest_row
from ..models.embedding import embed, pooling_of
from ..tasks import Reader, gather, model_kind
from ..training.evaluation import class_logits, perplexity
from ..wrapping import base_of

LIMIT = 48  # rows: enough to see a change, few enough to be read for every seed
USUAL = {"encoder": ("summarization", "dialogues"), "instruction": ("reviews", "reviews"), "other": ("instruction", "instructions")}


@dataclass(frozen=True)
class ForgettingProbe:
    """name: what is measured, and on what.  measure: of a model, with whatever it has been taught."""

    name: str
    measure: Callable[[Any], float]


def forgetting_probe(model: Any, tokenizer: Any, reader: Reader, task: str, source: str | None = None, limit: int = LIMIT,
                     max_length: int | None = None) -> ForgettingProbe:  # fmt: skip
    """What this model is likely to forget while it learns `task`. source: other data than the bundled.  limit: rows of it.  max_length: their tokens.

    Raises LoraLabError for a classifier: its head can do nothing else.
    """
    kind = model_kind(model)
    if kind == "classifier":
        raise LoraLabError(f"a {type(model).__name__} does nothing but its classes, so nothing else can be forgotten")
    other, bundled = USUAL["encoder" if kind == "encoder" else task if task in USUAL else "other"]
    material, name = gather(other, source or bundled, wanted=()).first(all=limit), Path(source or bundled).name
    if kind == "encoder":
        return ForgettingProbe(f"own summary nearest, {name}", lambda taught: own_nearest(taught, tokenizer, material.part(ALL), reader))
    there = material.reader(model, tokenizer, reader.reading)
    fitting = material.within(there, model, max_length).part(ALL)
    settings: dict[str, Any] = {"batch_size": reader.reading.batch_size, "precision": reader.reading.precision, "progress": reader.reading.progress}
    return ForgettingProbe(f"perplexity, {name}", lambda taught: perplexity(taught, there.examples(fitting), tokenizer, **settings))


def own_nearest(model: Any, tokenizer: Any, rows: Sequence[Row], reader: Reader) -> float:
    """The share of dialogues whose own summary has the nearest vector of all summaries. rows: {"dialogue", "summary"}."""
    texts = [row["dialogue"] for row in rows] + [row["summary"] for row in rows]
    vectors = torch.nn.functional.normalize(pooled(model, tokenizer, texts, reader), dim=-1)
    asked, there = vectors[: len(rows)], vectors[len(rows) :]
    return float(((asked @ there.T).argmax(1) == torch.arange(len(rows))).double().mean())


def pooled(model: Any, tokenizer: Any, texts: Sequence[str], reader: Reader) -> torch.Tensor:
    """[n, H], float32: of an encoder, or of one that got a head, whatever stands before its text; a text beyond the context is cut."""
    if model_kind(model) == "encoder":
        return embed(model, tokenizer, texts, progress=reader.reading.progress).float().cpu()
    limit = longest_row(model, pooling_of(model).max_length)
    cut = {"truncation": True, "max_length": limit} if limit is not None else {}
    rows = [{"input_ids": [int(i) for i in tokenizer(text, **cut)["input_ids"]]} for text in texts]
    with without_head(base_of(model)):
        return class_logits(model, rows, tokenizer, precision=reader.reading.precision, progress=reader.reading.progress)


@contextlib.contextmanager
def without_head(classifier: Any) -> Iterator[None]:
    """Its logits are what the head reads."""
    head, classifier.classifier = classifier.classifier, IdentityHead()
    try:
        yield
    finally:
        classifier.classifier = head


class IdentityHead(nn.Module):
    """x, in float32. It has a weight's dtype, as a linear head has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
