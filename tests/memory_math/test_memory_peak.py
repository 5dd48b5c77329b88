"""The peak of a whole training step, forward, backward and optimizer, predicted and measured on real small models."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import peft
import pytest
import torch
import transformers

import lora_lab
from lora_lab.models import llama
from memory_math import compare, measure, predict

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 688, "tie_word_embeddings": True,
}  # fmt: skip
BATCH, LENGTH, RANK = 4, 128, 8
GRID = list(itertools.product(("full", "lora"), ("fp32", "bf16-mixed"), (False, True)))  # method, precision, checkpointing


@pytest.fixture
def measured() -> Any:
    """`measure`, less the tensors that other tests have left behind."""
    elsewhere = measure(lambda: None).start_bytes

    def run(step: Any) -> Any:
        real = measure(step)
        real.start_bytes, real.peak_bytes = real.start_bytes - elsewhere, real.peak_bytes - elsewhere
        real.by_phase = {phase: nbytes - elsewhere for phase, nbytes in real.by_phase.items()}
        return real

    return run


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def training_step(model: Any, optimizer: Any, precision: str, micro_batches: int = 1) -> Any:
    """One step, as a loop that keeps no name longer than it needs it."""

    def step() -> None:
        for _ in range(micro_batches):
            ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
            labels = ids.clone()
            with autocast(precision):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            del loss, ids, labels
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_llama(method: str, precision: str, checkpointing: bool) -> Any:
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(SHAPE))
    if method == "lora":
        lora_lab.inject(model.bfloat16() if precision == "bf16-mixed" else model, rank=RANK)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def adamw(model: Any, **kind: Any) -> Any:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, **kind)


def predicted(method: str, precision: str, checkpointing: bool, **more: Any) -> Any:
    shape = {"batch_size": BATCH, "sequence_length": LENGTH, "rank": RANK, "device": "cpu"}
    return predict(SHAPE, method=method, precision=precision, gradient_checkpointing=checkpointing, **shape, **more)


@pytest.mark.parametrize(("method", "precision", "checkpointing"), GRID)
def test_peak_of_this_projects_training_step(measured: Any, method: str, precision: str, checkpointing: bool) -> None:
    model = our_llama(method, precision, checkpointing)
    step = training_step(model, adamw(model, fused=True), precision)
    step()  # makes the optimizer's states
    real, footprint = measured(step), predicted(method, precision, checkpointing, implementation="lora_lab")
    assert footprint.total == pytest.approx(real.peak_bytes, rel=0.01), compare(footprint, real)
    assert footprint.phases["load"] == pytest.approx(real.start_bytes, rel=0.01)
    assert footprint.phases["optimizer step"] == pytest.approx(real.by_phase["optimizer step"], rel=0.01)


@pytest.mark.parametrize(("kind", "micro_batches"), [("foreach", 1), ("for-loop", 1), ("fused", 3)])
def test_peak_with_other_optimizer_steps_and_with_accumulation(measured: Any, kind: str, micro_batches: int) -> None:
    model = our_llama("full", "fp32", checkpointing=True)
    step = training_step(model, adamw(model, fused=kind == "fused", foreach=kind == "foreach"), "fp32", micro_batches)
    step()
    footprint = predicted("full", "fp32", True, implementation="lora_lab", optimizer_implementation=kind, grad_accum_steps=micro_batches)
    assert footprint.total == pytest.approx(measured(step).peak_bytes, rel=0.01)


@pytest.mark.parametrize(("method", "precision", "checkpointing"), GRID)
def test_peak_of_a_transformers_training_step(measured: Any, method: str, precision: str, checkpointing: bool) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"}, use_cache=False)
    )
    if method == "lora":
        model = model.bfloat16() if precision == "bf16-mixed" else model
        if checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = training_step(model.train(), adamw(model), precision)
    step()
    real, footprint = measured(step), predicted(method, precision, checkpointing)
    assert footprint.total == pytest.approx(real.peak_bytes, rel=0.01), compare(footprint, real)


@pytest.mark.parametrize("implementation", ["lora_lab", "transformers"])
def test_peak_of_a_prompt(measured: Any, implementation: str) -> None:
    if implementation == "lora_lab":
        model = our_llama("full", "fp32", checkpointing=False)
    else:
        fields = {key: value for key, value in SHAPE.items() if key != "model_type"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.eval()

    def prompt() -> None:
        ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    prompt()
    footprint = predict(SHAPE, method="inference", implementation=implementation, batch_size=BATCH, sequence_length=LENGTH, device="cpu")
    assert footprint.total == pytest.approx(measured(prompt).peak_bytes, rel=0.01)


def test_keys_and_values_are_the_activations_of_a_prompt() -> None:
    """2 tensors * blocks * tokens * key/value heads * head size * bytes: Llama-3-8B keeps 131,072 bytes a token in 16 bit."""
    one, two = (predict("llama-3-8b", method="inference", precision="bf16", batch_size=b, sequence_length=1024) for b in (1, 2))
    block = 131_072 // 32
    assert one.activations in {1024 * block * 31, 1024 * block * 32}  # the peak may lie in the last block, before it has added its own
    assert two.activations == 2 * one.activations
