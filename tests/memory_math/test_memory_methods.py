"""Every way to train, on transformers' Llama and its relatives: what autograd keeps, to the byte, and the peak of a step."""

from __future__ import annotations

import contextlib
from typing import Any

import peft
import pytest
import torch
import transformers
from known_versions import equals

from memory_math import measure, predict, saved_bytes

BATCH, LENGTH, RANK, VIRTUAL = 2, 48, 4, 6
SHAPE = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176,
}  # fmt: skip
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}), "mistral": ("Mistral", {}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 24}),
    "gemma": ("Gemma", {"head_dim": 24}),
}  # fmt: skip
PRECISIONS = ("fp32", "bf16", "bf16-mixed")


def build(kind: str, method: str, precision: str, attention: str, checkpointing: Any, dropout: float) -> tuple[Any, dict[str, Any]]:
    """The model as a user would set it up, and its config."""
    name, changes = RELATIVES[kind]
    shape = {**SHAPE, **changes}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape, attn_implementation=attention))
    if precision == "bf16" or (precision == "bf16-mixed" and method != "full"):
        model = model.bfloat16()
    if method == "frozen" or (method in ("lora", "dora") and checkpointing):
        model.enable_input_require_grads()
    model = model.requires_grad_(method != "frozen")
    if method in ("lora", "dora"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=dropout, use_dora=method == "dora"))
    if method in ("prompt", "prefix"):
        config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
        model = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), {"model_type": kind, **shape}


def forward_of(model: Any, method: str, precision: str) -> Any:
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    labels, cache = ids.clone(), {} if method == "prefix" else {"use_cache": False}

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
            return model(input_ids=ids, labels=labels, **cache).loss

    return forward


def predicted(config: dict[str, Any], **request: Any) -> Any:
    return predict(config, batch_size=BATCH, sequence_length=LENGTH, rank=RANK, num_virtual_tokens=VIRTUAL, device="cpu", **request)


CASES = [  # kind, method, precision, attention, checkpointing, dropout
    *((kind, method, precision, attention, False, 0.0)
      for kind in ("mistral", "qwen2", "qwen3", "gemma")
      for method, precision, attention in (("full", "fp32", "sdpa"), ("full", "bf16-mixed", "eager"), ("lora", "bf16", "sdpa"))),
    *(("llama", method, precision, attention, checkpointing, 0.0)
      for method in ("frozen", "dora", "prompt")
      for precision in PRECISIONS
      for attention, checkpointing in (("sdpa", False), ("sdpa", True), ("eager", False))),
    *(("llama", "prefix", precision, attention, False, 0.0) for precision in PRECISIONS for attention in ("sdpa", "eager")),
    ("llama", "dora", "fp32", "sdpa", False, 0.1), ("llama", "dora", "bf16", "sdpa", False, 0.1), ("gemma", "dora", "bf16", "sdpa", True, 0.0),
    ("qwen2", "dora", "fp32", "sdpa", False, 0.0), ("qwen3", "prefix", "bf16", "sdpa", False, 0.0), ("gemma", "prompt", "fp32", "sdpa", False, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "method", "precision", "attention", "checkpointing", "dropout"), CASES)
def test_autograd_keeps_exactly_what_is_predicted(
    kind: str, method: str, precision: str, attention: str, checkpointing: bool, dropout: float
) -> None:
    model, config = build(kind, method, precision, attention, checkpointing, dropout)
    request = {"method": method, "precision": precision, "attention": attention, "gradient_checkpointing": checkpointing, "dropout": dropout}
    footprint = predicted(config, **request)
    assert footprint.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert footprint.saved_bytes == equals(saved_bytes(forward_of(model, method, precision)))


@pytest.mark.parametrize(("method", "precision", "attention", "checkpointing"), [
    ("dora", "bf16", "sdpa", False), ("dora", "fp32", "sdpa", True), ("prompt", "bf16", "sdpa", False), ("prompt", "bf16-mixed", "sdpa", True),
    ("prefix", "bf16", "sdpa", False), ("prefix", "fp32", "eager", False), ("lora", "bf16", "sdpa", True),
])  # fmt: skip
def test_the_peak_of_a_step_is_predicted(method: str, precision: str, attention: str, checkpointing: bool) -> None:
    model, config = build("llama", method, precision, attention, checkpointing, 0.0)
    forward = forward_of(model, method, precision)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, foreach=False)

    def step() -> None:
        loss = forward()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    elsewhere = measure(lambda: None).start_bytes - owned(model) - owned(optimizer)
    footprint = predicted(config, method=method, precision=precision, attention=attention, gradient_checkpointing=checkpointing)
    assert footprint.total == pytest.approx(measure(step).peak_bytes - elsewhere, rel=0.015)


def owned(thing: Any) -> int:
    """Bytes of a model's parameters and buffers, each once, or of an optimizer's states."""
    if isinstance(thing, torch.optim.Optimizer):
        tensors = [value for state in thing.state.values() for value in state.values()]
    else:
        tensors = list({id(tensor): tensor for tensor in (*thing.parameters(), *thing.buffers())}.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_prefix_tuning_with_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpointing turns off"):
        predicted({"model_type": "llama", **SHAPE}, method="prefix", gradient_checkpointing=True)
