"""python benchmarks/tasks.py TASK: what LoRA makes of the lectures' tasks on real data, beside the untuned model and people.

    mts_dialog      summaries of talks between doctor and patient: ROUGE-L, wrong facts
    reviews         reviews of clothes, negative, neutral, positive: how often a judge reads them as they were asked for
    polar_reviews   the same of negative and positive ones alone
    instructions    answers to instructions: loss, clean endings

It is `python -m lora_lab compare` (lora_lab.comparison) of SmolLM2-135M untuned and with LoRA: wording and learning rate are chosen on validation
rows by one seed, the test rows are read once for each seed and under no second choice. Kept is what each test row came to (tasks_readers.py), so that
the table can tell how sure it is (tasks_table.py); which rows there are, and what is to come of it, is in tasks_data.py.

Every run is a line in the results file, and is not run again: it can be stopped at any time (Ctrl-C) and goes on where it was.

    python benchmarks/tasks.py                                               all of them
    python benchmarks/tasks.py mts_dialog --seeds 0 1 2                      with the spread of three seeds
    python benchmarks/tasks.py --table --samples                             the tables of what is there, and some texts side by side
    python benchmarks/tasks.py --rows 16 --held-out 8 --max-steps 2 --results try.jsonl    does it run?
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from interleaved import setting as machine
from shared_data import folder_of, spread
from tasks_data import TASKS, cut
from tasks_readers import ASKED
from tasks_table import NAMES, Group, groups, told

from lora_lab import models
from lora_lab.comparison import Results, Study, Workbench
from lora_lab.comparison.methods import LoRAMethod, Method, ZeroShot
from lora_lab.comparison.results import Record, Setting
from lora_lab.data.tables import Table
from lora_lab.tasks import Reading
from lora_lab.training import fastest_precision
from lora_lab.training.evaluation import Samples
from lora_lab.training.precision import storage_dtype

MODEL = "smollm2-135m-instruct-q4"
RESULTS = Path(__file__).with_name("results") / "tasks.jsonl"
METHODS: dict[str, Method] = {method.name: method for method in (ZeroShot(), LoRAMethod())}
BATCH = 24  # texts that are written at once: a word of many takes hardly longer than a word of one
LEARN, WRITE, READ = 0.3, 0.6, 0.15  # seconds of one core: to learn a row, to write an answer, to read one


class Dated(Results):
    """With date, machine and versions in each line, and the seconds of one core since the last one: what runs beside it does not count."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.since = time.process_time()

    def add(self, record: Record) -> None:
        now = time.process_time()
        super().add({**record, "core_seconds": round(now - self.since, 1), **machine()})
        self.since = now


class Evenly(Study):
    """Choices are made on rows that are spread over the training rows: the kept results are of these."""

    def rows(self, stage: str) -> Table:
        train = self.bench.material.train
        return train.only(spread(len(train), self.sweep_rows)) if stage == "validation" else train


def study_of(name: str, given: argparse.Namespace, results: Results) -> Study:
    task, folder = TASKS[name], folder_of(TASKS[name].folder)
    precision, settings = given.precision or fastest_precision(), {} if given.max_steps is None else {"max_steps": given.max_steps}
    model, tokenizer = models.load(MODEL, dtype=storage_dtype(precision))
    material = replace(task.material(folder), source=name)
    plain = material.reader(model, tokenizer, Reading(precision, BATCH, task.generation, progress=True))
    material = material.within(plain, model)
    reader = task.reader(plain, material)
    material = cut(material, task, reader, given.rows or task.rows, given.held_out)
    bench = Workbench(lambda dtype: models.load(MODEL, dtype=dtype)[0], material, reader, {**task.training, **settings})
    return Evenly(bench, MODEL, METHODS, results, tuple(given.seeds), min(task.sweep_rows, given.rows or task.rows), tell)


def tell(record: Record) -> None:
    setting, found = record["setting"], record["validation"]
    score = f"failed: {record['failed']}" if found is None else f"validation {found:.4f}"
    print(f"{setting['source']:13} {NAMES[setting['method']]:8} {setting['stage']:10} seed {setting['seed']} {str(setting['choice'])[:60]:60} "
          f"{score}, {record['wall_seconds']:.0f} s", file=sys.stderr, flush=True)  # fmt: skip


