"""The study of the lectures' tasks keeps its promises: disjoint parts, a judge who has not seen what it judges, the test rows behind every choice,
no run done twice, a table from the file alone.

On tiny random models and made-up rows: what is held here is the bookkeeping, not how well anything is learned.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tasks
import tasks_data
import tasks_readers
import tasks_table
import torch
from task_tools import decoder, dialogues, encoder, instructions, jsonl, table
from tasks_data import TASKS

PARTS = ("Training", "Validation", "Test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small data sets of the three shapes, and tiny models in place of the real ones."""
    for number, part in enumerate(PARTS):
        rows = [{"ID": row["id"], "section_text": row["summary"], "dialogue": f"{row['dialogue']} {number}"} for row in dialogues(8)]
        table(tmp_path / "mts_dialog" / f"MTS-Dialog-{part}Set.csv", rows)
    jsonl(tmp_path / "instructions_apache" / "instructions.jsonl", instructions(40))
    jsonl(tmp_path / "clothing_reviews" / "derived_balanced_instruction.jsonl", opinions())
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(tasks.models, "load", lambda name, dtype: decoder(max_position_embeddings=640))
    monkeypatch.setattr(tasks_readers, "encoder", lambda dtype: encoder())
    monkeypatch.setattr(tasks_readers, "JUDGE", {"max_steps": 2})
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, generation={**task.generation, "max_new_tokens": 3}, longest=640))
    return tmp_path


