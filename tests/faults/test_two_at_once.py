"""Two processes that save to the same place at once: what loads is what one of them saved, whole, at every moment and in the end."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import dying
import pytest
import savers
import torch
from cases import names
from processes import PATIENCE_SECONDS
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_workshop import QUIET, our_llama, token_rows

import lora_lab
import prompt_tuning_lab
from lora_lab import LoraLabError
from lora_lab.files import alone_in, write_file
from lora_lab.streaming import shards
from lora_lab.training import fit, snapshots
from lora_lab.training.loop import Run
from prompt_tuning_lab.peft_files import reading, trainable

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")
ROUNDS = 8


def together(*works: Callable[[], Any]) -> list[int]:
    """Children that start at the same moment; the parent does not wait for them."""
    start, children = time.monotonic() + 0.05, []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                time.sleep(max(0.0, start - time.monotonic()))
                work()
                os._exit(0)
            except LoraLabError:
                os._exit(2)
            finally:
                os._exit(1)
        children.append(child)
    return children


def codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def again_and_again(save: Callable[[], Any]) -> Callable[[], None]:
    return lambda: [save() for _ in range(ROUNDS)] and None


def wait_until_there(path: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < until, f"{path.name!r} never appeared"
        time.sleep(0.01)


def saved_by_two(folder: Path, first: Callable[[], Any], second: Callable[[], Any], read: Callable[[], Any]) -> Any:
    """What loads in the end; on the way, too, it is what one of them saved."""
    first()
    one = read()
    second()
    other = read()
    children = together(again_and_again(first), again_and_again(second))
    reads = 0
    while not all(map(is_over, children)):
        found, reads = read(), reads + 1
        assert savers.same(found, one) or savers.same(found, other)
    assert reads and codes(children) == [0, 0]
    found = read()
    assert savers.same(found, one) or savers.same(found, other)
    assert not [name for name in names(folder) if "unfinished" in name]
    return found


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    """The configuration in the end is that of the tensors."""
    saved_by_two(tmp_path, *(lambda rank=rank: lora_lab.save(savers.adapted(rank), tmp_path / "adapter") for rank in (2, 4)),
                 lambda: savers.read_adapter(tmp_path))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_lab.load(savers.our_llama(), tmp_path / "adapter")


def test_two_prompts_in_one_folder_and_the_network_is_that_of_the_prompt(tmp_path: Path) -> None:
    """Each save removes the networks of others; never that of a prompt whose save has only begun."""
    read = lambda: savers.read_prompt(tmp_path)["rows"]  # noqa: E731
    saved_by_two(tmp_path, *(lambda seed=seed: prompt_tuning_lab.save(savers.prompted(seed), tmp_path / "prompt") for seed in (0, 1)), read)
    assert savers.read_prompt(tmp_path)["kind"] == type(savers.prompted(0).prompt()).__name__


@pytest.mark.parametrize(("module", "name"), [(reading, "read_trainable"), (trainable, "read_shard")])
def test_a_prompt_that_is_replaced_before_its_network_is_read_is_read_again(module: Any, name: str, tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The other save has removed the network of the rows that were read: the pair is read anew, and is a network."""
    prompt_tuning_lab.save(savers.prompted(0), tmp_path / "prompt")
    read, once = getattr(module, name), iter([None])

    def after_another_save(*args: Any) -> Any:
        for _ in once:
            prompt_tuning_lab.save(savers.prompted(1), tmp_path / "prompt")
        return read(*args)

    monkeypatch.setattr(module, name, after_another_save)
    found = savers.read_prompt(tmp_path)
    assert found["kind"] == type(savers.prompted(1).prompt()).__name__
    assert torch.equal(found["rows"], savers.prompted(1).prompt()().detach())


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    """A reader may come between two files; it says so, or has one of the two. In the end the folder is one of them."""
    children = together(*(again_and_again(lambda width=width: savers.save_model(tmp_path, width)) for width in (16, 24)))
    assert codes(children) == [0, 0]
    found, expected = savers.read_model(tmp_path), []
    for width in (16, 24):
        savers.save_model(tmp_path / str(width), width)
        expected.append(savers.read_model(tmp_path / str(width)))
    assert any(savers.same(found, each) for each in expected)
    assert not [name for name in names(tmp_path) if "unfinished" in name or "lora-lab-new" in name]


