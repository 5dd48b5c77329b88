"""python -m lora_lab compare --methods: one task, several ways to have a model do it, one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoraLabError, did_you_mean
from .shared import check_file, generation_of, precision_of, targets_of
from .task_options import DATA, gathered, load_for_task, task_options

VIRTUAL_TOKENS = 20
SPARE = 4  # times as many rows as are wanted have their tokens counted, for some are too long
USUAL = "zero-shot,few-shot,prompt,lora,full"
# Options of this comparison alone: without --methods they do nothing
OPTIONS = ("data", "test_data", "template", "rows", "sweep_rows", "held_out_rows", "seeds", "epochs", "max_steps", "micro_batch_size", "max_length",
           "rank", "target_modules", "num_virtual_tokens", "shots", "forgetting_data", "no_forgetting", "results", "task")  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group("methods on a task")
    own.add_argument("--methods", metavar="NAMES", help=f"with commas: {USUAL}. Each chooses on the validation rows; the test rows are read once")
    own.add_argument("--data", help=f"a bundled name, or a file; {DATA}")
    own.add_argument("--test-data", help="a source of its own for the test; default: the test rows of --data, or a tenth held back")
    own.add_argument("--template", help="what the model reads, with {text} in it (sentiment), or the instruction (summarization)")
    for name, says in (("rows", "training rows, at most"), ("sweep-rows", "training rows where settings are chosen, at most; default: a quarter"),
                       ("held-out-rows", "validation rows, and test rows, at most"), ("max-steps", "optimizer steps; default: --epochs"),
                       ("max-length", "tokens a row may have; longer ones are dropped"), ("micro-batch-size", "rows in a step; default: 8"),
                       ("rank", "of LoRA; default: 8"), ("num-virtual-tokens", f"of prompts; default: {VIRTUAL_TOKENS}")):  # fmt: skip
        own.add_argument(f"--{name}", type=int, help=says)
    own.add_argument("--epochs", type=float, help="passes over the training rows; default: 2")
    own.add_argument("--seeds", type=int, nargs="+", help="of the test runs, the first of the choices, too; default: 0 1 2")
    own.add_argument("--shots", type=int, nargs="+", help="numbers of examples, of each class, that few-shot chooses from; default: 1 2 4")
    own.add_argument("--target-modules", nargs="+", help="of LoRA; default: all-linear")
    own.add_argument("--forgetting-data", help="what else the model is measured on, before and after; default: bundled rows of another task")
    own.add_argument("--no-forgetting", action="store_true", default=None, help="do not measure that")
    own.add_argument("--results", type=Path, help="a .jsonl file that keeps each run: the same command goes on from there")
    task_options(command)


def check_unused(options: argparse.Namespace) -> None:
    """Raise LoraLabError for an option that does nothing without --methods."""
    if given := [name for name in OPTIONS if getattr(options, name) is not None]:
        raise LoraLabError(f"--{given[0].replace('_', '-')} needs --methods ({USUAL})")


def run(options: argparse.Namespace, others: Mapping[str, Any]) -> Any:
    """(the table, a list of cells for each line; what is not in it -> why). others: methods of another lab, by name."""
    from ..comparison import METHODS, table

    methods = {**METHODS, **others}
    names = _names(options.methods, methods)
    study, notes = _study(options, methods, names)
    failed: dict[str, str] = {}
    for name in names:
        try:
            study.run(name)
        except LoraLabError as error:  # the others may work all the same
            failed[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
    if len(failed) == len(names):
        raise LoraLabError(f"no method could do it: {'; '.join(f'{name}: {reason}' for name, reason in failed.items())}")
    return table(study, [name for name in names if name not in failed]), {**failed, **notes}


def _names(text: str, methods: Mapping[str, Any]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in methods:
            raise LoraLabError(f"--methods {text}: {name!r} is none of {', '.join(methods)}{did_you_mean(name, methods)}")
    return list(dict.fromkeys(names))


def _study(options: argparse.Namespace, methods: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """(the study, what it leaves out -> why)."""
    from .. import models, plan
    from ..comparison import Results, Study, Workbench
    from ..tasks import Reading, preview
    from ..training import TrainConfig

    _check(options)
    precision = precision_of(options)
    epochs = 2.0 if options.epochs is None else options.epochs
    training = {"epochs": epochs, "max_steps": options.max_steps, "micro_batch_size": options.micro_batch_size or 8}
    TrainConfig.of({**training, "precision": precision})  # what makes no sense is told before anything is read
    parts: dict[str, Any] = {"parts": {"test": options.test_data}} if options.test_data else {}
    material, words = gathered(options, **parts)
    model, tokenizer = load_for_task(options, precision)
    task: dict[str, Any] = {"task": "feature-extraction"} if type(model).__name__.endswith("Model") else {}
    reader = material.reader(model, tokenizer, Reading(precision, options.micro_batch_size or 8, generation_of(options), progress=True), words)
    targets = targets_of(options.target_modules or ["all-linear"])
    if "lora" in names:  # a name that none of its modules has is told now
        plan(reader.restored(model) if reader.new_head else model, options.rank or 8, target_modules=targets)
    longest = _longest(options, model, names)
    material = _fitting(options, material, reader, model, longest)
    print(preview(material, reader), end="\n\n", flush=True)
    elsewhere, notes = _elsewhere(options, model, tokenizer, reader, longest)
    bench = Workbench(lambda dtype: models.load(options.model, dtype=dtype, device=options.device, **task)[0], material, reader, training,
                      options.rank or 8, targets, options.num_virtual_tokens or VIRTUAL_TOKENS,
                      tuple(options.shots or (1, 2, 4)), elsewhere, model.base_sha256)  # fmt: skip
    study = Study(bench, options.model, methods, Results(options.results), tuple(options.seeds or (0, 1, 2)),
                 options.sweep_rows or max(1, len(material.train) // 4), _tell)  # fmt: skip
    return study, notes


def _elsewhere(options: argparse.Namespace, model: Any, tokenizer: Any, reader: Any, longest: int | None) -> tuple[Any, dict[str, str]]:
    """(what else is measured before and after, or None; why not)."""
    from ..comparison.forgetting import forgetting_probe
    from ..tasks import model_kind

    if options.no_forgetting:
        return None, {}
    if options.forgetting_data is None and model_kind(model) == "classifier":
        return None, {"forgetting": f"a {type(model).__name__} does nothing but its classes"}
    return forgetting_probe(model, tokenizer, reader, options.task, options.forgetting_data, max_length=longest), {}


def _fitting(options: argparse.Namespace, material: Any, reader: Any, model: Any, longest: int | None) -> Any:
    """As many rows as are asked for that the model can read, all parts there. The tokens of some more are counted, of all where that is too few."""
    from ..data.tables.parts import PARTS

    wanted = {"train": options.rows, "validation": options.held_out_rows, "test": options.held_out_rows}
    more = material.first(**{part: SPARE * most for part, most in wanted.items() if most}).within(reader, model, longest).first(**wanted)
    if any(most and len(more.parts.get(part, ())) < min(most, len(material.parts.get(part, ()))) for part, most in wanted.items()):
        more = material.within(reader, model, longest).first(**wanted)
    for part in PARTS:
        more.part(part)
    return more


def _longest(options: argparse.Namespace, model: Any, names: Sequence[str]) -> int | None:
    """Tokens of a row that all methods can read: a prompt's virtual tokens take some of the context."""
    from ..models.base import context_of, longest_row

    context, virtual = context_of(model) if "prompt" in names else None, options.num_virtual_tokens or VIRTUAL_TOKENS
    if context is not None and virtual >= context:
        raise LoraLabError(f"--num-virtual-tokens {virtual}: the model's context is {context}, which leaves no room for a row; lower it, or leave "
                           "prompt out of --methods")  # fmt: skip
    return longest_row(model, options.max_length, None if context is None else context - virtual)


