"""What the methods of a comparison have in common: where a fresh model comes from, the rows, and how long is trained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.base import context_of
from ..tasks import Material, Reader
from ..tasks.base import digest
from ..training.precision import storage_dtype
from .forgetting import ForgettingProbe

Source = Callable[[torch.dtype], Any]  # a dtype -> a model with weights in it, as it was published


@dataclass
class Workbench:
    """training: fields of TrainConfig that all trained methods have: epochs or max_steps, micro_batch_size, ...

    shots: how many examples few-shot tries.  rank, target_modules: of LoRA.  num_virtual_tokens: of prompts.
    elsewhere: another metric on other data, which tells what was forgotten.  base_sha256: of the model's weights, which results are of.
    file_bytes: of what was saved already.
    """

    source: Source
    material: Material
    reader: Reader
    training: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 8
    target_modules: str | list[str] = "all-linear"
    num_virtual_tokens: int = 20
    shots: tuple[int, ...] = (1, 2, 4)
    elsewhere: ForgettingProbe | None = None
    base_sha256: str | None = None
    file_bytes: dict[Any, int] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return self.reader.reading.precision

    @property
    def parameters(self) -> int:
        """Of the model as it was published."""
        return self._published[0]

    @property
    def context(self) -> int | None:
        """Tokens that the model as it was published can read."""
        return self._published[1]

    @functools.cached_property
    def _published(self) -> tuple[int, int | None]:
        """Both of one model, which is loaded for them alone."""
        model = self.fresh()
        return sum(parameter.numel() for parameter in model.parameters()), context_of(model)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What a result depends on, whatever the method; the rows by a digest of all that they say, the answers, too."""
        material, reading = self.material, self.reader.reading
        rows = {part: len(table) for part, table in material.parts.items()}
        texts = [json.dumps(row, sort_keys=True) for table in material.parts.values() for row in table]
        classes = None if material.classes is None else list(material.classes.names)
        base = {} if self.base_sha256 is None else {"base_sha256": self.base_sha256}
        return {**base, "task": material.task.name, "source": material.source, "rows": rows, "digest": digest(*texts)[:16], "classes": classes,
                "words": self.reader.way.words, "training": {**self.training}, "precision": self.precision, "generation": {**reading.generation},
                "rank": self.rank, "target_modules": self.target_modules, "num_virtual_tokens": self.num_virtual_tokens}  # fmt: skip

    def fresh(self, whole: bool = False) -> Any:
        """A model that nobody has taught. whole: all of it is to train, so its weights are float32 but in pure 16 bit."""
        narrow = not whole or self.precision == "bf16"
        return self.source(storage_dtype(self.precision) if narrow else torch.float32)

    def learner(self, rows: Any, whole: bool = False) -> Any:
        """A fresh model that can learn the task: an encoder with a head that begins as the probe of these rows."""
        return self.reader.prepared(self.fresh(whole), rows)
