"""python -m prompt_tuning_lab generate: write text with a prompt, or with several: side by side, all in one batch, or together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_lab.commands.shared import (
    generation_of,
    generation_options,
    load_model,
    model_options,
    precision_of,
    prompts_of,
    with_tokenizer,
)
from lora_lab.errors import LoraLabError

from .shared import load_tasks


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--prompt-folder", type=Path, required=True, nargs="+", metavar="FOLDER",
                         help="of a trained prompt, ours or PEFT's; several write side by side, in one batch")  # fmt: skip
    command.add_argument("--tasks", nargs="+", metavar="NAME", help="what to call them; default: the folders' names")
    command.add_argument("--with-base", action="store_true", help="beside them the model without a prompt, in the same batch")
    command.add_argument("--ensemble", action="store_true", help="all of them write one text: the mean of their log-probabilities decides each token")
    command.add_argument("--prompt", required=True, action="append", help="an instruction; may be given several times")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.add_argument("--width", type=int, default=120, help="of the printed table, in characters")
    generation_options(command)


def run(options: argparse.Namespace) -> None:
    if options.ensemble and options.with_base:
        raise LoraLabError("--ensemble with --with-base: one text has no column beside it")
    model, tokenizer = load_model(options, precision_of(options))
    with_tokenizer(options, tokenizer)
    prompted = load_tasks(model, options.prompt_folder, options.tasks)
    ids = prompts_of(options.prompt, options.raw, model, tokenizer)
    columns: list[str | None] = [*prompted.tasks, *([None] if options.with_base else [])]
    if options.ensemble or len(columns) == 1:
        result = _one_text_each(prompted, ids, tokenizer, options)
    else:
        result = _side_by_side(prompted, columns, ids, tokenizer, options)
    print(f"[{sum(map(len, result.ids))} tokens, {result.tokens_per_second:.0f} per second]", file=sys.stderr)


def _one_text_each(prompted: Any, ids: list[list[int]], tokenizer: Any, options: argparse.Namespace) -> Any:
    from lora_lab import models

    from ..ensembling import Ensembled

    writer, streaming = Ensembled(prompted, list(prompted.tasks)) if options.ensemble else prompted, len(ids) == 1
    result = models.generate(writer, ids, tokenizer, **generation_of(options),
                             on_token=(lambda row, token, text: print(text, end="", flush=True)) if streaming else None)  # fmt: skip
    print() if streaming else print("\n\n".join(f"> {prompt}\n{text}" for prompt, text in zip(options.prompt, result.texts, strict=True)))
    return result


def _side_by_side(prompted: Any, columns: list[str | None], ids: list[list[int]], tokenizer: Any, options: argparse.Namespace) -> Any:
    """Every text with every task in one batch, each text with the same random numbers in all columns."""
    from lora_lab import models
    from lora_lab.training.evaluation import Samples

    from .. import per_sample

    settings = generation_of(options)
    if settings["seed"] is not None:
        settings["seed"] = [settings["seed"] + number for number in range(len(ids)) for _ in columns]
    with per_sample(prompted, [task for _ in ids for task in columns]):
        result = models.generate(prompted, [each for each in ids for _ in columns], tokenizer, **settings)
    texts = {"no prompt" if task is None else task: result.texts[place :: len(columns)] for place, task in enumerate(columns)}
    print(Samples(options.prompt, texts).table(options.width))
    return result
