"""Which settings? Each candidate is trained with the same seed and scored on validation rows, so that test rows stay for the one that wins.

    def make(rank): return lora_lab.inject(models.load(name)[0], rank)

    found = sweep(make, train_rows, validation_rows, grid(rank=[4, 16], learning_rate=[3e-4, 1e-3]), {"max_steps": 200}, tokenizer=tokenizer)
    print(found)
    found.best.settings

It knows no method: `make` gives a model with a LoRA adapter, with a soft prompt, or all of whose weights train.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import LoraLabError, did_you_mean
from .config import TrainConfig
from .fitting import fit
from .guards import Diverged
from .result import FitResult

Settings = dict[str, Any]
Metric = Callable[[Any, Sequence[dict[str, Any]]], float]
FIELDS = tuple(TrainConfig.__dataclass_fields__)


@dataclass(frozen=True)
class Trial:
    """One candidate. settings: as they were used.  score: NaN where training diverged, and result is None then.  seconds: all that it took."""

    settings: Settings
    score: float
    seconds: float
    result: FitResult | None


@dataclass(frozen=True)
class Sweep:
    """trials: in the candidates' order.  measure: what the score is.  Prints as a table, the best marked."""

    trials: list[Trial]
    measure: str
    higher_is_better: bool

    @property
    def best(self) -> Trial:
        """The trial with the best score, of equal ones the first. Raises LoraLabError where all diverged."""
        scored = [trial for trial in self.trials if not math.isnan(trial.score)]
        if not scored:
            raise LoraLabError(f"all {len(self.trials)} candidates diverged: lower the learning rates, or warm up longer")
        return (max if self.higher_is_better else min)(scored, key=lambda trial: trial.score)

    def table(self) -> str:
        heading, *rows = self._rows()
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heading, *rows))

    def markdown(self) -> str:
        heading, *rows = self._rows()
        lines = [heading, ["---:"] * len(heading), *rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|").strip() for cell in line) + " |" for line in lines) + "\n"

    def _rows(self) -> list[list[str]]:
        """Settings that differ, or all of a single trial; then what came of them."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        shown = [name for name in names if len(self.trials) == 1 or len({repr(trial.settings.get(name)) for trial in self.trials}) > 1]
        best = self._best_or_none()
        rows = [[*(_text(trial.settings.get(name)) for name in shown), *_outcome(trial), "best" if trial is best else ""] for trial in self.trials]
        return [[*(name.replace("_", " ") for name in shown), self.measure, "training loss", "seconds", ""], *rows]

    def _best_or_none(self) -> Trial | None:
        return None if all(math.isnan(trial.score) for trial in self.trials) else self.best

    def __str__(self) -> str:
        return self.table()


def grid(**values: Iterable[Any]) -> list[Settings]:
    """Every combination, as candidates.

    >>> grid(rank=[4, 16], learning_rate=[1e-3])
    [{'rank': 4, 'learning_rate': 0.001}, {'rank': 16, 'learning_rate': 0.001}]
    """
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def sweep(make: Callable[..., nn.Module], train_rows: Sequence[dict[str, Any]], validation_rows: Sequence[dict[str, Any]],
          candidates: Sequence[Settings], config: TrainConfig | dict[str, Any] | None = None, *, tokenizer: Any = None,
          metric: Metric | None = None, higher_is_better: bool = True, on_trial: Callable[[Trial], None] | None = None) -> Sweep:  # fmt: skip
    """Train each candidate from the same seed, score it on the validation rows, and say which was best.

    make: called with those settings of a candidate that are no fields of TrainConfig; returns the model to train, begun anew.
    candidates: dicts (`grid` makes them). Fields of TrainConfig, such as learning_rate, go into the config, the others to `make`; a value that
        can be called gets the model, for what depends on it.
    config: what all have in common. With an output_dir each writes into a folder of its own in it, 1, 2, ..., which `report` draws together.
    metric: `metric(model, validation_rows)`; None is the validation loss, lower is better.  on_trial: called after each, so that none is lost.
    A candidate whose loss is not a number has diverged; it is kept in the table. Warns where validation rows are among the training rows.
    Raises LoraLabError, before anything trains, for candidates that cannot be meant, and no rows.
    """
    common = TrainConfig.of(config)
    _check(make, candidates, common, train_rows, validation_rows)
    found = Sweep([], "validation loss" if metric is None else _name(metric), metric is not None and higher_is_better)
    with tqdm(total=len(candidates), desc="sweep", unit="run", disable=not common.progress) as bar:
        for number, settings in enumerate(candidates, start=1):
            trial = _trial(make, train_rows, validation_rows, settings, _apart(common, number), tokenizer, metric)
            found.trials.append(trial)
            if on_trial is not None:
                on_trial(trial)
            bar.set_postfix_str("" if (best := found._best_or_none()) is None else f"best {found.measure} {best.score:.4f}", refresh=False)
            bar.update()
    return found


def _trial(make: Callable[..., nn.Module], train_rows: Any, validation_rows: Any, settings: Settings, common: TrainConfig, tokenizer: Any,
           metric: Metric | None) -> Trial:  # fmt: skip
    started, result, score = time.perf_counter(), None, math.nan
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(settings.get("seed", common.seed))
        model = make(**{name: value for name, value in settings.items() if name not in FIELDS})
    used = {name: value(model) if name in FIELDS and callable(value) else value for name, value in settings.items()}
    config = with_settings(common, used)
    looks = metric is None or config.keep_best or config.eval_every or config.early_stopping
    try:
        result = fit(model, train_rows, config, tokenizer=tokenizer, eval_data=validation_rows if looks else None)
        score = _loss(result, config) if metric is None else float(metric(model, validation_rows))
    except Diverged:
        result = None
    return Trial(used, score, time.perf_counter() - started, result)


def _loss(result: FitResult, config: TrainConfig) -> float:
    """Of the weights that the run ended with."""
    return min(result.eval_losses) if config.keep_best else result.eval_losses[-1]


def _apart(config: TrainConfig, number: int) -> TrainConfig:
    """Without a bar of its own, in a folder of its own."""
    folder = None if config.output_dir is None else Path(config.output_dir) / str(number)
    return replace(config, progress=False, output_dir=folder)


def with_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """The config with those of the settings that are fields of it, and known before there is a model."""
    return TrainConfig.of({**asdict(config), **{name: value for name, value in settings.items() if name in FIELDS and not callable(value)}})


# Checks and text ----------------------------------------------------------------------------------------------------------------


def _check(make: Callable[..., nn.Module], candidates: Any, config: TrainConfig, train_rows: Any, validation_rows: Any) -> None:
    for settings in check_candidates(candidates):
        with_settings(config, settings)
        _check_make(make, {name: value for name, value in settings.items() if name not in FIELDS})
    for name, rows in (("train_rows", train_rows), ("validation_rows", validation_rows)):
        if not len(rows):
            raise LoraLabError(f"{name} is empty: a candidate is trained on the one and scored on the other")
    if both := _in_both(train_rows, validation_rows):
        warnings.warn(f"{both} of {len(validation_rows)} validation rows are training rows, too: the score is better than it will be", stacklevel=4)


def check_candidates(candidates: Any) -> Sequence[Settings]:
    if not isinstance(candidates, Sequence) or not candidates or not all(isinstance(each, Mapping) for each in candidates):
        raise LoraLabError(f"candidates={candidates!r:.80}: expected a list of dicts of settings, as grid(learning_rate=[...]) makes it")
    return candidates


def _check_make(make: Callable[..., nn.Module], settings: Settings) -> None:
    """Raise LoraLabError where make does not take these settings."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # of a builtin
        return
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    unknown = [name for name in settings if name not in parameters and not any_name]
    missing = [name for name, each in parameters.items() if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if unknown:
        known = [*parameters, *FIELDS]
        raise LoraLabError(f"setting {unknown[0]!r} is neither an argument of make ({', '.join(parameters) or 'none'}) nor a field of TrainConfig"
                           f"{did_you_mean(unknown[0], known)}")  # fmt: skip
    if left := [name for name in missing if name not in settings]:
        raise LoraLabError(f"make needs {left[0]!r}, which the candidate {settings} does not have")


def _in_both(train_rows: Any, validation_rows: Any) -> int:
    """How many validation rows are training rows; 0 where rows hold what JSON cannot say."""
    try:
        known = {json.dumps(row, sort_keys=True) for row in train_rows}
        return sum(json.dumps(row, sort_keys=True) in known for row in validation_rows)
    except (TypeError, ValueError):
        return 0


def _name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "score")
    return "score" if name == "<lambda>" else str(name).strip("_").replace("_", " ")


def _text(value: Any) -> str:
    """
    >>> _text(0.013558), _text(None), _text("vocab")
    ('0.0136', '', 'vocab')
    """
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _outcome(trial: Trial) -> list[str]:
    score = "diverged" if math.isnan(trial.score) else f"{trial.score:.4f}"
    losses = trial.result.losses if trial.result else []
    last = losses[-max(1, len(losses) // 10) :]
    return [score, f"{sum(last) / len(last):.3f}" if last else "", f"{trial.seconds:.0f}"]
