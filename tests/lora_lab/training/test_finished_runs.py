"""A run that went on to its end is over, however it was interrupted before."""

from __future__ import annotations

import json
import os
import signal
import warnings

import pytest
from tiny_workshop import QUIET, exact_model, token_rows

from lora_lab import LoraLabError
from lora_lab.training import Interrupted, fit
from lora_lab.training.loop import Run

ROWS = token_rows()


def interrupted(monkeypatch, config, step):
    """A run that Ctrl-C stops after this step."""
    whole = Run.after
    with monkeypatch.context() as patched:
        patched.setattr(Run, "after", lambda run, done: (whole(run, done), os.kill(os.getpid(), signal.SIGINT) if done == step else None))
        with pytest.raises(Interrupted):
            fit(exact_model(), ROWS, config)


@pytest.mark.parametrize("save_every", [None, 3])
def test_a_run_that_was_interrupted_resumed_and_finished_is_over(tmp_path, monkeypatch, save_every):
    """Without save_every the interruption's snapshot is the only one, and says that the run was stopped."""
    config = {"max_steps": 4, "micro_batch_size": 2, "output_dir": tmp_path / "run", "save_every": save_every, **QUIET}
    interrupted(monkeypatch, config, 2)
    with pytest.raises(LoraLabError, match="holds a run that was stopped after step 2 of 4"):
        fit(exact_model(), ROWS, config)
    assert fit(exact_model(), ROWS, {**config, "resume": True}).steps == 4
    states = [json.loads(path.read_text()) for path in (tmp_path / "run" / "snapshots").glob("*/state.json")]
    assert max(states, key=lambda state: state["step"])["finished"]
    fit(exact_model(), ROWS, config)  # so another may begin here


def test_a_run_that_nothing_interrupts_leaves_no_snapshot_unasked(tmp_path):
    fit(exact_model(), ROWS, {"max_steps": 2, "output_dir": tmp_path / "run", **QUIET})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_a_warm_up_that_never_ends_is_warned_of():
    for warmup_steps, steps in ((3, 3), (9, 3)):
        with pytest.warns(UserWarning, match=f"warmup_steps={warmup_steps} of 3 steps"):
            fit(exact_model(), ROWS, {"max_steps": steps, "warmup_steps": warmup_steps, **QUIET})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(exact_model(), ROWS, {"max_steps": 3, "warmup_steps": 2, **QUIET})
