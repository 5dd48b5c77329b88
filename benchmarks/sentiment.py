"""python benchmarks/sentiment.py: what a task costs and how well it is done, from nothing at all to every weight of the model.

Is a movie review positive or negative? (rotten_tomatoes, sentiment_data.py.) Two models, SmolLM2-135M and all-MiniLM-L6-v2; the best of five
questions, examples in the question, a linear probe, soft prompts and prefixes, LoRA, full fine-tuning. Each method's learning rate (template, decay)
is chosen on 400 validation rows by one seed, a trained method's from the first 500 training rows only. Then three seeds learn from 2,000 rows with
what was chosen, and the 1,066 test rows are looked at, once for each seed and under no second choice.

Every run is a line in the results file, and is not run again: the study can be stopped at any time (Ctrl-C) and goes on where it was. It takes
hours; an estimate comes first. Seconds are those of one core, so that it may run beside other things; with OMP_NUM_THREADS=1 none of them is waiting.

    python benchmarks/sentiment.py --table                                    the table of what is there
    python benchmarks/sentiment.py --model all-minilm-l6-v2 --method lora     a part
    python benchmarks/sentiment.py --rows all --epochs 1 --method lora full   every training row, what was chosen above
    python benchmarks/sentiment.py --rows 64 --held-out 32 --results try.jsonl    does it run?
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interleaved import setting as machine
from sentiment_data import Review, Splits, splits
from sentiment_methods import METHODS, Choice, Taught
from sentiment_models import READERS, Reader, published
from sentiment_results import Results, Setting, table
from torch import Tensor

from lora_lab.training.evaluation import auc
from lora_lab.training.guards import Diverged

RESULTS = Path(__file__).with_name("results") / "sentiment.jsonl"
ROWS, SWEEP_ROWS, SEEDS = 2000, 500, (0, 1, 2)
SECONDS_A_ROW = {"smollm2-135m-instruct-q4": 0.08, "all-minilm-l6-v2": 0.012}  # of a training row, on 2 cores; reading one takes a third
READING = 1 / 3
DIVERGED = {"validation": 0.0, "validation_auc": 0.5, "test": None, "trained": 0, "bytes": 0, "seconds": 0.0, "diverged": True}  # never chosen


@dataclass
class Study:
    """What a call of this program does. sweep_rows: of a trained method's sweep."""

    splits: Splits
    results: Results
    readers: dict[str, Reader]
    rows: int = ROWS
    sweep_rows: int = SWEEP_ROWS
    seeds: Sequence[int] = SEEDS
    epochs: int | None = None
    reads_test: bool = True
    facts: dict[str, Any] = field(default_factory=dict)  # of the machine, for the records

    def run(self, model: str, method: str) -> None:
        """Choose on the validation split, then teach anew and look at the test split."""
        choices = METHODS[method].choices(model)
        for choice in choices if len(choices) > 1 else ():
            self.once(self.sweep_setting(model, method, choice))
        if not self.reads_test:
            return
        choice = self.final(self.chosen(model, method))
        self.check_read_once(model, method, choice)
        for seed in self.seeds if METHODS[method].seeded else self.seeds[:1]:
            self.once(self.setting(model, method, "test", choice, self.rows, seed))

    def setting(self, model: str, method: str, stage: str, choice: Choice, rows: int, seed: int) -> Setting:
        return {"model": model, "method": method, "stage": stage, "choice": choice, "rows": rows, "seed": seed,
                "validation_rows": len(self.splits.validation), "test_rows": len(self.splits.test)}  # fmt: skip

    def sweep_setting(self, model: str, method: str, choice: Choice) -> Setting:
        rows = min(self.rows, self.sweep_rows) if "epochs" in choice else self.rows
        return self.setting(model, method, "validation", choice, rows, self.seeds[0])

    def chosen(self, model: str, method: str) -> Choice:
        """The best on the validation split; of equally good ones the first."""
        choices = METHODS[method].choices(model)
        if len(choices) == 1:
            return choices[0]
        return max(choices, key=lambda choice: self.results[self.sweep_setting(model, method, choice)]["validation"])

    def final(self, choice: Choice) -> Choice:
        """With this study's epochs: like its rows they are those of the last runs, so that studies of more rows share one sweep."""
        return {**choice, "epochs": self.epochs} if self.epochs and "epochs" in choice else choice

    def check_read_once(self, model: str, method: str, choice: Choice) -> None:
        """Stop where the test split has been read for another choice: a second look would choose by it."""
        same = {"rows": self.rows, "test_rows": len(self.splits.test)}
        for record in self.results.of(model=model, method=method, stage="test", **same):
            if record["setting"]["choice"] != choice:
                raise SystemExit(f"{model}, {method}: the test rows were read for {record['setting']['choice']}, and {choice} is chosen now. Another "
                                 f"look would choose by the test: remove the older lines from {self.results.path}, or take --no-test")  # fmt: skip

    def once(self, setting: Setting) -> None:
        """Do a run that is not in the results, and put it there."""
        if setting in self.results:
            return
        started = time.perf_counter()
        reader, rows = self.readers[setting["model"]], self.splits.train[: setting["rows"]]
        try:
            taught = METHODS[setting["method"]].teach(reader, rows, setting["choice"], setting["seed"])
            outcome = self.outcome(taught, setting["stage"] == "test")
        except Diverged:
            if setting["stage"] == "test":
                raise
            outcome = DIVERGED
        record = {"setting": setting, **outcome, "wall": round(time.perf_counter() - started, 1), **self.facts}
        self.results.add(record)
        print(shown(record), flush=True)

    def outcome(self, taught: Taught, test: bool) -> dict[str, Any]:
        scores = taught.scores(self.splits.validation)
        found = {"validation": accuracy(scores, self.splits.validation), "validation_auc": area(scores, self.splits.validation)}
        found["test"] = accuracy(taught.scores(self.splits.test), self.splits.test) if test else None
        return {**found, "trained": taught.trained, "bytes": taught.nbytes, "seconds": round(taught.seconds, 2)}

    # How long it takes --------------------------------------------------------------------------------------------------------

    def missing(self, model: str, method: str) -> Iterator[Setting]:
        """The runs to come; which choice the last ones have is not known yet, and does not matter for their time."""
        choices = METHODS[method].choices(model)
        sweep = [self.sweep_setting(model, method, choice) for choice in choices] if len(choices) > 1 else []
        yield from (setting for setting in sweep if setting not in self.results)
        done = {record["setting"]["seed"] for record in self.results.of(model=model, method=method, stage="test", rows=self.rows)}
        for seed in self.seeds if METHODS[method].seeded else self.seeds[:1]:
            if self.reads_test and seed not in done:
                yield self.setting(model, method, "test", self.final(choices[0]), self.rows, seed)

    def estimate(self, setting: Setting) -> float:
        """Seconds, by the runs of this method that are there, else by a rule of thumb."""
        known = [record["wall"] / work(record["setting"]) for record in self.results.of(model=setting["model"], method=setting["method"])]
        return work(setting) * (statistics.median(known) if known else SECONDS_A_ROW[setting["model"]])


