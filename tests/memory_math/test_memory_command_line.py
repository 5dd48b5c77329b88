"""python -m memory_math."""

from __future__ import annotations

import json

import pytest

from memory_math import predict
from memory_math.__main__ import main


def test_predict_prints_the_table(capsys) -> None:
    arguments = "predict smollm2-135m --method lora --precision bf16-mixed --batch-size 4 --sequence-length 256"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == predict("smollm2-135m", method="lora", precision="bf16-mixed", batch_size=4, sequence_length=256).table()


def test_json_has_every_number(capsys) -> None:
    assert main(["predict", "smollm2-135m", "--method", "lora", "--target-modules", "q_proj", "v_proj", "--gpu", "T4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    footprint = predict("smollm2-135m", method="lora", target_modules=["q_proj", "v_proj"])
    assert printed["total"] == footprint.total and printed["weights"] == footprint.weights and printed["phases"] == footprint.phases
    assert printed["reserved"]["estimate"] == footprint.reserved.estimate
    assert printed["fits"] is footprint.fits("T4")


def test_params_prints_the_exact_total(capsys) -> None:
    assert main(["params", "llama-3-8b"]) == 0
    assert "8,030,261,248" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ["predict", "lama-3-8b"], ["predict", "smollm2-135m", "--batch-size", "0"], ["predict", "smollm2-135m", "--gpu", "H2000"],
    ["predict", "smollm2-135m", "--method", "lora", "--target-modules", "gate_porj"],
])  # fmt: skip
def test_a_refused_request_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("memory_math: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "smollm2-135m", "--batch-size", "four"], ["cook"], []])
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_code_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
