"""python -m lora_lab evaluate --task: how well a model does what is asked of it, without its adapter and with it."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import LoraLabError
from .shared import check_adapter, generation_of, precision_of
from .task_options import gathered, load_for_task

Columns = dict[str, dict[str, float]]
SPLITS = ("test", "validation", "train", "all")
ELSEWHERE = ("metric", "choices", "normalise", "stemmer")  # options of evaluation without a task


def run(options: argparse.Namespace) -> Columns:
    """The scores of each column. What is evaluated is printed before they are computed."""
    from ..tasks import Reading, preview
    from ..tasks.record import check_held_back

    _check(options)
    check_adapter(options.adapter)
    whole = {"wanted": ()} if options.split == "all" else {}
    material, words = gathered(options, options.adapter, **whole)
    material.part(options.split)
    if options.adapter is not None:
        check_held_back(options.adapter, material, options.split)
    precision = precision_of(options)
    model, tokenizer = load_for_task(options, precision)
    reader = material.reader(model, tokenizer, Reading(precision, options.batch_size, generation_of(options), progress=True), words)
    material = material.first(**{options.split: options.limit}).within(reader, model, only=options.split)
    rows = material.part(options.split)
    print(f"{preview(material, reader)}\n\n{material.source}, {options.split} rows: {len(rows)}, {precision}{_without_model(reader, rows)}",
          flush=True)  # fmt: skip
    return _scores(model, reader, rows, options)


def _check(options: argparse.Namespace) -> None:
    if options.split not in SPLITS:
        raise LoraLabError(f"--split {options.split}: expected one of {', '.join(SPLITS)}")
    if options.limit is not None and options.limit < 1:
        raise LoraLabError(f"--limit {options.limit}: expected at least 1")
    if given := [name for name in ELSEWHERE if getattr(options, name)]:
        raise LoraLabError(f"--{given[0]} with --task {options.task}: a task has its own measures")


def _scores(model: Any, reader: Any, rows: Any, options: argparse.Namespace) -> Columns:
    """Of the model as it was published, and with its adapter. An encoder without a head answers by which text is nearer."""
    from .. import disabled, load

    if options.adapter is None:
        return {"base": reader.scores(model, rows)}
    if reader.new_head:
        columns = {"base": reader.scores(model, rows)}
        return {**columns, str(options.adapter): reader.scores(load(reader.restored(model), options.adapter), rows)}
    load(model, options.adapter)
    with disabled(model):
        columns = {"base": reader.scores(model, rows)}
    return {**columns, str(options.adapter): reader.scores(model, rows)}


def _without_model(reader: Any, rows: Any) -> str:
    """A line on the answer that needs none."""
    if (found := reader.without_model(rows)) is None:
        return ""
    name, scores = found
    return f"\nwithout any model, {name}: " + ", ".join(f"{kind} {value:.4f}" for kind, value in scores.items())