def work(setting: Setting) -> float:
    """In training rows."""
    read = setting["validation_rows"] + (setting["test_rows"] if setting["stage"] == "test" else 0)
    return setting["rows"] * setting["choice"].get("epochs", 0) + READING * read + 1


def accuracy(scores: Tensor, reviews: Sequence[Review]) -> float:
    """Of equal scores the first class is the answer."""
    return sum(row.index(max(row)) == review.label for row, review in zip(scores.tolist(), reviews, strict=True)) / len(reviews)


def area(scores: Tensor, reviews: Sequence[Review]) -> float:
    """The AUC of the margins."""
    return auc(scores[:, 1] - scores[:, 0], [review.label for review in reviews])


def shown(record: dict[str, Any]) -> str:
    setting = record["setting"]
    test = "" if record["test"] is None else f", test {100 * record['test']:.1f} %"
    return (f"{setting['model']:26} {setting['method']:14} {setting['stage']:10} seed {setting['seed']} {str(setting['choice'])[:60]:60} "
            f"validation {100 * record['validation']:.1f} % (AUC {record['validation_auc']:.3f}){test}, {record['wall']:.0f} s")  # fmt: skip


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=[*READERS], default=[*READERS])
    parser.add_argument("--method", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rows", type=lambda text: None if text == "all" else int(text), default=ROWS, help="training rows, or all")
    parser.add_argument("--sweep-rows", type=int, default=SWEEP_ROWS, help="training rows of a sweep, at most")
    parser.add_argument("--held-out", type=int, help="validation and test rows, at most")
    parser.add_argument("--epochs", type=int, help="others than each method's own, once the rest is chosen")
    parser.add_argument("--no-test", action="store_true", help="sweeps only: the test rows stay unseen")
    parser.add_argument("--precision", choices=["fp32", "bf16-mixed"], help="default: what is faster here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", "--only-table", action="store_true", help="print the table of the results that are there")
    return parser.parse_args()


def main() -> None:
    given = options()
    given.rows = len(splits().train) if given.rows is None else given.rows
    results = Results(given.results)
    if not given.table:
        carry_out(given, results)
    for model in given.model:
        print(f"\n{model}, {given.rows:,} training rows\n\n{table(results, model, given.method, rows=given.rows)}")


def carry_out(given: argparse.Namespace, results: Results) -> None:
    from lora_lab.training import fastest_precision

    precision = given.precision or fastest_precision()
    parts = splits().first(given.held_out)
    readers = {name: READERS[name](published(name), precision) for name in given.model}
    study = Study(parts, results, readers, given.rows, given.sweep_rows, given.seeds, given.epochs, not given.no_test,
                  {"precision": precision, **machine()})  # fmt: skip
    missing = [setting for model in given.model for method in given.method for setting in study.missing(model, method)]
    print(f"{len(missing)} runs to come, about {duration(sum(map(study.estimate, missing)))} in {precision}", flush=True)
    for model in given.model:
        for method in given.method:
            study.run(model, method)


if __name__ == "__main__":
    main()
