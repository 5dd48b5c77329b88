"""python -m lora_lab finetune: train a LoRA adapter on rows of text, or, with --task, on any table of them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_math

from .shared import check_can_begin, model_options, precision_of, story_of, targets_of
from .subject import Subject, subject_of
from .task_options import DATA, columns_given, task_options

# Options that are fields of TrainConfig, which has their defaults
SETTINGS = (
    ("max-steps", int, "optimizer steps; default: --epochs"), ("epochs", float, "passes over the data, 1 if not given"),
    ("micro-batch-size", int, "rows in one forward and backward pass; default 8"),
    ("grad-accum-steps", int, "micro-batches in a step; default 1"), ("learning-rate", float, "the highest, after the warm-up; default 5e-4"),
    ("schedule", str, "linear (the default), cosine or constant"), ("warmup-steps", int, "default 0"), ("weight-decay", float, "default 0"),
    ("max-length", int, "tokens a row may have; default: the model's context"), ("seed", int, "default 0"),
    ("optimizer", str, "adamw (the default), adam, sgd, momentum, adafactor or lion"),
    ("lora-plus-ratio", float, "LoRA+: B learns so many times faster than A"),
    ("save-every", int, "steps between snapshots of the whole run, from which --resume goes on; Ctrl-C takes one, too"),
    ("eval-every", int, "steps between evaluations; default: before the first and after the last"),
    ("early-stopping", int, "stop after so many evaluations without a better loss"),
    ("max-tokens", int, "with --packing: a micro-batch is as many rows as fit into so many tokens"),
    ("distributed", str, "under torchrun: ddp (the default; each process holds the model) or fsdp (the model is divided among them)"),
)  # fmt: skip
SWITCHES = (
    ("keep-best", "end with the weights of the best evaluation, not the last"), ("resume", "go on from the newest snapshot in --out"),
    ("packing", "rows one after another instead of padding"),
)  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--data", required=True, help="a bundled name ('reviews', ...), or a .json/.jsonl file of instruction/input/output or "
                         f"messages rows; {DATA}")  # fmt: skip
    command.add_argument("--eval-data", help="held-out rows; the bundled data brings its own, and with --task a tenth is held back")
    task_options(command)
    command.add_argument("--template", help="with --task: what the model reads, with {text} in it (sentiment), or the instruction (summarization)")
    command.add_argument("--out", required=True, type=Path, help="folder for the adapter, log.jsonl and snapshots")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--alpha", type=float, help="scaling is alpha / rank; default: rank")
    command.add_argument("--dropout", type=float, default=0.0)
    command.add_argument("--variant", default="lora", help="lora or dora")
    command.add_argument("--init", default="kaiming", help="kaiming, gaussian, orthogonal or pissa")
    command.add_argument("--rslora", action="store_true", help="scaling alpha / sqrt(rank)")
    command.add_argument("--quantize", metavar="KIND", help="train over a base in nf4, nf4-dq or int8 (QLoRA)")
    command.add_argument("--target-modules", nargs="+", default=["all-linear"], help="all-linear, attention, names, or one regular expression")
    for name, kind, says in SETTINGS:
        command.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=says)
    for name, says in SWITCHES:
        command.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=says)
    command.add_argument("--gradient-checkpointing", nargs="?", const=True, type=_mode, default=argparse.SUPPRESS, metavar="N|attention",
                         help="compute again in backward instead of keeping: every block, every n-th, or attention only")  # fmt: skip


def _mode(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def run(options: argparse.Namespace) -> None:
    from .. import count_parameters
    from ..files import check_writable
    from ..training import fit, shard
    from ..training.distributed import own_device, world

    options.device = own_device(options.device)
    precision, everyone = precision_of(options, options.out if hasattr(options, "resume") else None), world(options.device)
    precision, say = everyone.gather(precision)[0], print if everyone.first else _nothing
    config = _config(options, precision)
    everyone.first_does(lambda: check_can_begin(options.out, config.resume))
    divided = config.distributed == "fsdp" and everyone.size > 1
    subject = subject_of(options, precision, "cpu" if divided else options.device, everyone.first)
    if subject.told:
        say(subject.told)
    _adapt(options, subject, config, say)
    everyone.first_does(lambda: check_writable(options.out))
    if divided:
        shard(subject.model, precision, device=options.device)
    say(count_parameters(subject.model))
    examples = _examples(subject, config)
    say(_prediction(subject.model, config, examples, everyone.size))
    before = subject.quality(subject.model)
    result = fit(subject.model, examples, config, tokenizer=subject.tokenizer, eval_data=subject.held_out)
    if everyone.first or divided:  # the pieces of a divided adapter are gathered by all processes, which write the same
        _save(options, subject)
    say(story_of(result))
    if before is not None:
        say(_gain(subject, before))
    say(f"adapter saved to {options.out}" + _go_on(options, subject))
    everyone.leave()


def _adapt(options: argparse.Namespace, subject: Subject, config: Any, say: Callable[..., None]) -> None:
    """Quantise and inject."""
    import torch

    from .. import inject, quantization_report, quantize

    torch.manual_seed(config.seed)  # of the adapter's first values; `fit` starts from the same seed again
    if options.quantize:
        say(quantization_report(quantize(subject.model, options.quantize)))
    inject(subject.model, options.rank, alpha=options.alpha, dropout=options.dropout, target_modules=targets_of(options.target_modules),
           variant=options.variant, init=options.init, rslora=options.rslora, modules_to_save=subject.own_modules)  # fmt: skip


def _examples(subject: Subject, config: Any) -> Any:
    from .. import data
    from ..data.objectives import objective_of

    rows = subject.rows
    return data.Rows(objective_of(subject.model).encode(rows, subject.tokenizer, config.max_length), rows.source, rows.lines)


def _save(options: argparse.Namespace, subject: Subject) -> None:
    from .. import save
    from ..tasks.record import remove_record

    remove_record(options.out)
    save(subject.model, options.out)
    subject.record(options.out)


def _gain(subject: Subject, before: float) -> str:
    probe = " (before: a linear probe, as which the head began)" if subject.own_modules else ""
    return f"held-out {subject.reader.quality} {before:.4f} -> {subject.quality(subject.model):.4f}{probe}"


def _go_on(options: argparse.Namespace, subject: Subject) -> str:
    """How to evaluate it: on the test rows, or, where --eval-data left none, on those."""
    if options.task is None:
        return ""
    held, what = ["--data", options.data], "rows that it has not seen"
    if options.eval_data and not subject.material.parts.get("test"):
        held, what = ["--data", options.eval_data, "--split", "all"], "the held-out rows"
    columns = [word for role, name in columns_given(options).items() for word in (f"--{role}-column", name)]
    given = ["--task", options.task, "--model", options.model, "--adapter", options.out, *held, *columns]
    return f"; on {what}:\n  python -m lora_lab evaluate {shlex.join(map(str, given))}"


def _nothing(*_: Any) -> None:
    """What processes but the first say."""


def _config(options: argparse.Namespace, precision: str) -> Any:
    from ..training import TrainConfig

    given = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__ if hasattr(options, name)}
    return TrainConfig(**{**given, "precision": precision, "output_dir": options.out})


def _prediction(model: Any, config: Any, examples: Any, processes: int) -> str:
    """The predicted footprint of a step on the longest rows, where this model and these settings are modelled."""
    from ..training.memory_request import request_of

    request = request_of(model, config, examples, processes)
    try:
        footprint = memory_math.predict(model, implementation="lora_lab", **request)
    except memory_math.MemoryMathError as error:
        return f"memory: no prediction ({error})"
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"memory: a step on the longest rows ({request['sequence_length']} tokens) is predicted to need {footprint.gib():.2f} GiB of tensors{each}"
