"""GPT-2, OPT, GPT-NeoX and Falcon as transformers runs them: what autograd keeps to the byte, and the peak of a step, of small real models."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import peft
import pytest
import torch
import transformers

from memory_math import MemoryMathError, measure, predict, saved_bytes

BATCH, LENGTH, RANK, VIRTUAL = 2, 48, 4, 6
SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
FALCON = {"model_type": "falcon", **SIZES}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 256, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "intermediate_size": 256},
    "falcon-7b": FALCON,
    "falcon-40b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-rw": {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
}
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},  # off where it is on by default, and the other way round
    "opt": {"dropout": 0.0, "attention_dropout": 0.1},
    **{name: {"hidden_dropout": 0.1, "attention_dropout": 0.1} for name in ("gpt_neox", "falcon-7b", "falcon-40b", "falcon-rw")},
}
POINTS: list[tuple[str, str, str, bool]] = [
    *(("full", *point, False) for point in itertools.product(("fp32", "bf16", "bf16-mixed"), ("sdpa", "eager"))),
    ("full", "bf16-mixed", "sdpa", True), ("full", "fp32", "eager", True),
    ("lora", "fp32", "sdpa", False), ("lora", "bf16", "eager", True), ("lora", "bf16-mixed", "sdpa", False), ("lora", "bf16-mixed", "eager", False),
    ("dora", "fp32", "sdpa", False), ("prompt", "bf16", "sdpa", True), ("frozen", "bf16-mixed", "sdpa", False),
]  # fmt: skip
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_inner": 96, "activation_function": "relu"}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
    ("opt", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    ("gpt_neox", {"hidden_act": "gelu_new", "attention_bias": False}),
    ("falcon-40b", {"num_ln_in_parallel_attn": 1, "bias": True}),
    ("falcon-7b", {"multi_query": False}),
]


pytestmark = pytest.mark.usefixtures("aside")


def built(config: dict[str, Any], method: str, precision: str, attention: str, checkpointing: bool) -> Any:
    """The real model, in training mode, with what PEFT adds."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    real = transformers.AutoConfig.for_model(config["model_type"], **fields)
    model = transformers.AutoModelForCausalLM.from_config(real, attn_implementation=attention, dtype=torch.float32)
    if precision == "bf16" or (precision == "bf16-mixed" and method != "full"):
        model = model.bfloat16()
    if method == "frozen" or (method in ("lora", "dora") and checkpointing):
        model.requires_grad_(method != "frozen")
        model.enable_input_require_grads()
    if method in ("lora", "dora"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", use_dora=method == "dora"))
    if method in ("prompt", "prefix"):
        kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
        model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def forward_of(model: Any, method: str, precision: str, batch: int = BATCH) -> Any:
    ids = torch.randint(0, 1000, (batch, LENGTH))
    labels = ids.clone()
    cache = {} if method == "prefix" else {"use_cache": False}

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
            return model(input_ids=ids, labels=labels, **cache).loss

    return forward


def predicted(config: dict[str, Any], batch: int = BATCH, **request: Any) -> Any:
    return predict(config, batch_size=batch, sequence_length=LENGTH, rank=RANK, num_virtual_tokens=VIRTUAL, device="cpu", **request)


def kept(config: dict[str, Any], point: tuple[str, str, str, bool], batch: int = BATCH) -> tuple[int, int]:
    """Bytes that autograd keeps: predicted, measured."""
    method, precision, attention, checkpointing = point
    model = built(config, *point)
    asked = {"method": method, "precision": precision, "attention": attention, "gradient_checkpointing": checkpointing}
    found = predicted(config, batch, **asked)
    assert found.trained == sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    return found.saved_bytes, saved_bytes(forward_of(model, method, precision, batch))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_keeps_exactly_what_is_predicted(name: str, point: tuple[str, str, str, bool]) -> None:
    """torch.autograd.graph.saved_tensors_hooks sees every tensor that a node of the graph saves."""
    found, real = kept(SHAPES[name], point)
    assert found == real


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHAPES)
def test_dropout_and_single_rows_change_what_is_kept(name: str, attention: str) -> None:
    """A mask for each dropout, and on the CPU the scores; the batched products of a single row work on views."""
    point = ("full", "bf16-mixed", attention, False)
    config = {**SHAPES[name], **DROPOUT[name]}
    several, real_several = kept(config, point)
    single, real_single = kept(config, point, batch=1)
    assert (several, single) == (real_several, real_single)
    assert several != kept(SHAPES[name], point)[0]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_a_change_of_the_config_changes_what_is_kept(name: str, change: dict[str, Any]) -> None:
    """Every variant of a block in modeling_{gpt2,opt,gpt_neox,falcon}.py."""
    config, point = {**SHAPES[name], **change}, ("lora", "bf16", "sdpa", False)
    found, real = kept(config, point)
    assert found == real


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_a_prefix_keeps_exactly_what_is_predicted(name: str, attention: str) -> None:
    """PEFT's prefix makes a mask necessary, and keys and values longer than the queries."""
    found, real = kept(SHAPES[name], ("prefix", "bf16-mixed", attention, False))
    assert found == real