def _check(options: argparse.Namespace) -> None:
    for name in ("task", "data"):
        if getattr(options, name) is None:
            raise LoraLabError(f"--methods needs --{name}")
    if options.adapter or options.prompt or options.raw:
        raise LoraLabError("--methods compares ways to learn a task; --adapter, --prompt and --raw are for texts of adapters that have learned one")
    for name in ("rows", "sweep_rows", "held_out_rows", "micro_batch_size", "max_length", "rank", "num_virtual_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise LoraLabError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.no_forgetting and options.forgetting_data:
        raise LoraLabError(f"--no-forgetting with --forgetting-data {options.forgetting_data}: one of them")
    if any(seed < 0 for seed in options.seeds or ()):
        raise LoraLabError(f"--seeds {' '.join(map(str, options.seeds))}: expected whole numbers of at least 0")
    if any(count < 1 for count in options.shots or ()):
        raise LoraLabError(f"--shots {' '.join(map(str, options.shots))}: expected at least 1 of each class")
    for path in (options.results, options.out):
        if path is not None:
            check_file(path)


def _tell(record: Any) -> None:
    """Progress."""
    setting, found = record["setting"], record["validation"]
    score = f"failed: {record['failed']}" if found is None else f"validation {found:.4f}"
    print(f"{setting['method']:10} {setting['stage']:10} seed {setting['seed']} {str(setting['choice'])[:60]:60} {score}, "
          f"{record['wall_seconds']:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
