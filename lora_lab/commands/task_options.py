"""--task, and what goes with it: the columns of a user's files, the names of classes, the words a model is asked in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from .shared import load_model

# role: what it is
ROLES = {"text": "a text, dialogue or review", "label": "its class", "summary": "a dialogue's summary", "instruction": "what is to be done",
         "input": "what it is to be done with", "output": "the answer", "messages": "whole chats", "system": "the message that goes before a chat",
         "product": "what a review is of"}  # fmt: skip
DATA = "with --task also a .csv, .tsv, .json, .jsonl, .txt or .parquet file with any columns, a folder of such files, or a hub data set 'owner/name'"


def task_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", help="sentiment, summarization, instruction or reviews: --data is any table then, whose columns are found")
    own = command.add_argument_group("with --task, where it is not plain")
    for role, says in ROLES.items():
        own.add_argument(f"--{role}-column", metavar="NAME", help=f"the column of {says}" if role != "label" else "the column of the classes")
    own.add_argument("--labels", nargs="+", metavar="NAME", help="what the classes are called, in their order: the labels' own words, the names of "
                     "numbers in the numbers' order, or label=name for each")


def columns_given(options: argparse.Namespace) -> dict[str, str]:
    """role -> column."""
    return {role: name for role in ROLES if (name := getattr(options, f"{role}_column")) is not None}


def check_without_task(options: argparse.Namespace) -> None:
    """Raise LoraLabError for an option that does nothing without --task."""
    given = [f"--{role}-column" for role in columns_given(options)] + ["--labels"] * (options.labels is not None)
    if given and options.task is None:
        raise LoraLabError(f"{given[0]} needs --task: it says what the columns are for")


def load_for_task(options: argparse.Namespace, precision: str, device: str | None = None) -> Any:
    """(model, tokenizer); an encoder that was saved with a head for masked words comes without it."""
    from .. import models
    from ..training.precision import storage_dtype

    model, tokenizer = load_model(options, precision, device)
    if type(model).__name__.endswith("ForMaskedLM"):
        model, tokenizer = models.load(options.model, dtype=storage_dtype(precision), device=device or options.device, task="feature-extraction")
    if tokenizer is None:
        raise LoraLabError(f"{options.model} has no tokenizer.json: a task's rows are text")
    return model, tokenizer


def gathered(options: argparse.Namespace, folder: Path | None = None, **settings: Any) -> tuple[Any, str | None]:
    """(the material of --task, the words that the model is asked in or None). folder: of an adapter, which remembers both classes and words."""
    from ..tasks import gather
    from ..tasks.record import read_record

    record = None if folder is None else read_record(folder, options.task)
    if record is not None:
        settings["classes"] = record.classes
    words = options.template if options.template is not None else None if record is None else record.words
    return gather(options.task, options.data, columns_given(options), options.labels, **settings), words
