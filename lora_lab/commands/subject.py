"""What `finetune` is to teach which model: rows that say themselves how they are learned, or a user's files and a --task."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from .shared import load_model
from .task_options import check_without_task, gathered, load_for_task


@dataclass
class Subject:
    """rows, held_out: for `fit`.  own_modules: those that train beside the adapter.  told: of the data.

    material, reader: of a task.  eval_data: where the held-out rows are from, if from elsewhere.
    """

    model: Any
    tokenizer: Any
    rows: Any
    held_out: Any
    own_modules: list[str] | None = None
    told: str | None = None
    material: Any = None
    reader: Any = None
    eval_data: str | None = None

    def record(self, folder: Path) -> None:
        """Write beside the adapter what it was taught."""
        from ..tasks.record import write_record

        if self.material is not None:
            write_record(folder, self.material, self.reader, self.eval_data)

    def quality(self, model: Any) -> float | None:
        """On the held-out rows, where that is cheap: a class is one pass, a text many."""
        if self.material is None or self.material.classes is None:
            return None
        return float(self.reader.score(model, self.material.validation))


def subject_of(options: argparse.Namespace, precision: str, device: str | None, progress: bool = True) -> Subject:
    """progress: bars on stderr. Raises LoraLabError, before a model is loaded, for data that cannot be learned from."""
    check_without_task(options)
    if options.task is not None:
        return _of_task(options, precision, device, progress)
    if options.template is not None:
        raise LoraLabError(f"--template {options.template!r} needs --task")
    from .. import data

    rows, held_out = data.load(options.data)
    if options.eval_data:
        held_out = data.load(options.eval_data)[0]
    model, tokenizer = load_model(options, precision, device)
    return Subject(model, tokenizer, rows, held_out)


def _of_task(options: argparse.Namespace, precision: str, device: str | None, progress: bool) -> Subject:
    from ..data.tables.folders import TRAIN, VALIDATION
    from ..tasks import Reading, preview

    settings: dict[str, Any] = {"parts": {VALIDATION: options.eval_data}, "wanted": (TRAIN, VALIDATION)} if options.eval_data else {}
    material, words = gathered(options, **settings)
    material.part(TRAIN)
    model, tokenizer = load_for_task(options, precision, device)
    reader = material.reader(model, tokenizer, Reading(precision, progress=progress), words)
    material = material.within(reader, model, getattr(options, "max_length", None))
    model = reader.prepared(model, material.train)
    return Subject(model, tokenizer, reader.examples(material.train), reader.examples(material.validation),
                   ["classifier"] if reader.new_head else None, preview(material, reader), material, reader, options.eval_data)  # fmt: skip
