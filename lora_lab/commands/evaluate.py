"""python -m lora_lab evaluate: a model in numbers, without its adapter and with it, side by side; with --task by that task's own measures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LoraLabError, did_you_mean
from . import evaluate_task
from .shared import check_adapter, generation_of, generation_options, load_model, model_options, precision_of, with_tokenizer
from .task_options import DATA, check_without_task, task_options

MOST_CHOICES = 50  # distinct answers in the data that are taken for classes without being named
Scores = dict[str, float]


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--adapter", type=Path, help="folder of a LoRA adapter; the numbers without it stand beside")
    command.add_argument("--data", required=True, help=f"a bundled name ('reviews', ...: its held-out rows), or a .json/.jsonl file; {DATA}")
    task_options(command)
    command.add_argument("--split", help="with --task: test (the default), validation, train, or all rows, which nobody divides then")
    command.add_argument("--metric", help="perplexity of the answers (the default); accuracy and F1; or rouge of generated answers")
    command.add_argument("--limit", type=int, help="so many rows only: the first, with --task some of each class")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--choices", nargs="+", metavar="ANSWER", help="accuracy of a language model: the answers to choose from, in the labels' "
                         "order; default: the outputs that occur in the data")  # fmt: skip
    command.add_argument("--template", help="accuracy of a language model on text/label rows: the prompt, with {text} in it; with --task what the "
                         "model is asked with")  # fmt: skip
    command.add_argument("--normalise", help="accuracy of a language model: divide log-probabilities by tokens, or by characters")
    command.add_argument("--stemmer", action="store_true", help="rouge: compare stems of words")
    generation_options(command, temperature=0.0, repetition_penalty=1.0, seed=0)


def run(options: argparse.Namespace) -> None:
    if options.task is None:
        _by_metric(options)
        return
    options.split = options.split or "test"
    print(table(evaluate_task.run(options)))


def _by_metric(options: argparse.Namespace) -> None:
    from .. import data, disabled, load

    check_without_task(options)
    if options.split is not None:
        raise LoraLabError(f"--split {options.split} needs --task")
    options.metric = options.metric or "perplexity"
    if options.metric not in METRICS:
        raise LoraLabError(f"--metric {options.metric}: expected one of {', '.join(METRICS)}{did_you_mean(options.metric, METRICS)}")
    if unread := [name for name, metric in READ_BY.items() if getattr(options, name) and options.metric != metric]:
        raise LoraLabError(f"--{unread[0]} with --metric {options.metric}: it is for {READ_BY[unread[0]]} alone")
    check_adapter(options.adapter)
    train, held_out = data.load(options.data)
    rows = _first(train if held_out is None else held_out, options.limit)
    precision = precision_of(options)
    model, tokenizer = load_model(options, precision)
    columns: dict[str, Scores] = {}
    if options.adapter is not None:
        load(model, options.adapter)
        with disabled(model):
            columns["base"] = METRICS[options.metric](model, rows, tokenizer, options, precision)
    columns[str(options.adapter or "base")] = METRICS[options.metric](model, rows, tokenizer, options, precision)
    print(f"{options.data}{' (held-out rows)' if held_out is not None else ''}, {len(rows)} rows, {precision}")
    print(table(columns))


def _first(rows: Any, limit: int | None) -> Any:
    from ..data import Rows

    if limit is not None and limit < 1:
        raise LoraLabError(f"--limit {limit}: expected at least 1")
    return rows if limit is None else Rows(rows[:limit], rows.source, None if rows.lines is None else rows.lines[:limit])


def table(columns: dict[str, Scores]) -> str:
    """A line for each score, a column for each model, and the change where there are two.

    >>> print(table({"base": {"accuracy": 0.5}, "tuned": {"accuracy": 0.8}}))
                      base     tuned    change
    accuracy        0.5000    0.8000   +0.3000
    """
    wide, rows = max(8, *(len(name) for name in columns)) + 2, list(columns.values())
    first = max(12, *(len(name) + 1 for name in rows[0]))
    lines = [" " * first + "".join(f"{name:>{wide}}" for name in columns) + ("    change" if len(columns) == 2 else "")]
    for name in rows[0]:
        values, decimals = [scores[name] for scores in rows], 2 if max(scores[name] for scores in rows) >= 10 else 4
        change = f"{values[1] - values[0]:>+10.{decimals}f}" if len(values) == 2 else ""
        lines.append(f"{name:<{first}}" + "".join(f"{value:>{wide}.{decimals}f}" for value in values) + change)
    return "\n".join(lines)


# Metrics --------------------------------------------------------------------------------------------------------------------


def _perplexity(model: Any, rows: Any, tokenizer: Any, options: argparse.Namespace, precision: str) -> Scores:
    from ..training.evaluation import perplexity

    return {"perplexity": perplexity(model, rows, tokenizer, batch_size=options.batch_size, precision=precision)}


def _rouge(model: Any, rows: Any, tokenizer: Any, options: argparse.Namespace, precision: str) -> Scores:
    from ..training.evaluation import answers, rouge

    references = [_answer(row, rows.where(index)) for index, row in enumerate(rows)]
    written = answers(model, rows, with_tokenizer(options, tokenizer), batch_size=options.batch_size, **generation_of(options))
    return {f"{kind} F1": score.f1 for kind, score in rouge(written, references, use_stemmer=options.stemmer).items()}


def _accuracy(model: Any, rows: Any, tokenizer: Any, options: argparse.Namespace, precision: str) -> Scores:
    """By the model's head where it has one, else by the likelier answer."""
    from ..data.verbalizing import one_begins_another
    from ..models.base import is_encoder_decoder
    from ..training.evaluation import accuracy, best_choices, f1, predict_classes, score_choices

    settings: dict[str, Any] = {"batch_size": options.batch_size, "precision": precision}
    if type(model).__name__.endswith("ForSequenceClassification"):
        labels = [_label(row, rows.where(index)) for index, row in enumerate(rows)]
        predictions = predict_classes(model, rows, tokenizer, **settings)
        if any(isinstance(prediction, float) for prediction in predictions):
            raise LoraLabError(f"{options.model} predicts numbers, not classes: they have no accuracy")
    else:
        choices, labels = _choices(rows, options)
        encodes = is_encoder_decoder(model)
        prompts = [_prompt(row, options.template or "{text}", with_tokenizer(options, tokenizer), encodes) for row in rows]
        end = tokenizer.eos_token_id is not None and (encodes or one_begins_another(choices, tokenizer))
        predictions = best_choices(score_choices(model, prompts, tokenizer, choices, normalise=options.normalise, end=end, **settings))
    score = f1(predictions, labels)
    return {"accuracy": accuracy(predictions, labels), "F1 (macro)": score.macro}