@pytest.mark.parametrize("name", SHAPES)
def test_the_wrong_number_of_layers_does_not_match(name: str) -> None:
    """Were the comparison blind to the blocks, a fourth one would go unseen."""
    real = saved_bytes(forward_of(built(SHAPES[name], "full", "fp32", "sdpa", False), "full", "fp32"))
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    assert predicted({**SHAPES[name], layers: 4}).saved_bytes > 1.1 * real > 1.1 * predicted({**SHAPES[name], layers: 2}).saved_bytes


@pytest.mark.parametrize(("method", "precision", "checkpointing"), [("full", "bf16-mixed", False), ("lora", "fp32", True)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_of_a_step_is_within_a_hundredth(name: str, method: str, precision: str, checkpointing: bool) -> None:
    """Every tensor storage followed through forward, backward and AdamW's step; the second step, when the optimizer has its states."""
    model = built(SHAPES[name], method, precision, "sdpa", checkpointing)
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], foreach=False)
    forward = forward_of(model, method, precision)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    real = measure(step).peak_bytes
    assert predicted(SHAPES[name], method=method, precision=precision, gradient_checkpointing=checkpointing).total == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_of_a_prompt_is_within_a_hundredth(name: str, attention: str) -> None:
    """No dropout, a cache of keys and values in tensors of their own, logits of the last position."""
    model = built(SHAPES[name], "inference", "bf16", attention, False).eval()
    ids = torch.randint(0, 1000, (BATCH, LENGTH))

    def step() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    step()
    real = measure(step).peak_bytes
    assert predicted(SHAPES[name], method="inference", precision="bf16", attention=attention).total == pytest.approx(real, rel=0.01)


def test_one_head_of_keys_has_no_fused_kernel_where_flash_attention_is_not_asked_for() -> None:
    """sdp_utils_cpp.h, check_batch_size_and_num_heads_dense: without enable_gqa q, k and v must have as many heads."""
    asked = {"precision": "bf16", "batch_size": 1, "sequence_length": 2048}
    scores = 32 * 71 * 2048**2 * 4  # layers, heads, pairs, float32
    sdpa, flash = predict("falcon-7b", attention="sdpa", **asked), predict("falcon-7b", attention="flash", **asked)
    assert sdpa.saved_bytes - flash.saved_bytes > scores
    grouped = predict("falcon-40b", attention="sdpa", **asked).saved_bytes - predict("falcon-40b", attention="flash", **asked).saved_bytes
    assert grouped < scores / 10


def test_autocast_raises_to_a_power_in_float32_on_cuda_only() -> None:
    """torch/csrc/autocast_mode.h lists pow among CUDA's float32 operators; gelu_new then keeps three tensors of four bytes and one of two."""
    elements = 12 * 256 * 3072
    asked = {"precision": "bf16-mixed", "sequence_length": 256}
    assert predict("gpt2", **asked).saved["activation"] == elements * (4 + 4 + 4 + 2)
    assert predict("gpt2", device="cpu", **asked).saved["activation"] == elements * (2 + 2 + 2 + 2)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"compile": True}, "compile=True is not modelled for falcon-rw-1b"),
        ({"method": "prefix"}, "whose keys PEFT 0.21 cannot prefix"),
        ({"attention": "flash", "precision": "bf16"}, "has no ALiBi there"),
    ],
)
def test_what_is_not_modelled_is_refused(request_: dict[str, Any], text: str) -> None:
    with pytest.raises(MemoryMathError, match=text):
        predict("falcon-rw-1b", **request_)


def test_a_classifier_is_refused() -> None:
    config = {**SHAPES["gpt2"], "architectures": ["GPT2ForSequenceClassification"]}
    with pytest.raises(MemoryMathError, match="only ForCausalLM is"):
        predicted(config)


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "pythia-160m", "falcon-40b", "falcon-rw-1b"])
def test_sharing_and_checkpointing_attention_take_memory_away(name: str) -> None:
    asked = {"method": "lora", "attention": "eager", "sequence_length": 2048 if name != "gpt2" else 1024}
    whole, again, shared = (predict(name, **asked, **more) for more in ({}, {"gradient_checkpointing": "attention"}, {"tensor_parallel": 4}))
    assert again.saved_bytes < 0.7 * whole.saved_bytes
    assert shared.weights < 0.35 * whole.weights and shared.saved_bytes < 0.5 * whole.saved_bytes
