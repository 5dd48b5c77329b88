"""python -m memory_math."""

from __future__ import annotations

import json

import pytest

from memory_math import predict, training_flops
from memory_math.__main__ import main
from memory_math.hardware import gpu_of


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


def test_a_gpu_without_bf16_is_said_to_be_one(capsys) -> None:
    for command in ("predict", "fit"):
        assert main([command, "smollm2-135m", "--precision", "bf16-mixed", "--sequence-length", "64", "--gpu", "T4"]) == 0
        assert "T4 is fast in fp16 and has no bf16: use fp16-mixed" in capsys.readouterr().out
    assert main(["predict", "smollm2-135m", "--precision", "bf16-mixed", "--sequence-length", "64", "--gpu", "L4"]) == 0
    assert "no bf16" not in capsys.readouterr().out


def test_tight_is_neither_yes_nor_no(capsys) -> None:
    footprint = predict("llama-3-8b", method="lora", precision="bf16-mixed", sequence_length=1024)
    assert footprint.fits("RTX-4090") and footprint.reserved.estimate > gpu_of("RTX-4090").usable_bytes
    request = ["--precision", "bf16-mixed", "--sequence-length", "1024", "--gpu", "RTX-4090"]
    assert main(["predict", "llama-3-8b", "--method", "lora", *request]) == 0
    assert "tight: what is allocated fits" in capsys.readouterr().out
    assert main(["compare", "llama-3-8b", "--methods", "lora", *request]) == 0
    assert capsys.readouterr().out.rstrip().endswith("tight")


def test_time_tells_operations_of_the_model_and_executed_ones(capsys) -> None:
    arguments = "time llama-2-7b --tokens 1e9 --gpus 8 --gpu A100-80GB --mfu 0.4 --price 2 --gradient-checkpointing"
    assert main(arguments.split()) == 0
    flops = training_flops("llama-2-7b", 1e9, gradient_checkpointing=True)
    assert f"{flops.model:.4g} of the model, {flops.hardware:.4g} executed" in capsys.readouterr().out
    assert flops.hardware / flops.model == pytest.approx(8 / 6)


@pytest.mark.parametrize("arguments", [
    ["predict", "--gradient-checkpointing", "llama-3-8b"], ["compare", "llama-3-8b", "--methods", "full", "bogus"],
])  # fmt: skip
def test_what_is_in_the_wrong_place_or_unknown_is_said(arguments: list[str], capsys) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and ("the model's name goes before the options" in said or "--methods='bogus'" in said)


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "smollm2-135m", "--batch-size", "four"], ["cook"], []])
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_code_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
