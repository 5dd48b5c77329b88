"""Candidates are trained alike, scored on validation rows alone, and the best is the best."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_workshop import our_llama, same_bits, token_rows, weights

import lora_lab
from lora_lab import LoraLabError
from lora_lab.training import Sweep, TrainConfig, Trial, evaluate, fit, grid, sweep
from lora_lab.training.report import read_run

TRAIN, VALIDATION = token_rows(8), token_rows(4, seed=1)
CONFIG = {"max_steps": 4, "micro_batch_size": 4, "progress": False}


def adapted(rank=2):
    return lora_lab.inject(our_llama(), rank, init="random")


def whole():
    return our_llama()


def held_out_loss(model, rows):
    return evaluate(model, rows, TrainConfig(progress=False))


# What is trained --------------------------------------------------------------------------------------------------------------


def test_a_trial_is_what_fit_gives_for_its_settings():
    """The same seed, rows and config; `make` gets what is no field of TrainConfig."""
    found = sweep(adapted, TRAIN, VALIDATION, grid(rank=[1, 3], learning_rate=[1e-3, 1e-2]), {**CONFIG, "seed": 5})
    assert [trial.settings for trial in found.trials] == grid(rank=[1, 3], learning_rate=[1e-3, 1e-2])
    torch.manual_seed(5)
    model = adapted(3)
    result = fit(model, TRAIN, {**CONFIG, "seed": 5, "learning_rate": 1e-2}, eval_data=VALIDATION)
    assert found.trials[3].result.losses == result.losses and found.trials[3].score == result.eval_losses[-1]
    assert len({trial.score for trial in found.trials}) == 4


def test_full_fine_tuning_is_swept_by_the_same_function():
    """It knows no method: what requires grad is trained."""
    found = sweep(whole, TRAIN, VALIDATION, grid(learning_rate=[1e-4, 1e-2]), CONFIG)
    assert found.measure == "validation loss" and found.best is min(found.trials, key=lambda trial: trial.score)


def test_candidates_begin_alike_and_the_callers_random_numbers_go_on():
    seen = []

    def make():
        model = adapted()
        seen.append(weights(model))
        return model

    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    sweep(make, TRAIN, VALIDATION, grid(learning_rate=[1e-3, 1e-2]), CONFIG)
    assert same_bits(*seen) and torch.equal(torch.rand(3), expected)


def test_a_value_that_can_be_called_gets_the_model():
    """For what depends on it, such as a learning rate in units of its weights."""
    found = sweep(whole, TRAIN, VALIDATION, [{"learning_rate": lambda model: model.get_input_embeddings().weight.abs().max().item() / 100}], CONFIG)
    rate = our_llama().get_input_embeddings().weight.abs().max().item() / 100
    assert found.trials[0].settings == {"learning_rate": rate}
    assert found.trials[0].result.losses == fit(whole(), TRAIN, {**CONFIG, "learning_rate": rate}).losses


def test_each_trial_writes_into_a_folder_of_its_own(tmp_path):
    sweep(adapted, TRAIN, VALIDATION, grid(learning_rate=[1e-3, 1e-2]), {**CONFIG, "output_dir": tmp_path})
    assert [len(read_run(tmp_path / number).steps) for number in "12"] == [4, 4]


# How it is scored ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("higher", "picks"), [(True, max), (False, min)])
def test_a_metric_gets_the_trained_model_and_the_validation_rows_only(higher, picks):
    """No other rows are within its reach: those of the test stay unseen."""
    seen = []

    def some_score(model, rows):
        seen.append(rows)
        return held_out_loss(model, rows)

    found = sweep(whole, TRAIN, VALIDATION, grid(learning_rate=[1e-3, 1e-2, 3e-2]), CONFIG, metric=some_score, higher_is_better=higher)
    assert all(rows is VALIDATION for rows in seen) and len(seen) == 3
    assert found.measure == "some score" and found.best is picks(found.trials, key=lambda trial: trial.score)
    assert all(trial.result.eval_losses == [] for trial in found.trials)  # nothing is evaluated that nobody asked for


def test_keep_best_is_scored_by_the_weights_that_stay():
    config = {**CONFIG, "max_steps": 12, "learning_rate": 0.2, "eval_every": 1, "keep_best": True}
    found = sweep(whole, TRAIN, VALIDATION, [{}], config)
    losses = found.trials[0].result.eval_losses
    assert found.trials[0].score == min(losses) < losses[-1]


def test_a_candidate_that_diverges_stays_in_the_table_and_is_not_the_best(tmp_path):
    found = sweep(whole, TRAIN, VALIDATION, grid(learning_rate=[1e30, 1e-3]), CONFIG)
    assert math.isnan(found.trials[0].score) and found.trials[0].result is None
    assert found.best is found.trials[1] and "diverged" in found.table().splitlines()[1]


def test_where_all_diverge_there_is_no_best():
    found = Sweep([Trial({"learning_rate": 1.0}, math.nan, 1.0, None)], "accuracy", True)
    assert "diverged" in str(found)
    with pytest.raises(LoraLabError, match="all 1 candidates diverged"):
        _ = found.best


def test_an_error_that_is_no_divergence_is_not_swallowed():
    """Rows that make no sense make none for any candidate."""
    with pytest.raises(LoraLabError, match="no token of the row has a label"):
        sweep(whole, [{"input_ids": [1, 2], "labels": [-100, -100]}], VALIDATION, [{}], CONFIG)


def test_each_trial_is_told_as_it_comes():
    """A sweep may take hours; what is done is not lost with what is not."""
    told = []

    def stop(trial):
        told.append(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(whole, TRAIN, VALIDATION, grid(learning_rate=[1e-3, 1e-2]), CONFIG, on_trial=stop)
    assert len(told) == 1 and told[0].settings == {"learning_rate": 1e-3}


# The table ----------------------------------------------------------------------------------------------------------------------


def trials():
    result = fit(whole(), TRAIN, CONFIG)
    return [Trial({"rank": 4, "learning_rate": 0.0123456, "init": "a|b"}, 0.5, 2.0, result),
            Trial({"rank": 4, "learning_rate": 0.1, "init": "c"}, 0.75, 3.0, result)]  # fmt: skip


def test_the_table_shows_what_differs_and_marks_the_best():
    lines = Sweep(trials(), "accuracy", True).table().splitlines()
    assert lines[0].split() == ["learning", "rate", "init", "accuracy", "training", "loss", "seconds"]
    assert lines[1].split()[:3] == ["0.0123", "a|b", "0.5000"] and lines[2].split()[-1] == "best"
    assert "best" in Sweep(trials(), "loss", False).table().splitlines()[1]


def test_the_markdown_table_is_one():
    lines = Sweep(trials(), "accuracy", True).markdown().splitlines()
    assert lines[1].count("---:") == 6 and all(line.replace(r"\|", "").count("|") == 7 for line in lines)
    assert r"a\|b" in lines[2]


# Mistakes -----------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown setting": (grid(rnk=[1]), {}, "'rnk' is neither an argument of make .rank. nor a field of TrainConfig .did you mean 'rank'"),
    "no candidates": ([], {}, "candidates=.*expected a list of dicts"),
    "a grid that was not made": ({"rank": [1, 2]}, {}, "candidates=.*expected a list of dicts"),
    "a setting out of range in the last": ([{"learning_rate": 1e-3}, {"learning_rate": -1.0}], {}, "learning_rate=-1.0"),
    "unknown field of the config": ([{}], {"learning_rat": 1}, "did you mean 'learning_rate'"),
}


@pytest.mark.parametrize(("candidates", "config", "message"), MISTAKES.values(), ids=MISTAKES)
def test_candidates_that_cannot_be_meant_are_refused_before_anything_is_made(candidates, config, message):
    def make(rank=2):
        raise AssertionError

    with pytest.raises(LoraLabError, match=message):
        sweep(make, TRAIN, VALIDATION, candidates, {**CONFIG, **config})


def test_settings_that_make_needs_are_named():
    with pytest.raises(LoraLabError, match="make needs 'rank'"):
        sweep(lambda rank: adapted(rank), TRAIN, VALIDATION, [{"rank": 2}, {"learning_rate": 0.1}], CONFIG)


@pytest.mark.parametrize(("rows", "validation"), [([], VALIDATION), (TRAIN, [])])
def test_no_rows_are_refused(rows, validation):
    with pytest.raises(LoraLabError, match="rows is empty"):
        sweep(whole, rows, validation, [{}], CONFIG)


def test_validation_rows_that_were_learned_are_told():
    """Else the score says how well rows are remembered."""
    with pytest.warns(UserWarning, match="2 of 6 validation rows are training rows"):
        sweep(whole, TRAIN, [*VALIDATION, *TRAIN[:2]], [{}], CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(whole, TRAIN, VALIDATION, [{}], CONFIG)
