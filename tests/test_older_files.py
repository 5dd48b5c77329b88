"""What an earlier version wrote is read by this one, and gives the numbers that it gave: one folder per version, written by fixtures/write.py."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_workshop import forgotten
from torch.testing import assert_close

import lora_lab
import prompt_tuning_lab as ptl
from lora_lab import models, training

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))


def writer() -> Any:
    spec = importlib.util.spec_from_file_location("write_fixtures", FIXTURES / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = writer()
EXPECTED = {version: json.loads((FIXTURES / version / "expected.json").read_text(encoding="utf-8")) for version in VERSIONS}
CASES = [(version, name) for version in VERSIONS for name in EXPECTED[version] if "/" in name]


def test_this_version_has_its_files() -> None:
    assert lora_lab.__version__ in VERSIONS, "python tests/fixtures/write.py writes those of a new version"
    names = {name for version, name in CASES if version == lora_lab.__version__}
    assert {f"lora/{name}" for name in WRITER.ADAPTERS} | {f"prompts/{name}" for name in WRITER.PROMPTS} == names


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_folder_gives_its_numbers(version: str) -> None:
    assert_close(WRITER.numbers(WRITER.base(FIXTURES / version)), EXPECTED[version]["base"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"{version} {name}" for version, name in CASES])
def test_an_adapter_or_a_prompt_gives_its_numbers(version: str, name: str) -> None:
    """And others than the base's own, or reading nothing would do."""
    folder = FIXTURES / version
    model = WRITER.base(folder, name.partition("/")[2])
    load = lora_lab.load if name.startswith("lora/") else ptl.load
    found = WRITER.numbers(load(model, folder / name).eval())
    assert_close(found, EXPECTED[version][name], rtol=1e-4, atol=1e-4)
    assert max(abs(one - other) for one, other in zip(found, EXPECTED[version]["base"], strict=True)) > 0.01


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stopped_run_goes_on_to_the_same_end(version: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / version / "run", tmp_path / "run")
    model = forgotten(WRITER.trained(FIXTURES / version))
    with warnings.catch_warnings():  # another PyTorch, other threads: it goes on, but not bit for bit
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "nothing to resume")
        result = training.fit(model, WRITER.ROWS, {**WRITER.RUN, "output_dir": tmp_path / "run", "resume": True})
    assert_close(result.losses, EXPECTED[version]["run"]["losses"], rtol=1e-4, atol=1e-4)
    assert_close(WRITER.numbers(model.eval()), EXPECTED[version]["run"]["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_stay_small_and_hold_no_pickle(version: str) -> None:
    files = [path for path in (FIXTURES / version).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 120_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl"}


def test_a_prompt_with_a_network_goes_on_learning(tmp_path: Path) -> None:
    """The network is in a file of its own."""
    version = VERSIONS[-1]
    prompted = ptl.load(models.load(FIXTURES / version / "base", dtype=torch.float32)[0], FIXTURES / version / "prompts" / "p-tuning", trainable=True)
    before = WRITER.numbers(prompted)
    training.fit(prompted, WRITER.ROWS, {"max_steps": 2, "learning_rate": 0.01, "progress": False})
    assert WRITER.numbers(prompted.eval()) != before