def test_two_merges_into_one_folder(tmp_path: Path) -> None:
    """One of them makes it; the other one says that it is there."""
    savers.base_and_adapter(tmp_path)
    ended = codes(together(*(lambda: savers.merge(tmp_path) for _ in range(3))))
    assert sorted(ended) == [0, 2, 2]
    found = savers.read_model(tmp_path, "merged")
    savers.base_and_adapter(tmp_path / "alone")
    savers.merge(tmp_path / "alone")
    assert savers.same(found, savers.read_model(tmp_path / "alone", "merged"))


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens it twice: the header of the one and the numbers of the other would be an adapter of noise, without a word."""
    first, second, opened = tmp_path / "first", tmp_path / "second", []
    save_file({"a": torch.ones(2)}, first)
    save_file({"a": torch.zeros(300), "b": torch.ones(2)}, second)

    def replaced_meanwhile(path: Path, framework: str) -> Any:
        opened.append(path)
        if len(opened) == 1:
            second.replace(first)
            raise RuntimeError("size is smaller than the required mapping size")
        return safe_open(path, framework)

    monkeypatch.setattr(shards, "safe_open", replaced_meanwhile)
    assert {*shards.read_shard(first).tensors} == {"a", "b"} and len(opened) == 2


def test_a_file_that_is_replaced_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, other = tmp_path / "tensors", tmp_path / "other"
    save_file({"a": torch.ones(2)}, tensors)
    tries = iter(range(10 * shards.MOST_TRIES))

    def replaced_meanwhile(path: Path, framework: str) -> Any:
        next(tries)
        save_file({"a": torch.ones(2)}, other)
        other.replace(tensors)
        return safe_open(path, framework)

    monkeypatch.setattr(shards, "safe_open", replaced_meanwhile)
    with pytest.raises(LoraLabError, match="tensors was replaced 100 times while it was opened"):
        shards.read_shard(tensors)
    assert next(tries) == shards.MOST_TRIES


# What a live process writes in is not litter ----------------------------------------------------------------------------------------------


def test_a_save_removes_what_a_killed_one_left_and_not_what_a_live_one_writes(tmp_path: Path) -> None:
    def slowly(temporary: Path) -> None:
        temporary.write_text("slow")
        (tmp_path / "begun").touch()
        wait_for("go on")

    def wait_for(name: str) -> list[Path]:
        wait_until_there(tmp_path / name)
        return [path for path in tmp_path.iterdir() if "unfinished" in path.name]

    killed = together(lambda: write_file(tmp_path / "file", slowly))
    left = wait_for("begun")
    os.kill(killed[0], signal.SIGKILL)
    assert codes(killed) == [-signal.SIGKILL] and len(left) == 1
    (tmp_path / "begun").unlink()
    slow = together(lambda: write_file(tmp_path / "file", slowly))
    own = wait_for("begun")
    assert len(own) == 1 and own != left  # it removed the other
    write_file(tmp_path / "file", lambda temporary: temporary.write_text("fast"))
    assert (tmp_path / "file").read_text() == "fast" and own[0].exists()
    (tmp_path / "go on").touch()
    assert codes(slow) == [0] and (tmp_path / "file").read_text() == "slow"
    assert names(tmp_path) == ["begun", "file", "go on"]


def test_a_folder_that_somebody_keeps_locked_is_waited_for_and_then_written_all_the_same(tmp_path: Path) -> None:
    """A save in a signal handler, in the middle of a save, must not wait for itself for ever."""
    pytest.importorskip("fcntl")
    with alone_in(tmp_path) as first, alone_in(tmp_path, patience_seconds=0.05) as second:
        assert first and not second
    with alone_in(tmp_path, patience_seconds=0) as again:
        assert again


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with alone_in(tmp_path):
        child = together(lambda: time.sleep(60))
    try:
        with alone_in(tmp_path, patience_seconds=0) as again:
            assert again
    finally:
        os.kill(child[0], signal.SIGKILL)
        os.waitpid(child[0], 0)
    assert dying.run(lambda: None).finished


# Two runs in one folder ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_of_one_that_trains_is_refused(tmp_path: Path, resume: bool) -> None:
    """It would cut the first one's log and go on from its snapshots; killed, the first one no longer stands in the way."""
    pytest.importorskip("fcntl")
    run, model, settings = tmp_path / "run", a_model(), {"max_steps": 3, "save_every": 1, "output_dir": tmp_path / "run", **QUIET}

    def stops_in_its_third_step() -> None:
        def update(run: Run, step: int, *args: Any) -> Any:
            return steps(run, step, *args) if step < 3 else wait_until_there(tmp_path / "never")

        steps = Run.update
        with mock.patch.object(Run, "update", update):
            fit(a_model(), token_rows(8), settings)

    first = together(stops_in_its_third_step)
    wait_until_there(run / snapshots.FOLDER / "step-000002")
    before, weights = files(run), [p.clone() for p in model.parameters()]
    with pytest.raises(LoraLabError, match=rf"another process trains in {run}: wait until it ends"):
        fit(model, token_rows(8), {**settings, "resume": resume})
    assert files(run) == before and all(map(torch.equal, weights, model.parameters()))
    os.kill(first[0], signal.SIGKILL)
    assert codes(first) == [-signal.SIGKILL]
    assert fit(model, token_rows(8), {**settings, "resume": True}).steps == 3
    assert ".in-use" not in names(run)


def a_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return lora_lab.inject(our_llama(), rank=2, init="random")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
