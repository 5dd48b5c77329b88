"""What autograd keeps, predicted and read with saved_tensors_hooks: equal to the byte, for this project's Llama and for transformers'."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import peft
import pytest
import torch
import transformers
from known_versions import equals
from stamps import stamp_bytes

import lora_lab
from lora_lab.models import llama, losses
from memory_math import predict, saved_bytes

SHAPE = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 176, "tie_word_embeddings": True,
}  # fmt: skip
BATCH, LENGTH, RANK = 2, 48, 4


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def stored(model: Any, method: str, precision: str) -> Any:
    """The dtypes a precision stands for, before adapters are put in."""
    return model.bfloat16() if precision == "bf16" or (precision == "bf16-mixed" and method == "lora") else model


def measured(model: Any, precision: str, **extra: Any) -> int:
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    labels = ids.clone()

    def forward() -> Any:
        with autocast(precision):
            return model(input_ids=ids, labels=labels, **extra).loss

    return saved_bytes(forward) - stamp_bytes(forward)


def predicted(config: dict[str, Any], **request: Any) -> Any:
    return predict(config, batch_size=BATCH, sequence_length=LENGTH, rank=RANK, device="cpu", **request)


PLAIN = [(*point, {}) for point in itertools.product(("full", "lora"), ("fp32", "bf16", "bf16-mixed"), (False, True))]
OTHERS: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("full", "fp32", False, {"tie_word_embeddings": False}),
    ("full", "bf16-mixed", False, {"attention_bias": True, "mlp_bias": True}),
    ("full", "bf16", False, {"num_key_value_heads": 4}),
    ("full", "fp32", False, {"head_dim": 24}),
    ("lora", "bf16-mixed", False, {"dropout": 0.1}),
    ("lora", "bf16", True, {"dropout": 0.1}),
    ("lora", "bf16-mixed", False, {"target_modules": "attention"}),
    ("lora", "fp32", False, {"target_modules": ["q_proj", "v_proj"]}),
    ("lora", "bf16", False, {"target_modules": ["down_proj"]}),
    ("lora", "fp32", False, {"attention_bias": True, "num_key_value_heads": 1}),
]


def split(change: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the config, and those of the adapter."""
    adapter = {key: value for key, value in change.items() if key in ("dropout", "target_modules")}
    return {**SHAPE, **{key: value for key, value in change.items() if key not in adapter}}, adapter


@pytest.mark.parametrize(("method", "precision", "checkpointing", "change"), PLAIN + OTHERS)
def test_our_llama_keeps_exactly_what_is_predicted(method: str, precision: str, checkpointing: bool, change: dict[str, Any]) -> None:
    config, adapter = split(change)
    model = stored(llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config)), method, precision)
    if method == "lora":
        lora_lab.inject(model, rank=RANK, **adapter)
    if checkpointing:
        model.gradient_checkpointing_enable()
    asked = {"method": method, "precision": precision, "gradient_checkpointing": checkpointing, "implementation": "lora_lab"}
    footprint = predicted(config, **asked, **adapter)
    assert measured(model.train(), precision) == footprint.saved_bytes


@pytest.mark.parametrize(("method", "precision", "checkpointing", "change"), PLAIN + OTHERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_keeps_what_is_predicted(method: str, precision: str, checkpointing: bool, change: dict[str, Any], attention: str) -> None:
    config, adapter = split(change)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = stored(transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, attn_implementation=attention)), method, precision)
    if method == "lora":
        if checkpointing:
            model.enable_input_require_grads()
        targets = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}.get(
            str(adapter.get("target_modules")), adapter.get("target_modules", "all-linear")
        )
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=targets, lora_dropout=adapter.get("dropout", 0.0)))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    footprint = predicted(config, method=method, precision=precision, gradient_checkpointing=checkpointing, attention=attention, **adapter)
    assert footprint.saved_bytes == equals(measured(model.train(), precision, use_cache=False))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", [{}, {"attention_bias": True}])
def test_our_dora_keeps_exactly_what_is_predicted(checkpointing: bool, precision: str, dropout: float, change: dict[str, Any]) -> None:
    config = {**SHAPE, **change}
    model = stored(llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config)), "lora", precision)
    lora_lab.inject(model, rank=RANK, variant="dora", dropout=dropout)
    if checkpointing:
        model.gradient_checkpointing_enable()
    request = {"method": "dora", "precision": precision, "implementation": "lora_lab", "gradient_checkpointing": checkpointing, "dropout": dropout}
    footprint = predicted(config, **request)
    assert footprint.trained == lora_lab.count_parameters(model).trainable
    assert measured(model.train(), precision) == footprint.saved_bytes


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_quantised_base_keeps_and_weighs_exactly_what_is_predicted(kind: str, checkpointing: bool) -> None:
    model = stored(llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(SHAPE)), "lora", "bf16")
    lora_lab.inject(lora_lab.quantize(model, kind), rank=RANK)
    if checkpointing:
        model.gradient_checkpointing_enable()
    request = {"method": "qlora", "quantization": kind, "precision": "bf16", "implementation": "lora_lab", "gradient_checkpointing": checkpointing}
    footprint = predicted(SHAPE, **request)
    weighed = sum(tensor.nbytes for tensor in model.state_dict().values())
    tied = model.get_output_embeddings().weight.nbytes
    assert footprint.weights == weighed - tied
    kept = measured(model.train(), "bf16")
    assert kept == footprint.saved_bytes


def test_the_loss_chunk_is_the_labs_own() -> None:
    from memory_math.models.causal_lora_lab import CHUNK_BYTES, chunk_rows
    from memory_math.models.layers_lora_lab import ELEMENTS_AT_ONCE

    assert CHUNK_BYTES == losses.CHUNK_BYTES and ELEMENTS_AT_ONCE == lora_lab.delta.ELEMENTS_AT_ONCE
    assert chunk_rows(500, 49152) == [losses._chunk_rows(49152)] * 2 + [500 - 2 * losses._chunk_rows(49152)]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("window", "masked"), [(48, True), (16, True), (49, False)])
def test_a_sliding_window_that_a_row_fills_has_a_mask(method: str, window: int, masked: bool) -> None:
    """transformers writes one of true and false then, and repeats keys and values. A row has 48 tokens."""
    config = {**SHAPE, "model_type": "mistral", "sliding_window": window}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**fields, attn_implementation="sdpa"))
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=0.0))
    footprint = predicted(config, method=method, precision="fp32")
    assert footprint.saved_bytes == equals(measured(model.train(), "fp32", use_cache=False))
    plain = predicted({**config, "sliding_window": None}, method=method, precision="fp32")
    assert (footprint.saved_bytes > 1.05 * plain.saved_bytes) == masked