def opinions(count=300):
    """Of 60 products; each third row is neutral; two rows are one text."""
    rows = [{"instruction": f"Write a {kind} review of this product.", "input": "Knits", "output": f"{kind[:3]} cat {number}", "sentiment": kind,
             "clothing_id": number % 60, "rating": 3} for number in range(count) for kind in [("negative", "neutral", "positive")[number // 60 % 3]]]
    return [*rows, {**rows[0], "clothing_id": 59}]


def given(tmp_path, **changes):
    settings = {"rows": 12, "held_out": 4, "max_steps": 2, "seeds": [0], "precision": "fp32", "results": tmp_path / "r.jsonl"}
    return argparse.Namespace(**{**settings, **changes})


def study(name, tmp_path, **changes):
    options = given(tmp_path, **changes)
    return tasks.study_of(name, options, tasks.Dated(options.results))


# Parts ------------------------------------------------------------------------------------------------------------------------


def test_no_product_and_no_text_is_in_two_parts_of_the_reviews(folder):
    material = tasks_data.reviews(folder / "clothing_reviews")
    sources = {row["output"]: row for row in reversed(opinions())}  # of a text that is there twice the first
    texts = {part: [row["output"] for row in rows] for part, rows in material.parts.items()}
    assert {*texts} == {"train", "judge", "validation", "test"} and all(texts.values())
    for values in (texts, {part: {sources[text]["clothing_id"] for text in own} for part, own in texts.items()}):
        assert sum(len({*own}) for own in values.values()) == len({each for own in values.values() for each in own})
    assert sum(map(len, texts.values())) == len({text for own in texts.values() for text in own})


@pytest.mark.parametrize(("name", "kinds"), [("reviews", ("negative", "neutral", "positive")), ("polar_reviews", ("negative", "positive"))])
def test_of_the_reviews_as_many_are_of_each_sentiment_whatever_is_taken_of_them(folder, tmp_path, name, kinds):
    material = study(name, tmp_path, rows=12, held_out=6).bench.material
    for part in ("train", "judge", "validation", "test"):
        asked = [tasks_readers.asked_for(row) for row in material.part(part)]
        assert {kind: len(kinds) * asked.count(kind) for kind in asked} == dict.fromkeys(kinds, len(asked)), part
    assert len(material.train) == 12 and len(material.test) == 6


def test_the_dialogues_parts_are_the_data_sets_own(folder):
    material = tasks_data.dialogues(folder / "mts_dialog")
    assert [[row["dialogue"][-1] for row in material.part(part)] for part in ("train", "validation", "test")] == [["0"] * 8, ["1"] * 8, ["2"] * 8]


def test_long_rows_are_not_trained_on_and_all_are_tested(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "mts_dialog", replace(TASKS["mts_dialog"], longest=10))
    with pytest.raises(Exception, match="no train rows"):
        study("mts_dialog", tmp_path).bench.material.train  # noqa: B018
    assert len(study("mts_dialog", tmp_path, held_out=None).bench.material.test) == 8


def test_data_that_are_not_there_are_told_with_the_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="LORA_LAB_DATA"):
        study("reviews", tmp_path)


# Runs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_goes_on_where_it_was_and_is_told_from_the_file_alone(folder, tmp_path, monkeypatch, capsys, name):
    made = study(name, tmp_path)
    expected = len([*tasks.missing(made)])
    tasks.carry_out(made)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(lines) == expected == (3 + 1 + 3 + 1 if name == "mts_dialog" else 1 + 3 + 1) and str(tmp_path) not in "".join(lines)
    assert f"{expected} runs to come" in capsys.readouterr().err
    again = study(name, tmp_path)
    assert [*tasks.missing(again)] == []
    tasks.carry_out(again)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == expected
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "argv", ["tasks.py", name, "--table", "--results", str(tmp_path / "r.jsonl")])
    tasks.main()
    printed = capsys.readouterr().out
    assert re.search(r"^\| untuned \|", printed, re.MULTILINE) and re.search(r"^\| LoRA less untuned \|", printed, re.MULTILINE)
    assert len(re.findall("^(met|MISSED): ", printed, re.MULTILINE)) == 2


def test_another_seed_is_one_more_run_of_the_same_choice(folder, tmp_path):
    tasks.carry_out(study("instructions", tmp_path))
    more = study("instructions", tmp_path, seeds=[0, 1])
    assert [(setting["method"], setting["stage"], setting["seed"]) for setting in tasks.missing(more)] == [("lora", "test", 1)]
    tasks.carry_out(more)
    (group,) = tasks_table.groups(more.results, "instructions")
    assert [len(records) for records in group.values()] == [1, 2] and " of 2 (" in tasks_table.told("instructions", group)


def test_an_estimate_goes_by_what_was_measured(folder, tmp_path):
    made = study("instructions", tmp_path)
    setting = list(tasks.missing(made))[-1]
    assert setting["stage"] == "test" and tasks.estimate(made, setting) == tasks.work(setting) > tasks.work({**setting, "stage": "validation"})
    made.results.add({"setting": setting, "validation": 0.5, "failed": None, "wall_seconds": 500.0})
    assert tasks.estimate(made, setting) == pytest.approx(500.0)


def test_texts_stand_side_by_side_for_the_rows_that_they_answer(folder, tmp_path):
    made = study("reviews", tmp_path)
    tasks.carry_out(made)
    (group,) = tasks_table.groups(made.results, "reviews")
    found = tasks.samples(made, group)
    assert [*found.columns] == ["a customer's review", "untuned", "LoRA"]
    assert found.columns["a customer's review"] == [row["output"] for row in made.bench.material.test]
    assert not tasks.mine(study("reviews", tmp_path, held_out=2), group) and tasks.mine(study("reviews", tmp_path), group)


# Values of rows ---------------------------------------------------------------------------------------------------------------


def test_the_rows_values_add_up_to_what_the_package_says(folder, tmp_path):
    for name, same in (("mts_dialog", {"ROUGE-L": "rougeL", "wrong facts": "wrong facts", "clean endings": "clean endings"}),
                       ("instructions", {"loss": "loss", "clean endings": "clean endings"})):  # fmt: skip
        bench = study(name, tmp_path).bench
        model, rows = bench.fresh(), bench.material.test
        plain = bench.material.reader(model, bench.reader.tokenizer, bench.reader.reading)
        expected, found = plain.scores(model, rows), bench.reader.scores(model, rows)["values"]
        for ours, theirs in same.items():
            assert tasks_table.mean(found[ours]) == pytest.approx(expected[theirs], abs=1e-4), ours


def test_rates_are_chosen_by_the_loss_and_wordings_by_the_summaries(folder, tmp_path):
    bench = study("mts_dialog", tmp_path).bench
    model, rows, way = bench.fresh(), bench.material.validation, bench.reader.ways()[1]
    plain = bench.material.reader(model, bench.reader.tokenizer, bench.reader.reading)
    assert bench.reader.score(model, rows) == -plain.loss(model, rows) and bench.reader.score(model, rows, way) == plain.score(model, rows, way)


def test_an_answer_of_a_person_ends_cleanly_where_it_would_have_fitted(folder, tmp_path):
    reader, rows = study("instructions", tmp_path).bench.reader, study("instructions", tmp_path).bench.material.test
    ends = reader.references(rows)["a person's answer"]["clean endings"]  # "7." and "17.", a byte a token, in the room of three with its end
    assert ends == [int(len(row["output"]) < 3) for row in rows] and {*ends} == {0, 1}


# The judge --------------------------------------------------------------------------------------------------------------------


def test_the_judge_learns_from_its_own_rows_and_can_tell_them_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_readers, "JUDGE", {"max_steps": 30, "learning_rate": 1e-2})
    taught = []
    fit = tasks_readers.fit
    monkeypatch.setattr(tasks_readers, "fit", lambda model, rows, config: taught.append(rows) or fit(model, rows, config))
    bench = study("polar_reviews", tmp_path).bench
    words = {"negative": "the bad dog", "positive": "good film"}
    own = bench.material.part("judge")
    for row in own:
        row["output"] = words[tasks_readers.asked_for(row)]
    assert bench.reader.judge.reads([*words.values()]) == [*words]
    assert len(taught[0]) == len(own) and bench.reader.judge is bench.reader.judge


