"""Much of everything: a thousand adapters, thousands of steps, very many rows, a model of 70 billion weights. What grows grows in proportion.

Here with numbers that fit into a test run; `make load` has 10,000 steps and a million rows, and prints what it found. No time is asserted: what
switching costs is counted in calls of Python's functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_workshop import QUIET, our_llama, token_rows
from torch import nn

import lora_lab
import memory_math
from lora_lab.models.llama import LlamaConfig, LlamaForCausalLM
from lora_lab.training import fit

STEPS, ROWS = int(os.environ.get("LORA_LAB_LOAD_STEPS", 600)), int(os.environ.get("LORA_LAB_LOAD_ROWS", 20_000))
LLAMA_2_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
               "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096}  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import pytest

        pytest.skip("resident memory is read from /proc, which this system does not have")


def calls(run: Callable[[], Any]) -> int:
    """Of Python's functions."""
    seen = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        seen[0] += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen[0]


# A thousand adapters --------------------------------------------------------------------------------------------------------


def test_a_thousand_adapters_weigh_a_thousand_times_one_and_are_switched_as_fast(tmp_path, capsys):
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    lora_lab.save(lora_lab.inject(base, 2, init="random"), tmp_path)
    model, sizes, costs = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), {}, {}
    for number in range(1000):
        lora_lab.load(model, tmp_path, adapter=f"customer-{number}")
        if number + 1 in (10, 100, 1000):
            sizes[number + 1] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
            costs[number + 1] = calls(lambda: lora_lab.use(model, "customer-7"))
    assert sizes == {many: many * 2 * (16 + 24 + 24 + 8) for many in (10, 100, 1000)}
    assert costs[1000] - costs[100] <= 10 * (costs[100] - costs[10]) + 100  # in proportion at most
    rows = [f"customer-{number}" for number in range(0, 1000, 10)]
    with lora_lab.per_sample(model, rows):
        assert model(torch.randn(100, 16)).shape == (100, 8)
    lora_lab.eject(model)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    with capsys.disabled():
        print(f"\nload: use() among 10, 100, 1000 adapters: {[*costs.values()]} calls of functions")


# Thousands of steps ---------------------------------------------------------------------------------------------------------


def test_resident_memory_does_not_grow_with_the_steps(tmp_path, capsys):
    """From the first third to the end; the losses that `fit` keeps, and lists, are some dozen bytes a step."""
    seen: list[int] = []
    model = lora_lab.inject(our_llama(), 2)
    handle = model.register_forward_pre_hook(lambda *_: seen.append(resident()))
    fit(model, token_rows(), {"max_steps": STEPS, "micro_batch_size": 2, "output_dir": tmp_path, "save_every": max(1, STEPS // 5), **QUIET})
    handle.remove()
    growth = max(seen) - max(seen[: len(seen) // 3])
    assert growth < 4 * 2**20 + 200 * STEPS
    with capsys.disabled():
        print(f"\nload: {STEPS:,} steps, resident memory grew by {growth / 2**20:.1f} MiB after the first third")


# Very many rows -------------------------------------------------------------------------------------------------------------

TRAIN = """
import resource, sys
import torch
import tiny_workshop
import lora_lab
from lora_lab import data, training
torch.set_num_threads(1)
model = lora_lab.inject(tiny_workshop.our_llama(max_position_embeddings=600), 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = data.open_rows(sys.argv[1])
training.fit(model, rows, {"max_steps": 2, "micro_batch_size": 2, "progress": False}, tokenizer=tiny_workshop.plain_tokenizer())
print(len(rows), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def grown(path: Path) -> int:
    """Bytes by which the largest resident set of a process grows that trains on the file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", TRAIN, str(path)], capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout.split()[1])


def test_very_many_rows_are_trained_on_from_disk(tmp_path, capsys):
    """A row is 430 bytes of text and 4 kB encoded; memory holds 120 bytes of it: its place, its length and its batch."""
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    for path, count in ((few, 100), (many, ROWS)):
        with path.open("w") as file:
            file.writelines(json.dumps({"instruction": "x" * 380, "output": str(i)}) + "\n" for i in range(count))
    bytes_a_row = (grown(many) - grown(few)) / ROWS
    assert bytes_a_row < 120 + 8 * 2**20 / ROWS
    with capsys.disabled():
        print(f"\nload: {ROWS:,} rows of 430 bytes from disk, {bytes_a_row:.0f} bytes of memory each")


# Seventy billion weights ----------------------------------------------------------------------------------------------------


def test_a_model_of_70_billion_weights_is_planned_injected_and_predicted_without_its_memory():
    """On the meta device. 68,976,648,192 weights: Touvron et al. 2023 (arXiv:2307.09288), as the published checkpoint has them."""
    before = resident()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA_2_70B))
    plan = lora_lab.plan(model, rank=16)
    lora_lab.inject(model, rank=16)
    footprint = memory_math.predict(LLAMA_2_70B, method="lora", rank=16, precision="bf16-mixed", sequence_length=4096, implementation="lora_lab")
    counts = lora_lab.count_parameters(model)
    assert counts.total - counts.trainable == memory_math.count_parameters("llama-2-70b").total == 68_976_648_192
    assert counts.trainable == plan.parameters == footprint.trained
    assert footprint.weights == 2 * 68_976_648_192 + 4 * counts.trainable
    assert resident() - before < 300 * 2**20
