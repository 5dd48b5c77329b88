"""A fair comparison: each method chooses on the validation rows, then answers the test rows, once for each seed.

    choices     one seed, sweep_rows training rows, scored on the validation rows; a diverged one, or one that does not fit, is never chosen
    test        the chosen one, every training row, each seed; nothing is chosen afterwards
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..data.formats import Rows
from ..data.tables import Table
from ..errors import LoraLabError
from ..models.base import context_of
from ..tasks import Way
from ..training import Sweep, Trial
from ..training.guards import Diverged
from .forgetting import ForgettingProbe
from .methods import METHODS, Choice, Method, Taught
from .results import Record, Results, Setting
from .workbench import Workbench


class DoesNotFit(LoraLabError):
    """What is shown before a question leaves it no room."""


@dataclass
class Study:
    """name: of the model, for the records.  sweep_rows: training rows of a choice, at most.  on_run: told of each run as it is done."""

    bench: Workbench
    name: str
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    results: Results = field(default_factory=Results)
    seeds: Sequence[int] = (0, 1, 2)
    sweep_rows: int | None = None
    on_run: Callable[[Record], None] | None = None
    _before: float | None = None

    def run(self, name: str) -> None:
        """Raises LoraLabError where none of a method's choices works, and where the test rows have been read for another."""
        method = self.methods[name]
        choice = self.chosen(method)
        self._check_read_once(method, choice)
        if any(self.setting(method, "test", choice, seed) not in self.results for seed in self.seeds_of(method)):
            self._check_tests_fit(method, choice)
        for seed in self.seeds_of(method):
            self.once(method, self.setting(method, "test", choice, seed), measure=seed == self.seeds[0])

    def seeds_of(self, method: Method) -> Sequence[int]:
        """Of the test runs: each once, and one alone where no seed changes anything."""
        return list(dict.fromkeys(self.seeds))[: None if method.seeded else 1]

    def chosen(self, method: Method) -> Choice:
        choices = method.choices(self.bench)
        return choices[0] if len(choices) == 1 else self.sweep(method, choices).best.settings

    def sweep(self, method: Method, choices: Sequence[Choice]) -> Sweep:
        trials = []
        for choice in choices:
            record = self.once(method, self.setting(method, "validation", choice, self.seeds[0]))
            trials.append(Trial(choice, math.nan if record["validation"] is None else record["validation"], record["wall_seconds"], None))
        if all(math.isnan(trial.score) for trial in trials):
            failed = self.results[self.setting(method, "validation", choices[0], self.seeds[0])]["failed"]
            raise LoraLabError(f"{method.name}: none of its choices works: {failed}")
        return Sweep(trials, self.bench.reader.quality, self.bench.reader.higher_is_better)

    def setting(self, method: Method, stage: str, choice: Choice, seed: int) -> Setting:
        """All that a result depends on."""
        return {"model": self.name, "method": method.name, "stage": stage, "choice": choice, "seed": seed, "taught_rows": self._count(stage),
                **self.bench.facts}  # fmt: skip

    def _count(self, stage: str) -> int:
        train = len(self.bench.material.train)
        return min(train, self.sweep_rows) if stage == "validation" and self.sweep_rows is not None else train

    def rows(self, stage: str) -> Table:
        """For training. Which choice is best is asked of some of them."""
        train = self.bench.material.train
        return self.bench.material.some(train, self.sweep_rows) if stage == "validation" else train

    def once(self, method: Method, setting: Setting, measure: bool = False) -> Record:
        """The record of a run, which is done where it is not there."""
        if setting not in self.results:
            started = time.perf_counter()
            outcome = self._outcome(method, setting, measure)
            self.results.add({"setting": setting, **outcome, "wall_seconds": round(time.perf_counter() - started, 2)})
            if self.on_run is not None:
                self.on_run(self.results[setting])
        return self.results[setting]

    def _outcome(self, method: Method, setting: Setting, measure: bool) -> Record:
        """In the test stage a failure is one; among choices it is a reason not to take this one."""
        stage, choice = setting["stage"], setting["choice"]
        try:
            if stage == "validation":
                self._check_tests_fit(method, choice)
            taught = method.teach(self.bench, self.rows(stage), choice, setting["seed"], measure)
            validation = self._score(taught)
            return {"validation": validation, "failed": None, **(self._tested(taught) if stage == "test" else {})}
        except (Diverged, DoesNotFit) as error:
            if stage == "test":
                raise
            return {"validation": None, "failed": str(error)}

    def _score(self, taught: Taught) -> float:
        rows = self.bench.material.validation
        self._check_fits(taught, rows)
        return self.bench.reader.score(taught.model, rows, taught.way)

    def _tested(self, taught: Taught) -> Record:
        rows, elsewhere = self.bench.material.test, self.bench.elsewhere
        self._check_fits(taught, rows)
        started = time.perf_counter()
        scores = self.bench.reader.scores(taught.model, rows, taught.way)
        each = (time.perf_counter() - started) / len(rows)
        return {"test": scores, "seconds_per_row": each, "trained": taught.trained, "file_bytes": taught.file_bytes, "seconds": taught.seconds,
                "predicted_bytes": taught.memory.predicted, "measured_bytes": taught.memory.measured,
                "elsewhere_of": None if elsewhere is None else elsewhere.name,
                "elsewhere": None if elsewhere is None else self._forgot(taught, elsewhere)}  # fmt: skip

    def _forgot(self, taught: Taught, elsewhere: ForgettingProbe) -> list[float]:
        """Before and after. A model that was only asked is what it was."""
        return [self.before(), self.before() if taught.way is not None else elsewhere.measure(taught.model)]

    def before(self) -> float:
        """What is measured elsewhere of the model as it was published."""
        if self._before is None:
            assert self.bench.elsewhere is not None
            self._before = self.bench.elsewhere.measure(self.bench.fresh())
        return self._before

    def _check_tests_fit(self, method: Method, choice: Choice) -> None:
        """A choice that leaves a seed's test no room is not made."""
        for seed in self.seeds_of(method):
            for way in method.ways(self.bench, choice, seed):
                for rows in (self.bench.material.validation, self.bench.material.test):
                    self._check_room(self.bench.context, rows, way)

    def _check_fits(self, taught: Taught, rows: Rows) -> None:
        self._check_room(context_of(taught.model), rows, taught.way)

    def _check_room(self, limit: int | None, rows: Rows, way: Way | None) -> None:
        if limit is not None and (tokens := self.bench.reader.longest(rows, way)) > limit:
            shown, fewer = (" with what is shown before it", "show fewer (--shots), or ") if way is not None and way.shots else ("", "")
            raise DoesNotFit(f"the longest row has {tokens} tokens{shown}, the model's context is {limit}: {fewer}leave longer rows out "
                             "(--max-length)")  # fmt: skip

    def _check_read_once(self, method: Method, choice: Choice) -> None:
        """A second look at the test rows, for another choice, would choose by them."""
        setting = self.setting(method, "test", choice, self.seeds[0])
        same = {name: value for name, value in setting.items() if name not in ("choice", "seed")}
        for record in self.results.of(**same):
            if record["setting"]["choice"] != choice:
                raise LoraLabError(f"the test rows were read for {record['setting']['choice']}, and {choice} is chosen now. Another look would "
                                   f"choose by the test: give another --results file, or remove older lines from {self.results.path}")  # fmt: skip