# How long it takes ------------------------------------------------------------------------------------------------------------


def missing(study: Study) -> Iterator[Setting]:
    """The runs to come; which choice the last ones have is not known yet, and does not matter for their time."""
    for method in study.methods.values():
        choices = method.choices(study.bench)
        runs = [study.setting(method, "validation", choice, study.seeds[0]) for choice in choices if len(choices) > 1]
        done = {record["setting"]["seed"] for record in tests_of(study, method)}
        runs += [study.setting(method, "test", choices[0], seed) for seed in study.seeds_of(method) if seed not in done]
        yield from (setting for setting in runs if setting not in study.results)


def tests_of(study: Study, method: Method) -> list[Record]:
    same = study.setting(method, "test", {}, 0)
    return study.results.of(**{name: value for name, value in same.items() if name not in ("choice", "seed")})


def estimate(study: Study, setting: Setting) -> float:
    """Seconds, by the runs of this kind that are there, else by a rule of thumb."""
    same = {name: setting[name] for name in ("method", "stage", "source")}
    known = [record["wall_seconds"] / work(record["setting"]) for record in study.results.of(**same)]
    return work(setting) * (statistics.median(known) if known else 1.0)


def work(setting: Setting) -> float:
    training, rows, trained = setting["training"], setting["rows"], setting["method"] != "zero-shot"
    steps = training.get("max_steps") or setting["taught_rows"] * training["epochs"] / training["micro_batch_size"]
    tried = READ * rows["validation"] if trained else WRITE * min(rows["validation"], ASKED)
    tested = WRITE * rows["test"] if setting["stage"] == "test" else 0.0
    return 1 + tried + tested + (LEARN * steps * training["micro_batch_size"] if trained else 0.0)


# Texts side by side -----------------------------------------------------------------------------------------------------------


def samples(study: Study, group: Group) -> Samples:
    """Some requests, a person's answer, and the answers of each method's first seed."""
    reader, rows = study.bench.reader, study.bench.material.test
    texts = {NAMES[method]: records[0]["test"]["samples"] for method, records in group.items()}
    places = [place for place, _ in next(iter(texts.values()))]
    columns = {reader.title: [reader.own(rows[place]) for place in places]}
    columns |= {name: [text for _, text in each] for name, each in texts.items()}
    return Samples([reader.asked(rows[place])["input"] or reader.asked(rows[place])["instruction"] for place in places], columns)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, help="training rows, others than each task's own")
    parser.add_argument("--held-out", type=int, help="validation and test rows, at most")
    parser.add_argument("--max-steps", type=int, help="of a training")
    parser.add_argument("--precision", choices=["fp32", "bf16-mixed"], help="default: what is faster here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables of the results that are there")
    parser.add_argument("--samples", action="store_true", help="and some texts side by side")
    given = parser.parse_args()
    if unknown := [name for name in given.task if name not in TASKS]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(TASKS)}")
    return given


def main() -> None:
    given = options()
    results = Dated(given.results)
    for name in given.task or TASKS:
        study = None if given.table and not given.samples else study_of(name, given, results)
        if study and not given.table:
            carry_out(study)
        for group in groups(results, name):
            print(told(name, group), end="\n\n", flush=True)
            if study and given.samples and mine(study, group):
                print(samples(study, group).table(150), end="\n\n")


def carry_out(study: Study) -> None:
    runs = [*missing(study)]
    minutes = sum(estimate(study, setting) for setting in runs) / 60
    print(f"{study.bench.material.source}: {len(runs)} runs to come, about {minutes:.0f} minutes of one core", file=sys.stderr, flush=True)
    for name in study.methods:
        study.run(name)


def mine(study: Study, group: Group) -> bool:
    """Whether these runs were of the rows that the study has."""
    return next(iter(group.values()))[0]["setting"]["digest"] == study.bench.facts["digest"]


if __name__ == "__main__":
    main()