METRICS = {"perplexity": _perplexity, "accuracy": _accuracy, "rouge": _rouge}
READ_BY = {"choices": "accuracy", "template": "accuracy", "normalise": "accuracy", "stemmer": "rouge"}  # option -> the metric it is of


# Rows -----------------------------------------------------------------------------------------------------------------------


def _answer(row: Any, where: str) -> str:
    """What the row says the model should write."""
    if "output" in row:
        return str(row["output"])
    answers = [message["content"] for message in row.get("messages", ()) if message["role"] == "assistant"]
    if not answers:
        raise LoraLabError(f"{where}: the row has the fields {sorted(row)}, expected an output, or messages with an answer")
    return str(answers[-1])


def _label(row: Any, where: str) -> Any:
    if "label" not in row:
        raise LoraLabError(f"{where}: the row has no 'label': the accuracy of a classifier needs text and label")
    return row["label"]


def _prompt(row: Any, template: str, tokenizer: Any, encodes: bool) -> Any:
    """Text/label rows in the template's place; others are rendered as for training."""
    from ..data import filled
    from ..data.verbalizing import read_ids

    return read_ids(filled(template, row), tokenizer, encodes) if "label" in row else row


def _choices(rows: Any, options: argparse.Namespace) -> tuple[Sequence[str], list[int]]:
    """The answers to choose from, and the place among them of each row's own."""
    from ..data.verbalizing import place_of

    by_number = any("label" in row for row in rows)
    if by_number and not options.choices:
        raise LoraLabError("the rows have a label and this model writes text: --choices names the answer that stands for each label, in their order")
    own = [row.get("label") if by_number else _answer(row, rows.where(index)) for index, row in enumerate(rows)]
    choices = options.choices or list(dict.fromkeys(own))
    if len(choices) > MOST_CHOICES and not options.choices:
        raise LoraLabError(f"the rows have {len(choices)} different outputs, so they are no classes: give --choices, or --metric rouge")
    return choices, [place_of(label, choices, rows.where(index)) for index, label in enumerate(own)]
