"""python -m prompt_tuning_lab tune: train a prompt before a model that stays as it is."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from lora_lab.commands.shared import check_can_begin, model_options, precision_of, story_of
from lora_lab.errors import LoraLabError

from .lessons import Effect, Lesson, lesson_of
from .memory import memory_of_a_step

# Options that are fields of TrainConfig, which has their defaults
SETTINGS = (
    (("steps", "max-steps"), int, "optimizer steps; default: --epochs"), (("epochs",), float, "passes over the data, 1 if not given"),
    (("batch-size", "micro-batch-size"), int, "rows in one forward and backward pass"), (("grad-accum-steps",), int, "batches in a step"),
    (("learning-rate",), float, "default: derived from the size of the model's embedding, see --share"),
    (("schedule",), str, "linear, cosine or constant"), (("warmup-steps",), int, "default: 5 %% of the steps"), (("weight-decay",), float, None),
    (("optimizer",), str, "adamw, adam, sgd, momentum, adafactor or lion"), (("max-length",), int, "tokens a row may have"),
    (("eval-every",), int, "steps between evaluations; default: before the first and after the last"),
    (("early-stopping",), int, "stop after so many evaluations without a better loss"),
    (("save-every",), int, "steps between snapshots of the whole run, from which --resume goes on; Ctrl-C takes one, too"),
)  # fmt: skip
SWITCHES = (
    ("keep-best", "end with the prompt of the best evaluation, not the last"), ("resume", "go on from the newest snapshot in --output"),
    ("gradient-checkpointing", "compute each block again in backward instead of keeping it"),
)  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--data", required=True, help="a bundled name ('reviews', ...), or a .json/.jsonl file of instruction/input/output, "
                         "messages or text/label rows")  # fmt: skip
    command.add_argument("--eval-data", help="held-out rows; the bundled data brings its own")
    command.add_argument("--output", required=True, type=Path, help="folder for the prompt, log.jsonl and snapshots")
    command.add_argument("--method", default="prompt", help="prompt, prefix, p-tuning or residual")
    command.add_argument("--num-virtual-tokens", type=int, default=20)
    command.add_argument("--init", help="vocab, random, text, labels, or a path of a prompt; default: what --text or --labels say, else vocab")
    command.add_argument("--text", help="the words the prompt begins as")
    command.add_argument("--labels", nargs="+", metavar="WORD", help="the words for the classes, a virtual token each, as a start")
    command.add_argument("--placement", default="front", help="front or after-bos")
    command.add_argument("--encoder-hidden-size", type=int, help="of the network of p-tuning or residual")
    command.add_argument("--choices", nargs="+", metavar="ANSWER", help="of text/label rows, a language model's answer for each label")
    command.add_argument("--template", default="{text}", help="and what it reads before the answer, with {text} in it")
    command.add_argument("--share", type=float, help="how far a step goes, as a part of the size of a word; default: 0.1, of a prefix 0.02")
    command.add_argument("--samples", type=int, default=3, help="rows whose texts are shown before and after; 0 shows none")
    command.add_argument("--seed", type=int, default=0)
    for names, kind, says in SETTINGS:
        dest = names[-1].replace("-", "_")
        command.add_argument(*(f"--{name}" for name in names), dest=dest, type=kind, default=argparse.SUPPRESS, help=says)
    for name, says in SWITCHES:
        command.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=says)


def run(options: argparse.Namespace) -> None:
    from lora_lab.files import check_writable
    from lora_lab.tasks.record import remove_record
    from lora_lab.training import fit

    from .. import save, use

    lesson, given = _lesson(options)
    prompted = _injected(lesson, options)
    examples = _examples(prompted, lesson, given.get("max_length"))
    config = _config(prompted, examples, options, given)
    check_writable(options.output)
    print(_beginning(prompted, examples, config, options))
    before = lesson.effect(use(prompted, None), options.samples, config)
    result = fit(use(prompted, "default"), examples, config, tokenizer=lesson.tokenizer, eval_data=lesson.learned(lesson.held_out))
    remove_record(options.output)
    save(prompted, options.output)
    print(story_of(result))
    print(_side_by_side(lesson, before, lesson.effect(prompted, options.samples, config)) + _files(options.output, prompted))


def _lesson(options: argparse.Namespace) -> tuple[Lesson, dict[str, Any]]:
    """What is to be learned, and the fields of TrainConfig that are given."""
    from lora_lab import data
    from lora_lab.training import TrainConfig

    if options.samples < 0:
        raise LoraLabError(f"--samples {options.samples}: expected a number of rows, or 0 for none")
    given = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__ if hasattr(options, name)}
    given |= {"precision": precision_of(options, options.output if given.get("resume") else None), "output_dir": options.output}
    TrainConfig.of(given)  # what makes no sense is told before anything is loaded
    check_can_begin(options.output, bool(given.get("resume")))
    rows, held_out = data.load(options.data)
    if options.eval_data:
        held_out = data.load(options.eval_data)[0]
    return lesson_of(options, rows, held_out, given["precision"]), given


def _injected(lesson: Lesson, options: argparse.Namespace) -> Any:
    from .. import inject

    init = options.init or ("text" if options.text is not None else "labels" if options.labels else "vocab")
    prompted = inject(lesson.model, options.num_virtual_tokens, method=options.method, init=init, text=options.text, labels=options.labels,
                      tokenizer=lesson.tokenizer, placement=options.placement, encoder_hidden_size=options.encoder_hidden_size,
                      seed=options.seed)  # fmt: skip
    if lesson.new_head:
        prompted.base.classifier.requires_grad_(True)
    return prompted


def _examples(prompted: Any, lesson: Lesson, max_length: int | None) -> Any:
    from lora_lab.data import Rows
    from lora_lab.data.objectives import objective_of
    from lora_lab.models.base import context_of

    limits = [limit for limit in (max_length, context_of(prompted)) if limit is not None]
    encoded = objective_of(prompted).encode(lesson.learned(lesson.rows), lesson.tokenizer, min(limits, default=None))
    return Rows(encoded, lesson.rows.source, lesson.rows.lines)


def _config(prompted: Any, examples: Any, options: argparse.Namespace, given: dict[str, Any]) -> Any:
    from ..tuning import training_config

    if options.share is not None and "learning_rate" in given:
        raise LoraLabError(f"--share {options.share:g} with --learning-rate {given['learning_rate']:g}: they say the same in two ways; give one")
    return training_config(prompted, examples, options.share, **given)


def _beginning(prompted: Any, examples: Any, config: Any, options: argparse.Namespace) -> str:
    from .. import count_parameters

    prompt = prompted.prompt()
    return (f"{prompt.num_virtual_tokens} virtual tokens: {prompt.initialization}\n{count_parameters(prompted)}\n"
            f"{_rate(prompted, config, options)}\n{memory_of_a_step(prompted, examples, config)}")  # fmt: skip


def _rate(prompted: Any, config: Any, options: argparse.Namespace) -> str:
    """The learning rate, and what it comes from where it is derived."""
    from ..tuning import gain, scale, usual_share

    said = f"learning rate {config.learning_rate:.3g}, {config.warmup_steps} steps of warm-up"
    if "learning_rate" in options:
        return said
    share = usual_share(prompt := prompted.prompt(), options.share)
    what, moved = "the size of its keys and values" if prompt.method == "prefix" else "the size of a word", gain(prompt)
    network = f", / {moved:.3g}, the gain of its network" if abs(moved - 1) > 1e-6 else ""
    return f"{said}: {share:g} x {scale(prompted, prompt):.3g}, {what}{network}"


# What came of it ------------------------------------------------------------------------------------------------------------------


def _side_by_side(lesson: Lesson, before: Effect, after: Effect) -> str:
    from lora_lab.training.evaluation import Samples

    said = ""
    if not math.isnan(before.accuracy):
        drawn = ", its head drawn at random" if lesson.new_head else ""
        said = f"held-out accuracy {before.accuracy:.4f} without the prompt{drawn}, {after.accuracy:.4f} with it ({len(lesson.held_out)} rows)\n"
    if before.texts:
        said += f"\n{Samples(before.questions, {'without the prompt': before.texts, 'with it': after.texts})}\n\n"
    return said


def _files(folder: Path, prompted: Any) -> str:
    from ..peft_files.description import describe

    whole = sum(parameter.nbytes for parameter in prompted.base.parameters())
    files = " and ".join(f"{size:,} bytes of {name}" for name, size in describe(folder).files.items())
    return f"saved to {folder}: {files}; the model has {whole:,}"
