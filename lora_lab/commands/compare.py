"""python -m lora_lab compare: what a model writes without an adapter and with each of several, the same random numbers for all.

With --methods: ways to have a model do a task, in one table (compare_methods.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..errors import LoraLabError
from . import compare_methods
from .shared import check_file, generation_of, generation_options, load_model, model_options, precision_of, prompts_of, with_tokenizer
from .task_options import check_without_task

SAMPLED, GREEDY = {"temperature": 0.7, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.0}
WRITERS = {".html": "html", ".md": "markdown"}


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--adapter", type=Path, action="append", help="folder of a LoRA adapter; may be given several times")
    command.add_argument("--prompt", action="append", help="an instruction; may be given several times")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.add_argument("--out", type=Path, help="write the table into this .html or .md file, too")
    command.add_argument("--width", type=int, default=120, help="of the printed table, in characters")
    generation_options(command, seed=0, seed_says="of the texts that are written; with --methods the seeds of the runs are --seeds")
    command.set_defaults(temperature=None, repetition_penalty=None)
    compare_methods.add_options(command)


def run(options: argparse.Namespace) -> None:
    usual = SAMPLED if options.methods is None else GREEDY
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.methods is None:
        _adapters(options)
    else:
        _methods(options)


def _methods(options: argparse.Namespace) -> None:
    from ..comparison.table import markdown, text

    if options.out is not None and options.out.suffix != ".md":
        raise LoraLabError(f"--out {options.out}: the table of --methods is written into a file that ends in .md")
    lines, missing = compare_methods.run(options, options.other_methods())
    reasons = "\n" * bool(missing) + "".join(f"\n{name}: {reason}" for name, reason in missing.items())
    _tell(text(lines) + reasons, lambda: markdown(lines), options.out)


def _adapters(options: argparse.Namespace) -> None:
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
    _tell(table.table(options.width), lambda: getattr(table, WRITERS[options.out.suffix])(), options.out)


def _check(options: argparse.Namespace) -> None:
    compare_methods.check_unused(options)
    check_without_task(options)
    if not options.adapter or not options.prompt:
        raise LoraLabError(f"compare needs --adapter and --prompt, or --methods {compare_methods.USUAL}")
    for folder in options.adapter:
        if options.adapter.count(folder) > 1:
            raise LoraLabError(f"--adapter {folder} is given twice: each adapter has one column")
    if options.out is not None and options.out.suffix not in WRITERS:
        raise LoraLabError(f"--out {options.out}: expected a file that ends in {' or '.join(WRITERS)}")
    if options.out is not None:
        check_file(options.out)


def _tell(shown: str, kept: Callable[[], str], path: Path | None) -> None:
    """Print what is shown; what is kept is written before, as printing may fail."""
    if path is not None:
        _write(kept(), path)
    print(shown)
    if path is not None:
        print(f"\nwritten to {path}")


def _write(text: str, path: Path) -> None:
    from ..files import saving, write_file

    with saving("the table", path):
        write_file(path, lambda temporary: _put(temporary, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
