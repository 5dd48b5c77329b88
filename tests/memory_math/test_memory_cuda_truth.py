"""benchmarks/cuda_truth.py, whose figures need a GPU, does its work with tiny shapes on the CPU; its prediction is held there, too."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from memory_math import predict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30


@pytest.fixture(scope="module")
def truth() -> Any:
    sys.path.insert(0, str(BENCHMARKS))  # for its neighbour, interleaved.py
    try:
        spec = importlib.util.spec_from_file_location("cuda_truth", BENCHMARKS / "cuda_truth.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["cuda_truth"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("cuda_truth", None)


@pytest.fixture
def facts() -> dict[str, Any]:
    return {"gpu": "Tesla T4", "driver": "550.54", "total_bytes": 15 * GIB, "used_bytes": 0}


def test_every_configuration_runs_on_the_cpu_and_is_what_is_predicted(
    truth: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_truth.py", "--cpu", "--output", str(tmp_path / "found.json")])
    truth.main()
    lines = capsys.readouterr().out.splitlines()
    found, last = json.loads((tmp_path / "found.json").read_text()), json.loads(lines[-1])
    assert len(lines) == 20 + 3 and len(found["results"]) == 20  # the place, the header, the summary
    assert (last["benchmark"], last["device"], last["failed"], last["torch"]) == ("cuda_truth", "cpu", 0, found["torch"])
    assert last["measured"] + last["skipped"] == 20 and last["measured"] >= 19  # 8-bit AdamW needs bitsandbytes
    for entry in found["results"]:
        if "skipped" not in entry:
            assert abs(entry["error_percent"]) < 2, entry["name"]
            rows = {row["what"]: row for row in entry["rows"]}
            assert {"start", "peak", "forward"} <= set(rows)
            assert entry["method"] == "inference" or rows["saved for backward"]["predicted"] == pytest.approx(entry["measured"]["saved"], rel=0.01)


def test_twenty_different_configurations_can_be_predicted_for_a_gpu(truth: Any) -> None:
    assert len({case.name for case in truth.CASES}) == 20
    for case in truth.CASES:
        footprint = predict(case.config(tiny=False), **case.request(tiny=False))
        assert footprint.reserved is not None and footprint.fits("A100-80GB"), case.name


def test_what_cannot_run_is_skipped_with_the_reason(truth: Any, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = truth.Case("llama-3.2-1b", "full", "fp32", 8, 2048)
    footprint = predict(case.config(False), **case.request(False))
    assert "more than Tesla T4 has" in truth.why_not(case, footprint, facts)
    assert "more than Some GPU has" in truth.why_not(case, footprint, {**facts, "gpu": "Some GPU"})
    assert truth.why_not(case, footprint, {**facts, "gpu": "Some GPU", "total_bytes": 500 * GIB}) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert truth.why_not(case, footprint, facts) == "transformers is not installed"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for nvidia-smi is a shell script")
def test_nvidia_smi_is_asked_for_the_gpu_that_torch_will_take(truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text('#!/bin/sh\n[ "$1" = --id=3 ] && echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert truth.gpu_facts() == {"gpu": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "total_bytes": 81559 * 2**20, "used_bytes": 4 * 2**20}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert truth.gpu_facts() is None


def test_what_others_use_of_the_gpu_is_not_counted(truth: Any) -> None:
    footprint = predict("smollm2-135m", sequence_length=64)
    assert footprint.reserved and footprint.nvidia_smi
    smi = footprint.nvidia_smi.estimate
    real = {"allocated": footprint.total, "reserved": footprint.reserved.low - 1, "nvidia_smi": smi + 7 * GIB, "saved": None}
    entry = truth.finished({"name": "one"}, footprint, {"measured": real}, 7 * GIB)
    assert (entry["error_percent"], entry["reserved_inside"], entry["nvidia_smi_inside"]) == (0, False, True)
    assert truth.line(entry).split()[-3:] == [f"{smi / 2**20:.0f}"] * 2 + ["in"]


def test_a_configuration_that_fails_is_shown_and_counted(truth: Any) -> None:
    entry = truth.finished({"name": "one"}, None, {"error": "OutOfMemoryError: CUDA out of memory"}, 0)
    assert truth.line(entry).endswith("error: OutOfMemoryError: CUDA out of memory")
    assert truth.summary([entry, {"name": "two", "skipped": "no"}]) == {
        "configurations": 2, "measured": 0, "skipped": 1, "failed": 1, "reserved_inside": 0, "nvidia_smi_inside": 0,
    }  # fmt: skip
