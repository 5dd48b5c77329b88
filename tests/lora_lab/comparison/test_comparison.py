"""A fair comparison: chosen on the validation rows, tested once, no run done twice, a table of it."""

from __future__ import annotations

import pytest
from task_tools import decoder, opinions, workbench

from lora_lab import LoraLabError
from lora_lab.comparison import ForgettingProbe, Results, Study, table
from lora_lab.comparison.methods import Method, Taught
from lora_lab.comparison.table import markdown, text
from lora_lab.tasks import Way
from lora_lab.training.guards import Diverged


class Says(Method):
    """A method whose choices score what they say, on each kind of rows, and which notes what was read."""

    name, title = "says", "says"

    def __init__(self, values, seeded=True):
        self.values, self.seeded = values, seeded

    def choices(self, bench):
        return [{"number": number} for number in range(len(self.values))]

    def teach(self, bench, rows, choice, seed, measure=False):
        value = self.values[choice["number"]]
        if value is None:
            raise Diverged("the loss is nan")
        return Taught((value, seed, len(rows)))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of Says; study.read: the rows that were scored, and by what."""
    bench, read = workbench(tmp_path), []

    def score(model, rows, way=None):
        read.append(("validation" if rows is bench.material.validation else "test", *model))
        return model[0]

    monkeypatch.setattr(bench.reader, "score", score)
    monkeypatch.setattr(bench.reader, "scores", lambda model, rows, way=None: {"accuracy": score(model, rows) + model[1] / 100})
    monkeypatch.setattr("lora_lab.comparison.study.context_of", lambda model: None)
    made = Study(bench, "tiny", {"says": Says([0.2, 0.7, None, 0.7])}, seeds=(0, 1, 2), sweep_rows=5)
    made.read = read
    return made


# The bookkeeping --------------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_best_on_the_validation_rows_and_the_test_rows_are_read_for_it_alone(study):
    """Of equal ones the first; one that diverged never. Choices are made with one seed and few rows, tests with every row and seed."""
    study.run("says")
    rows = len(study.bench.material.train)
    assert [entry for entry in study.read if entry[0] == "test"] == [("test", 0.7, seed, rows) for seed in (0, 1, 2)]
    assert [entry[1:] for entry in study.read[:3]] == [(0.2, 0, 5), (0.7, 0, 5), (0.7, 0, 5)]
    assert table(study, ["says"])[2][:2] == ["says", "71.0 ± 1.0 (3)"]


def test_a_method_that_no_seed_changes_is_tested_once(study):
    study.methods = {"says": Says([0.2, 0.7], seeded=False)}
    study.run("says")
    assert [entry[2] for entry in study.read if entry[0] == "test"] == [0] and table(study, ["says"])[2][1] == "70.0"


def test_a_seed_that_is_given_twice_counts_once(study):
    study.seeds = (1, 1, 0)
    study.run("says")
    assert [entry[2] for entry in study.read if entry[0] == "test"] == [1, 0] and table(study, ["says"])[2][1].endswith("(2)")


def test_runs_of_other_answers_or_class_names_are_other_runs(tmp_path):
    """A results file that outlives a correction of the labels must not answer for them."""
    right = opinions(60)
    made = [workbench(tmp_path / str(number), rows=rows).facts for number, rows in
            enumerate((right, right, [{**row, "label": 1 - row["label"]} for row in right],
                       [{**row, "label": ("bad", "good")[row["label"]]} for row in right],
                       [{**row, "label": ("dull", "fine")[row["label"]]} for row in right]))]  # fmt: skip
    known = [{**facts, "source": "", "rows": None} for facts in made]
    assert known[0] == known[1] == known[3] and known[0]["digest"] != known[2]["digest"] and known[0]["classes"] != known[4]["classes"]


def test_what_was_not_measured_elsewhere_then_is_said(study):
    """Runs of a command with --no-forgetting, or with other --forgetting-data, have no number for this column."""
    study.run("says")
    study.bench.elsewhere = ForgettingProbe("perplexity, other", lambda model: 1.5)
    assert table(study, ["says"])[2][-2] == "not measured"
    study.bench.source, study.results = lambda dtype: None, Results()
    study.run("says")
    assert table(study, ["says"])[2][-2] == "1.5 -> 1.5"


def test_a_lower_loss_is_better(study, monkeypatch):
    monkeypatch.setattr(type(study.bench.reader), "higher_is_better", False)
    assert study.chosen(study.methods["says"]) == {"number": 0}


def test_where_no_choice_works_the_reason_is_told(study):
    study.methods = {"says": Says([None, None])}
    with pytest.raises(LoraLabError, match="says: none of its choices works: the loss is nan"):
        study.run("says")


def test_runs_are_kept_and_not_done_again_and_a_line_cut_short_is_no_run(study, tmp_path):
    study.results = Results(tmp_path / "runs" / "r.jsonl")
    study.run("says")
    path, done = study.results.path, len(study.read)
    path.write_bytes(path.read_bytes()[:-20])
    study.results = Results(path)
    study.run("says")
    assert [entry[0] for entry in study.read[done:]] == ["validation", "test"] and len(Results(path).records) == 7


def test_the_test_is_not_read_again_for_another_choice(study):
    study.run("says")
    study.methods = {"says": Says([0.9, 0.7, None, 0.7])}
    study.results.records = {name: record for name, record in study.results.records.items() if record["setting"]["stage"] == "test"}
    with pytest.raises(LoraLabError, match=r"read for \{'number': 1\}, and \{'number': 0\} is chosen now"):
        study.run("says")


def test_examples_that_leave_no_room_are_not_chosen(tmp_path):
    bench = workbench(tmp_path, lambda: decoder(max_position_embeddings=160), shots=(4, 1))
    study = Study(bench, "tiny", seeds=(0,))
    study.run("few-shot")
    failed = [record["failed"] for record in study.results.of(method="few-shot", stage="validation")]
    assert "the model's context is 160" in failed[0] and failed[1] is None and table(study, ["few-shot"])[2][-1] == "shots 1"


def test_examples_that_leave_another_seeds_test_no_room_are_not_chosen(tmp_path, monkeypatch):
    """The first seed's would do, and the second's fail after all choices were made."""
    bench = workbench(tmp_path, lambda: decoder(max_position_embeddings=160), shots=(3, 1))
    monkeypatch.setattr(bench.reader, "few", lambda rows, count, seed: Way(bench.reader.way.words, tuple(rows[: count if seed else 1])))
    study = Study(bench, "tiny", seeds=(0, 1))
    study.run("few-shot")
    failed = [record["failed"] for record in study.results.of(method="few-shot", stage="validation")]
    assert "show fewer (--shots), or leave longer rows out (--max-length)" in failed[0] and study.chosen(study.methods["few-shot"]) == {"shots": 1}


def test_the_only_choice_is_refused_at_once_where_a_seeds_test_has_no_room(tmp_path, monkeypatch):
    bench = workbench(tmp_path, lambda: decoder(max_position_embeddings=160), shots=(3,))
    monkeypatch.setattr(bench.reader, "few", lambda rows, count, seed: Way(bench.reader.way.words, tuple(rows[: count if seed else 1])))
    study = Study(bench, "tiny", seeds=(0, 1))
    with pytest.raises(LoraLabError, match="the model's context is 160"):
        study.run("few-shot")
    assert not study.results.records


def test_rows_of_a_choice_have_the_classes_of_the_training_rows(tmp_path):
    """They alternate: every second would be of one class."""
    study = Study(workbench(tmp_path), "tiny", sweep_rows=4)
    train, some = study.bench.material.train, list(study.rows("validation"))
    assert sorted(row["label"] for row in some) == [0, 0, 1, 1] and all(row in train for row in some) and study.rows("test") is train


# The table --------------------------------------------------------------------------------------------------------------------


def test_the_table_is_text_and_markdown():
    lines = [["method", "accuracy (%)", "chosen"], ["LoRA", "80.0", "rate | 1"]]
    assert text(lines) == "method  accuracy (%)  chosen\nLoRA            80.0  rate | 1"
    assert markdown(lines).splitlines()[1:] == ["| --- | --- | --- |", r"| LoRA | 80.0 | rate \| 1 |"]
