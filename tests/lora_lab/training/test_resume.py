"""A run that was stopped and resumed is the run that was not: bit for bit in weights, optimizer and log. tests/faults kills it."""

from __future__ import annotations

import errno
import os
import signal
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_workshop import QUIET, OverFeatures, forgotten, log_of, our_llama, same_bits, token_rows, weights

import lora_lab
import prompt_tuning_lab
from lora_lab import LoraLabError
from lora_lab.streaming import shards
from lora_lab.training import Interrupted, fit, snapshots, state
from lora_lab.training.loop import Run
from lora_lab.training.optimizers import OPTIMIZERS

ROWS, HELD_OUT = token_rows(12), token_rows(3, seed=5)


def adapted() -> Any:
    torch.manual_seed(1)
    return lora_lab.inject(our_llama(), rank=2, dropout=0.1, init="random")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"max_steps": 7, "micro_batch_size": 2, "grad_accum_steps": 2, "learning_rate": 0.01, "save_every": 2, "eval_every": 3,
            "output_dir": folder, **QUIET, **changes}  # fmt: skip


class Stop(Exception):
    pass


def run_until(model: Any, step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Train, and let the power fail in the middle of a step."""
    whole = Run.backward

    def backward(run: Run, *args: Any) -> float:
        if run.result.steps == step:
            raise Stop
        return whole(run, *args)

    monkeypatch.setattr(Run, "backward", backward)
    with pytest.raises(Stop):
        fit(model, ROWS, settings(folder, **changes), eval_data=HELD_OUT)
    monkeypatch.undo()


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {}, "fp16": {"precision": "fp16-mixed"}, "bf16": {"precision": "bf16-mixed"}, "lora+": {"lora_plus_ratio": 4.0},
    "lion": {"optimizer": "lion"}, "adafactor": {"optimizer": "adafactor"}, "momentum": {"optimizer": "momentum"}, "best": {"keep_best": True},
    "checkpointing": {"gradient_checkpointing": True},
    "in backward": {"optimizer_in_backward": True, "max_grad_norm": None, "grad_accum_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_never_stopped(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = VARIANTS[variant]
    whole = adapted()
    expected = fit(whole, ROWS, settings(tmp_path / "whole", **changes), eval_data=HELD_OUT)
    run_until(adapted(), 5, tmp_path / "parts", monkeypatch, **changes)
    resumed = forgotten(adapted())
    result = fit(resumed, ROWS, settings(tmp_path / "parts", resume=True, **changes), eval_data=HELD_OUT)
    assert same_bits(weights(resumed), weights(whole))
    assert (result.losses, result.eval_losses, result.tokens, result.steps) == (expected.losses, expected.eval_losses, expected.tokens, 7)
    assert (result.best_step, result.skipped_steps) == (expected.best_step, expected.skipped_steps)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    ours, theirs = (snapshots.newest(tmp_path / name) for name in ("parts", "whole"))
    assert same_bits(ours.tensors, theirs.tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_fine_tuning_resumes_as_well(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: the rounding by chance goes on with the same random numbers."""
    whole, stopped, resumed = our_llama(), our_llama(), forgotten(our_llama())
    fit(whole, ROWS, settings(tmp_path / "whole", precision=precision), eval_data=HELD_OUT)
    run_until(stopped, 5, tmp_path / "parts", monkeypatch, precision=precision)
    fit(resumed, ROWS, settings(tmp_path / "parts", precision=precision, resume=True), eval_data=HELD_OUT)
    assert same_bits(weights(resumed), weights(whole))


def test_running_statistics_are_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def normed() -> Any:
        model = our_llama()
        model.model.norm = torch.nn.Sequential(model.model.norm, OverFeatures(model.config.hidden_size))
        return model

    torch.manual_seed(0)
    whole, stopped, resumed = normed(), normed(), forgotten(normed())
    fit(whole, ROWS, settings(tmp_path / "whole"), eval_data=HELD_OUT)
    run_until(stopped, 5, tmp_path / "parts", monkeypatch)
    fit(resumed, ROWS, settings(tmp_path / "parts", resume=True), eval_data=HELD_OUT)
    assert same_bits(dict(resumed.named_buffers()), dict(whole.named_buffers())) and [*whole.named_buffers()]


def test_a_finished_run_resumes_to_its_end_at_once(tmp_path: Path) -> None:
    first, again = adapted(), forgotten(adapted())
    expected = fit(first, ROWS, settings(tmp_path), eval_data=HELD_OUT)
    result = fit(again, ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)
    assert same_bits(weights(again), weights(first)) and result.losses == expected.losses
    assert len(log_of(tmp_path)) == 7 + len(result.eval_losses)


def test_only_the_newest_snapshots_stay(tmp_path: Path) -> None:
    fit(adapted(), ROWS, settings(tmp_path, keep_snapshots=2), eval_data=HELD_OUT)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["step-000006", "step-000007"]


class OfItsOwn(torch.optim.Optimizer):
    """Remembers more numbers than the weight has, and nothing under one name, as Shampoo does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mine = self.state[p]
                side = mine.setdefault("products", torch.zeros(max(p.shape), max(p.shape), 2))
                mine.setdefault("mask", None)
                wide = p.grad if p.shape[0] < p.shape[1] else p.grad.T
                side += (wide.T @ wide)[..., None]
                p.sub_(p.grad / (1 + side.diagonal().sum()), alpha=group["lr"])


def test_an_optimizer_of_a_users_own_may_remember_more_than_the_weight_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "own", lambda parameters, learning_rate, weight_decay: OfItsOwn(parameters, {"lr": learning_rate}))
    whole, resumed = adapted(), forgotten(adapted())
    fit(whole, ROWS, settings(tmp_path / "whole", optimizer="own"), eval_data=HELD_OUT)
    with monkeypatch.context() as patch:
        run_until(adapted(), 5, tmp_path / "parts", patch, optimizer="own")
        patch.setitem(OPTIMIZERS, "own", lambda parameters, learning_rate, weight_decay: OfItsOwn(parameters, {"lr": learning_rate}))
        fit(resumed, ROWS, settings(tmp_path / "parts", optimizer="own", resume=True), eval_data=HELD_OUT)
    assert same_bits(weights(resumed), weights(whole)) and not same_bits(weights(whole), weights(adapted()))


# Damage -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state", "empty state", "half written"])
def test_a_damaged_snapshot_is_noticed_and_the_one_before_is_used(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapted()
    fit(whole, ROWS, settings(tmp_path / "whole"), eval_data=HELD_OUT)
    run_until(adapted(), 5, tmp_path / "parts", monkeypatch)
    newest = tmp_path / "parts" / "snapshots" / "step-000004"
    content = (newest / "tensors.safetensors").read_bytes()
    if damage == "truncated":
        (newest / "tensors.safetensors").write_bytes(content[:-100])
    elif damage == "flipped":
        (newest / "tensors.safetensors").write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "missing":
        (newest / "tensors.safetensors").unlink()
    elif damage == "no state":
        (newest / "state.json").unlink()
    elif damage == "empty state":
        (newest / "state.json").write_text("")
    else:
        newest.rename(newest.with_name(".step-000004.x7"))
    resumed = forgotten(adapted())
    config = settings(tmp_path / "parts", resume=True)
    if damage == "half written":
        fit(resumed, ROWS, config, eval_data=HELD_OUT)
    else:
        with pytest.warns(UserWarning, match="step-000004.*going back to the snapshot before"):
            fit(resumed, ROWS, config, eval_data=HELD_OUT)
    assert same_bits(weights(resumed), weights(whole)) and log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_where_all_are_damaged_nothing_is_resumed(tmp_path: Path) -> None:
    fit(adapted(), ROWS, settings(tmp_path), eval_data=HELD_OUT)
    for path in (tmp_path / "snapshots").glob("*/state.json"):
        path.write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(LoraLabError, match="all 2 snapshots .* are damaged"):
        fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)


def test_a_damaged_snapshot_of_a_later_step_is_not_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    """It would count as the newest, and the only good one would go."""
    (tmp_path / "snapshots" / "step-000009").mkdir(parents=True)
    snapshots.write(tmp_path, snapshots.Snapshot({"a": torch.ones(2)}, {"step": 4}), keep=1)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-000004"] and snapshots.newest(tmp_path).step == 4


def two_snapshots(folder: Path) -> Path:
    """The folder of the newer one."""
    for step in (2, 4):
        path = snapshots.write(folder, snapshots.Snapshot({"a": torch.full((2,), step)}, {"step": step, "steps": 9, "finished": True}), keep=2)
    return path


REFUSALS = [OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.EMFILE, os.strerror(errno.EMFILE)), PermissionError("no"), MemoryError()]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
@pytest.mark.parametrize("place", ["sha256", "opened"])
def test_a_snapshot_that_cannot_be_read_at_the_moment_is_not_passed_over(place: str, error: Exception, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    newer = two_snapshots(tmp_path)
    module, name = (snapshots, "sha256") if place == "sha256" else (shards, "_opened_at_once")
    whole = getattr(module, name)

    def refuse(path: Path) -> Any:
        if path.parent == newer:
            raise error
        return whole(path)

    with monkeypatch.context() as patch, pytest.raises(MemoryError if isinstance(error, MemoryError) else LoraLabError):
        patch.setattr(module, name, refuse)
        snapshots.newest(tmp_path)
    assert snapshots.newest(tmp_path).step == 4


def test_a_new_run_does_not_remove_snapshots_that_cannot_be_read_at_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    two_snapshots(tmp_path)
    monkeypatch.setattr(snapshots, "sha256", refuse)
    with pytest.raises(LoraLabError, match=r"step-000004 cannot be read .*Input/output error"):
        state.begin_anew(tmp_path)
    assert len([*(tmp_path / "snapshots").iterdir()]) == 2


@pytest.mark.parametrize("what", ["whole", "unreadable"])
def test_a_snapshot_of_a_later_step_goes_only_where_it_is_damaged(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later, digest = two_snapshots(tmp_path), snapshots.sha256

    def refuse(path: Path) -> str:
        if path.parent == later:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    if what == "unreadable":
        monkeypatch.setattr(snapshots, "sha256", refuse)
    snapshots.write(tmp_path, snapshots.Snapshot({"a": torch.ones(2)}, {"step": 3}), keep=1)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["step-000003", "step-000004"]


def test_a_log_that_was_taken_away_begins_anew_and_holds_no_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 5, tmp_path, monkeypatch)
    (tmp_path / "log.jsonl").unlink()
    fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)
    assert [entry["step"] for entry in log_of(tmp_path)] == [5, 6, 6, 7, 7]


def test_a_full_disk_keeps_the_snapshots_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 3, tmp_path, monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshots, "save_file", full)
    with pytest.raises(LoraLabError, match=r"could not save step 4 .*No space left on device"):
        fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-000002"]
    assert snapshots.newest(tmp_path).step == 2


# Another run ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"learning_rate": 0.02}, "learning_rate=0.02: the run began with 0.01"),
    ({"max_steps": 9}, "max_steps=9: the run began with 7"),
    ({"precision": "bf16-mixed"}, "precision='bf16-mixed': the run began with 'fp32'"),
])  # fmt: skip
def test_other_settings_are_refused_and_nothing_is_touched(changes: dict[str, Any], message: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    run_until(adapted(), 3, tmp_path, monkeypatch)
    model, log = adapted(), (tmp_path / "log.jsonl").read_bytes()
    before = weights(model)
    with pytest.raises(LoraLabError, match=message):
        fit(model, ROWS, settings(tmp_path, resume=True, **changes), eval_data=HELD_OUT)
    assert same_bits(weights(model), before) and (tmp_path / "log.jsonl").read_bytes() == log


def test_other_data_and_another_adapter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 3, tmp_path, monkeypatch)
    with pytest.raises(LoraLabError, match="with other data"):
        fit(adapted(), ROWS[1:], settings(tmp_path, resume=True), eval_data=HELD_OUT)
    with pytest.raises(LoraLabError, match="other adapters than the run began with|another model, or other weights that train"):
        fit(lora_lab.inject(our_llama(), rank=4), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)


def test_other_threads_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 3, tmp_path, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.warns(UserWarning, match=r"began with threads \d+, this is 99: it goes on, but not bit for bit"):
        fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)


def test_a_new_run_does_not_throw_an_unfinished_one_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 3, tmp_path, monkeypatch)
    with pytest.raises(LoraLabError, match="stopped after step 2 of 7: resume=True goes on with it"):
        fit(adapted(), ROWS, settings(tmp_path), eval_data=HELD_OUT)
    fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)
    fit(adapted(), ROWS, settings(tmp_path), eval_data=HELD_OUT)  # the first is finished


def test_where_there_is_nothing_to_resume_the_run_begins_and_says_so(tmp_path: Path) -> None:
    """A launcher gives the same command every time, the first time included."""
    with pytest.warns(UserWarning, match="nothing to resume in .*: this is the first step"):
        result = fit(adapted(), ROWS, settings(tmp_path, resume=True), eval_data=HELD_OUT)
    assert result.steps == 7
    with pytest.raises(LoraLabError, match="resume=True needs an output_dir"):
        fit(adapted(), ROWS, {"resume": True})


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    config = settings(tmp_path, eval_every=1, early_stopping=1, learning_rate=5.0, schedule="constant", max_steps=30)
    first, again = adapted(), forgotten(adapted())
    expected = fit(first, ROWS, config, eval_data=HELD_OUT)
    assert expected.stopped_early and expected.steps < 30
    result = fit(again, ROWS, {**config, "resume": True}, eval_data=HELD_OUT)
    assert result.steps == expected.steps and same_bits(weights(again), weights(first))


@pytest.mark.parametrize("changes, message", [
    ({"held_out": HELD_OUT[1:]}, "resume=True with other eval_data"),
    ({"base": 5}, "resume=True with another base: its frozen weights differ"),
    ({"alpha": 64}, r"resume=True with other adapters .*q_proj' is \['default: 32.0, 0.1, Variant'\], it was \['default: 1.0"),
])  # fmt: skip
def test_another_run_is_not_taken_for_this_one(changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(adapted(), 3, tmp_path, monkeypatch)
    model = our_llama()
    if "base" in changes:
        with torch.no_grad():
            model.model.norm.weight += 0.5
    torch.manual_seed(1)
    lora_lab.inject(model, rank=2, dropout=0.1, init="random", alpha=changes.get("alpha"))
    before = weights(model)
    with pytest.raises(LoraLabError, match=message):
        fit(model, ROWS, settings(tmp_path, resume=True), eval_data=changes.get("held_out", HELD_OUT))
    assert same_bits(weights(model), before)


def test_a_refusal_before_the_first_step_gives_every_bit_back() -> None:
    """bf16 rounds weights of float32 that train; nothing has been learned yet that would be worth it."""
    model = our_llama()
    before = weights(model)
    with pytest.raises(LoraLabError, match="activation_offload"):
        fit(model, ROWS, {"max_steps": 2, "precision": "bf16", "activation_offload": True, **QUIET})
    assert same_bits(weights(model), before)


def test_steps_in_backward_stop_before_the_first_weight_where_the_loss_is_no_number() -> None:
    model = our_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = weights(model)
    with pytest.raises(LoraLabError, match="the loss is nan at step 1"):
        fit(model, ROWS, {"max_steps": 2, "optimizer_in_backward": True, "max_grad_norm": None, **QUIET})
    now = weights(model)
    assert all(torch.equal(now[name].nan_to_num(7.0), tensor.nan_to_num(7.0)) for name, tensor in before.items())


# Signals --------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_step_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapted()
    fit(whole, ROWS, settings(tmp_path / "whole"), eval_data=HELD_OUT)
    backward = Run.backward

    def pressed(run: Run, *args: Any) -> float:
        if run.result.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return backward(run, *args)

    monkeypatch.setattr(Run, "backward", pressed)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="interrupted after step 3 of 7; resume=True"):
        fit(adapted(), ROWS, settings(tmp_path / "parts", grad_accum_steps=1), eval_data=HELD_OUT)
    assert signal.getsignal(signal.SIGINT) is before and snapshots.newest(tmp_path / "parts").step == 3


def test_without_a_folder_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "backward", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(adapted(), ROWS, {"max_steps": 2, **QUIET})
    assert not isinstance(caught.value, Interrupted)


def test_the_fingerprint_of_the_data_sees_every_token() -> None:
    other = [dict(row) for row in ROWS]
    other[-1] = {**other[-1], "labels": [*other[-1]["labels"][:-1], 1 + other[-1]["labels"][-1]]}
    assert state.fingerprint(ROWS) != state.fingerprint(other)


# Early stopping and the best weights ------------------------------------------------------------------------------------------------


def test_early_stopping_ends_the_run_and_keep_best_the_weights_of_the_best_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0])
    kept: dict[int, Any] = {}
    model = adapted()

    def evaluated(*_: Any) -> float:
        kept[len(kept)] = weights(model)
        return next(losses)

    monkeypatch.setattr("lora_lab.training.loop.mean_loss", evaluated)
    config = {**settings(tmp_path), "eval_every": 1, "early_stopping": 3, "keep_best": True}
    result = fit(model, ROWS, config, eval_data=HELD_OUT)
    assert result.stopped_early and result.steps == 4 and result.best_step == 1 and result.eval_losses == [3.0, 2.0, 2.5, 2.4, 2.3]
    assert same_bits(weights(model), kept[1]) and not same_bits(weights(model), kept[4])


@pytest.mark.parametrize("name, value", [("early_stopping", 2), ("keep_best", True), ("eval_every", 2)])
def test_what_needs_held_out_data_is_refused_without(name: str, value: Any) -> None:
    with pytest.raises(LoraLabError, match=f"{name}={value} needs eval_data"):
        fit(adapted(), ROWS, {name: value, **QUIET})


# What was drawn at random and does not train -------------------------------------------------------------------------------------------


def with_frozen_A(seed: int) -> Any:
    torch.manual_seed(seed)
    return lora_lab.inject(our_llama(), rank=2, freeze_A=True)


def with_prompt(seed: int) -> Any:
    torch.manual_seed(seed)
    return prompt_tuning_lab.inject(our_llama(), 3)


@pytest.mark.parametrize("make", [with_frozen_A, with_prompt])
def test_what_stays_as_it_was_drawn_is_part_of_the_run(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA-FA's A, and what a prompt began as: drawn anew for the model that goes on, and put back."""
    whole = make(1)
    fit(whole, ROWS, settings(tmp_path / "whole"), eval_data=HELD_OUT)
    run_until(make(1), 5, tmp_path / "parts", monkeypatch)
    resumed = make(2)
    assert not same_bits(state.beginnings(resumed), state.beginnings(whole)) and state.beginnings(whole)
    fit(resumed, ROWS, settings(tmp_path / "parts", resume=True), eval_data=HELD_OUT)
    assert same_bits(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    assert same_bits(dict(resumed.named_buffers()), dict(whole.named_buffers()))


def test_another_adapter_is_no_part_of_the_run() -> None:
    model = with_frozen_A(1)
    lora_lab.inject(model, rank=2, adapter="second")
    assert state.beginnings(model) == {}


def test_names_may_have_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes them; a snapshot's own names are divided by slashes."""

    def slashed() -> Any:
        torch.manual_seed(1)
        model = our_llama()
        model.model.norm = torch.nn.Sequential(OrderedDict({"a/b": model.model.norm}))
        return model

    whole, stopped, resumed = slashed(), slashed(), forgotten(slashed())
    fit(whole, ROWS, settings(tmp_path / "whole"), eval_data=HELD_OUT)
    run_until(stopped, 5, tmp_path / "parts", monkeypatch)
    fit(resumed, ROWS, settings(tmp_path / "parts", resume=True), eval_data=HELD_OUT)
    assert same_bits(weights(resumed), weights(whole)) and "model.norm.a/b.weight" in weights(whole)
