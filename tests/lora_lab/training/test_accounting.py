"""The log, the saved steps and the peak: numbers on disk are the numbers of the result."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from tiny_workshop import QUIET, our_llama, token_rows

import lora_lab
from lora_lab import LoraLabError
from lora_lab.training import accounting, fit
from lora_lab.training.accounting import Log

ROWS = token_rows(8)


def run(tmp_path, **changes):
    model = lora_lab.inject(our_llama(), rank=2)
    config = {"max_steps": 4, "micro_batch_size": 4, "output_dir": tmp_path / "out", **QUIET, **changes}
    return model, fit(model, ROWS, config, eval_data=token_rows(3, seed=5))


def entries(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]


def test_the_log_is_the_result_line_by_line(tmp_path):
    _, result = run(tmp_path, eval_every=2, learning_rate=0.01, schedule="linear")
    steps = [entry for entry in entries(tmp_path) if "loss" in entry]
    assert [entry["loss"] for entry in steps] == result.losses
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert steps[-1]["tokens"] == result.tokens and not any(entry["skipped"] for entry in steps)
    assert all(entry["grad_norm"] > 0 for entry in steps)
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in entries(tmp_path) if "eval_loss" in entry]
    assert evaluations == list(zip([0, 2, 4], result.eval_losses, strict=True))


def test_a_second_run_starts_a_new_log(tmp_path):
    run(tmp_path)
    run(tmp_path, max_steps=1)
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 1, 1]
    assert len((tmp_path / "out" / "log.previous.jsonl").read_text().splitlines()) == 6


def test_every_line_is_json_whatever_the_numbers(tmp_path):
    """json.dumps writes NaN, which is no JSON and which other readers refuse."""
    Log(tmp_path).write(step=1, loss=float("nan"), grad_norm=float("inf"), skipped=True)
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "skipped": True}


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path):
    model, seen = lora_lab.inject(our_llama(), rank=2), []
    model.register_forward_pre_hook(lambda *_: seen.append(len((tmp_path / "log.jsonl").read_text().splitlines())))
    fit(model, ROWS, {"max_steps": 3, "output_dir": tmp_path, **QUIET})
    assert seen == [0, 1, 2]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, output_dir=None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(accounting, "open", full, raising=False)
    with pytest.raises(LoraLabError, match=r"could not save log.*No space left on device"):
        run(tmp_path)


def test_a_file_where_the_folder_should_be_is_refused_before_training(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LoraLabError, match="could not save anything to .*out: Not a directory"):
        run(tmp_path)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not reset a process's peak")
def test_the_peak_covers_what_was_allocated_and_starts_anew():
    """On a CPU it is the process's largest resident set; in a fresh process, where no freed memory is waiting to be used again."""
    code = """
import torch
from lora_lab.training.accounting import peak_bytes, reset_peak
device = torch.device("cpu")
reset_peak(device)
start = peak_bytes(device)
torch.ones(256 * 2**20, dtype=torch.uint8)
print(peak_bytes(device) - start)
reset_peak(device)
print(peak_bytes(device) - start)
"""
    allocated, anew = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert 0.9 * 256 * 2**20 < allocated < 1.2 * 256 * 2**20
    assert anew <= allocated


def test_the_result_has_time_and_memory(tmp_path):
    _, result = run(tmp_path)
    assert result.seconds > 0 and result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_bytes > 2**20


def test_progress_goes_to_stderr_and_can_be_switched_off(tmp_path, capsys):
    run(tmp_path)
    assert capsys.readouterr() == ("", "")
    run(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "train" in err and "tokens/s" in err
