"""SIGKILL at any moment of training: started again, it ends in the same bits, weights, optimizer, random numbers and log, as if it had not died."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import KILLS, told
from dying import Ended, die_at, run
from savers import same
from tiny_workshop import QUIET, forgotten, log_of, our_llama, timeless, token_rows

import lora_lab
from lora_lab.training import fit, snapshots
from lora_lab.training.loop import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX's")
ROWS, HELD_OUT = token_rows(12), token_rows(3, seed=5)


def train(folder: Path, **changes: Any) -> None:
    """The same command every time, as a launcher gives it; where there is something to go on from, the model brings nothing."""
    torch.manual_seed(1)
    model = lora_lab.inject(our_llama(), rank=2, dropout=0.1, init="random")
    config = {"max_steps": 3, "micro_batch_size": 2, "grad_accum_steps": 2, "learning_rate": 0.01, "save_every": 1, "keep_snapshots": 1,
              "eval_every": 2, "keep_best": True, "resume": True, "output_dir": folder, **QUIET, **changes}  # fmt: skip
    begun = config["resume"] and any(folder.glob("snapshots/step-*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a damaged snapshot
        warnings.filterwarnings("error" if begun else "ignore", "nothing to resume")
        fit(forgotten(model) if begun else model, ROWS, config, eval_data=HELD_OUT)


def outcome(folder: Path) -> dict[str, Any]:
    """All that the run has left, but for what a clock says."""
    found = snapshots.newest(folder)
    return {"tensors": found.tensors, "result": timeless(found.state["result"]), "step": found.step, "log": log_of(folder)}


def pressing(work: Any) -> Any:
    """Ctrl-C is pressed in the second step, and the run ends with it."""
    backward, once = Run.backward, [signal.SIGINT]  # a second time would not let the step end

    def pressed(run: Run, *args: Any) -> float:
        if run.result.steps == 1 and once:
            signal.raise_signal(once.pop())
        return backward(run, *args)

    def pressing(*args: Any) -> None:
        with mock.patch.object(Run, "backward", pressed):
            work(*args)

    return pressing


def watched(work: Any) -> tuple[Ended, list[tuple[int, int]]]:
    """The work done once: how it ended, and (operations until then, step) of each snapshot that was promised."""
    done, promised, write = 0, [], snapshots.write

    def before(number: int, name: str) -> None:
        nonlocal done
        done = number + 1

    def writing(folder: Path, snapshot: snapshots.Snapshot, keep: int) -> Path:
        target = write(folder, snapshot, keep)
        promised.append((done, snapshot.step))
        return target

    def watching() -> Any:
        with mock.patch.object(snapshots, "write", writing), contextlib.suppress(KeyboardInterrupt):
            work()
        return promised

    ended = run(watching, before)
    assert ended.error is None, ended
    return ended, ended.result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("training")


@pytest.mark.parametrize("pressed", [False, True], ids=["", "after Ctrl-C"])
def test_killed_at_any_file_operation_and_started_again_is_never_killed(pressed: bool, tmp_path: Path) -> None:
    """Whatever was promised is there: with a single snapshot kept, none is ever removed before the next is on the disk."""
    command = functools.partial(train, max_steps=3 if pressed else 2)
    command(tmp_path / "whole")
    expected, work = outcome(tmp_path / "whole"), pressing(command) if pressed else command
    last = [f"step-{expected['step']:06d}"]
    whole, promised = watched(lambda: work(tmp_path / "counted"))
    for number in range(len(whole.operations)):
        parts = tmp_path / str(number)
        ended = run(functools.partial(work, parts), die_at(number))
        assert ended.signal == signal.SIGKILL and ended.operations == whole.operations[: number + 1]
        if due := [step for done, step in promised if done <= number]:
            assert snapshots.newest(parts).step >= due[-1]
        finished = (parts / "snapshots" / last[0]).exists()
        again = run(functools.partial(command, parts))
        assert again.error is None and again.finished and same(outcome(parts), expected)
        assert finished or [path.name for path in (parts / "snapshots").iterdir()] == last  # the next snapshot tidies up
        shutil.rmtree(parts)


def test_killed_at_moments_of_chance_and_started_again_is_never_killed(tmp_path: Path) -> None:
    """One run that dies again and again, each time a little further on."""
    steps, chance, counts = 8 + KILLS, random.Random(0), told.setdefault("training, resumed each time", Counter())
    train(tmp_path / "whole", max_steps=steps)
    for _ in range(KILLS):
        ended = run(functools.partial(train, tmp_path / "parts", max_steps=steps), kill_after=chance.uniform(0.01, 0.15))
        assert ended.error is None
        saving = ended.operations[-12:].count("mkdir")
        counts["finished before its kill" if ended.finished else "while or just after saving" if saving else "while computing"] += 1
    assert run(functools.partial(train, tmp_path / "parts", max_steps=steps)).error is None
    assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_killed_while_a_finished_run_makes_room_for_a_new_one(tmp_path: Path) -> None:
    """Half of the old snapshots would look like a run that could go on, and the new one would be refused."""
    train(tmp_path / "before", keep_snapshots=3)
    work = functools.partial(train, resume=False, max_steps=1, save_every=1)
    shutil.copytree(tmp_path / "before", tmp_path / "counted")
    whole = run(functools.partial(work, tmp_path / "counted"))
    train(tmp_path / "expected", max_steps=1)
    for number in range(whole.operations.index("chmod")):  # with which its first snapshot begins: from there on it is a run like any other
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        assert run(functools.partial(work, folder), die_at(number)).signal == signal.SIGKILL
        again = run(functools.partial(work, folder))
        assert again.error is None and same(outcome(folder), outcome(tmp_path / "expected"))
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)
