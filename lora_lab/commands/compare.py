"""python -m lora_lab compare: what a model writes without an adapter and with each of several, the same random numbers for all."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from .shared import generation_of, generation_options, load_model, model_options, precision_of, prompts_of, with_tokenizer

WRITERS = {".html": "html", ".md": "markdown"}


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--adapter", type=Path, required=True, action="append", help="folder of a LoRA adapter; may be given several times")
    command.add_argument("--prompt", required=True, action="append", help="an instruction; may be given several times")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.add_argument("--out", type=Path, help="write the table into this .html or .md file, too")
    command.add_argument("--width", type=int, default=120, help="of the printed table, in characters")
    generation_options(command, seed=0)


def run(options: argparse.Namespace) -> None:
    from .. import load
    from ..training.evaluation import Samples, samples

    _check(options)
    model, tokenizer = load_model(options, precision_of(options))
    with_tokenizer(options, tokenizer)
    columns: dict[str, str | None] = {"base": None}
    for number, folder in enumerate(options.adapter, start=1):
        load(model, folder, adapter=f"adapter-{number}")
        columns[str(folder)] = f"adapter-{number}"
    prompts = prompts_of(options.prompt, options.raw, model, tokenizer)
    written = samples(model, prompts, tokenizer, adapters=columns, **generation_of(options))
    table = Samples(options.prompt, written.columns)  # the prompts as they were asked, without the template around them
    print(table.table(options.width))
    if options.out is not None:
        _write(table, options.out)


def _check(options: argparse.Namespace) -> None:
    for folder in options.adapter:
        if options.adapter.count(folder) > 1:
            raise LoraLabError(f"--adapter {folder} is given twice: each adapter has one column")
    if options.out is not None and options.out.suffix not in WRITERS:
        raise LoraLabError(f"--out {options.out}: expected a file that ends in {' or '.join(WRITERS)}")


def _write(table: Any, path: Path) -> None:
    from ..files import saving, write_file

    text = getattr(table, WRITERS[path.suffix])()
    with saving("the table", path):
        write_file(path, lambda temporary: _put(temporary, text))
    print(f"\nwritten to {path}")


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