def test_a_review_is_as_asked_where_the_judge_reads_it_so_and_nothing_never_is(folder, tmp_path, monkeypatch):
    bench, (no, yes) = study("polar_reviews", tmp_path).bench, ("negative", "positive")
    monkeypatch.setattr(tasks_readers.Judge, "__init__", lambda self, rows, reading: None)
    monkeypatch.setattr(tasks_readers.Judge, "reads", lambda self, texts: [no, no, yes, yes])
    rows = bench.material.test
    assert [tasks_readers.asked_for(row) for row in rows] == [no, no, yes, yes]
    assert bench.reader.of_texts(["a", " ", "", "b"], rows) == {"read as asked": [1, 0, 0, 1]}
    monkeypatch.setattr(tasks_readers.Judge, "reads", lambda self, texts: [no, yes, no, yes])
    assert bench.reader.of_texts(["a", "b", "c", "d"], rows) == {"read as asked": [1, 0, 0, 1]}


# The table --------------------------------------------------------------------------------------------------------------------


def test_an_interval_is_as_wide_as_chance():
    """Of a share p of n rows: 1.96 sqrt(p (1 - p) / n) to either side."""
    low, high = tasks_table.interval([[1] * 60 + [0] * 140])
    expected = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - expected, abs=0.01) and high == pytest.approx(0.3 + expected, abs=0.01)


def test_what_changes_is_compared_row_by_row():
    """Rows differ more than models: by rows the difference is certain, where the two intervals overlap."""
    rows = numpy.random.default_rng(1).normal(size=200)
    before, after = [[*rows]], [[*(rows + 0.1)]]
    low, high = tasks_table.interval(after, less=before)
    assert low == pytest.approx(0.1) == high and tasks_table.interval(before)[1] > tasks_table.interval(after)[0]


def test_a_loss_is_the_mean_over_tokens_and_not_over_rows():
    assert tasks_table.mean([(10.0, 10), (3.0, 1)]) == pytest.approx(13 / 11)
    assert tasks_table.cell("loss", [[(10.0, 10), (10.0, 10)]]) == "1.00 (1.00 to 1.00)"


def record(method, seed, values, references=None):
    setting = {"model": "tiny", "source": "reviews", "stage": "test", "method": method, "choice": {"learning_rate": 1e-3}, "seed": seed,
               "rows": {"train": 8}, "training": {"epochs": 1}, "generation": {}}  # fmt: skip
    return {"setting": setting, "seconds": 5, "test": {"values": values, "references": references or {}}}


@pytest.mark.parametrize(("lora", "verdicts"), [(70, ["met", "met"]), (69, ["MISSED", "met"]), (64, ["MISSED", "MISSED"])])
def test_what_was_to_come_of_it_is_met_or_missed(tmp_path, lora, verdicts):
    """75 of 100 real reviews are read as what they are, 40 of the untuned model's as they were asked for."""
    made = {name: {"read as asked": [1] * count + [0] * (100 - count)} for name, count in (("people", 75), ("untuned", 40), ("lora", lora))}
    results = tasks.Dated(tmp_path / "r.jsonl")
    results.add(record("zero-shot", 0, made["untuned"], {"a customer's review": made["people"]}))
    results.add(record("lora", 0, made["lora"], {"a customer's review": made["people"]}))
    (group,) = tasks_table.groups(results, "reviews")
    assert re.findall("^(met|MISSED): ", tasks_table.told("reviews", group), re.MULTILINE) == verdicts
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["torch"] == torch.__version__


def test_a_cell_has_the_mean_of_the_seeds_and_their_spread():
    seeds = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert tasks_table.cell("read as asked", seeds).startswith("50.0 ± 25.0 of 3 (")
    assert statistics.stdev([25, 50, 75]) == 25


def test_the_tables_on_the_page_are_those_of_the_runs():
    """As `python benchmarks/tasks.py --table` prints them from the runs that are kept."""
    page = (Path(__file__).parents[3] / "docs" / "tasks-on-real-data.md").read_text(encoding="utf-8")
    results = tasks.Dated(tasks.RESULTS)
    whole = [group for name in TASKS for group in tasks_table.groups(results, name) if {*tasks_table.NAMES} <= {*group}]
    assert whole and all(tasks_table.table(group) in page for group in whole)
