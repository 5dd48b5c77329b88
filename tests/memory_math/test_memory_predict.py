"""The arithmetic of predict: bytes per parameter, sums, what changes when a knob is turned, and what is refused."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import numpy
import pytest

from memory_math import MemoryMathError, count_parameters, hardware, predict
from memory_math.architectures import architecture_of
from memory_math.request import check
from memory_math.simulate import simulate
from memory_math.tape import PUBLIC_PARTS, Ledger

PARAMETERS = 134_515_008
SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 688, "tie_word_embeddings": True,
}  # fmt: skip


def small(**request: Any):
    return predict(SMALL, **{"batch_size": 4, "sequence_length": 128, "device": "cpu", **request})


@pytest.mark.parametrize(("precision", "weight", "states"), [("fp32", 4, 8), ("bf16", 2, 4), ("bf16-mixed", 4, 8), ("fp16-mixed", 4, 8)])
def test_full_training_stores_so_many_bytes_per_parameter(precision: str, weight: int, states: int) -> None:
    """fp32 and mixed 4 + 8 and pure bf16 2 + 4 (torch.optim keeps states in the parameter's dtype)."""
    footprint = predict("smollm2-135m", precision=precision, optimizer="adamw", sequence_length=128)
    tensors = 1 + 30 * 9 + 1
    assert footprint.weights == weight * PARAMETERS
    assert footprint.optimizer_states == states * PARAMETERS + 4 * tensors  # and a step count per tensor


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2)])
def test_optimizer_states_are_whole_copies_of_what_trains(optimizer: str, copies: int) -> None:
    states = small(optimizer=optimizer).optimizer_states
    assert states // (4 * count_parameters(SMALL).total) == copies


@pytest.mark.parametrize(("model", "rank", "targets", "adapters"), [
    ("llama-3-8b", 16, ["q_proj", "v_proj"], 6_815_744),
    ("llama-2-7b", 8, ["q_proj", "v_proj"], 4_194_304),
    ("smollm2-135m", 8, "all-linear", 30 * 8 * (576 * 3 + 576 + 192 * 2 + 576 * 2 + (576 + 1536) * 3)),
])  # fmt: skip
def test_lora_parameters_are_rank_times_in_plus_out_and_stay_32_bit(model: str, rank: int, targets: Any, adapters: int) -> None:
    for precision in ("bf16", "bf16-mixed", "fp16-mixed"):
        footprint = predict(model, method="lora", precision=precision, rank=rank, target_modules=targets, sequence_length=64)
        assert footprint.trained == adapters
        assert footprint.weights == 2 * footprint.parameters + 4 * adapters
        assert footprint.optimizer_states - 8 * adapters == 4 * 2 * footprint.adapted_layers


@pytest.mark.parametrize("method", ["full", "lora", "inference"])
@pytest.mark.parametrize("implementation", ["transformers", "lora_lab"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_are_whole_bytes_and_sum_to_the_highest_phase(method: str, implementation: str, device: str) -> None:
    footprint = small(method=method, implementation=implementation, device=device, precision="bf16-mixed")
    parts = [getattr(footprint, part) for part in PUBLIC_PARTS]
    assert all(isinstance(part, int) and part >= 0 for part in parts)
    assert sum(parts) == footprint.total == footprint.allocated == max(footprint.phases.values()) == footprint.phases[footprint.peak_phase]
    assert footprint.gib() == footprint.total / 2**30
    assert footprint.gib("weights") == footprint.weights / 2**30


def test_checkpointing_keeps_one_residual_stream_per_block() -> None:
    """2 bytes * hidden * tokens for each block (Korthikanti et al. 2022, arXiv:2205.05198, section 5, in bf16), whatever is inside it."""
    footprint = small(precision="bf16", gradient_checkpointing=True)
    assert footprint.saved["checkpoint"] == 4 * 512 * 256 * 2
    assert footprint.total < small(precision="bf16").total


def test_activations_of_llama_follow_the_published_closed_form() -> None:
    """Per token and block of transformers' Llama in bf16: 16h + 2(q + k + v + o) + 8f + 4a + 8 bytes (o is the attention's output)."""
    h, q, kv, f, a, L, T = 256, 256, 64, 688, 8, 4, 512
    saved = small(precision="bf16").saved
    outside = {"model.embed_tokens.weight", "log_softmax", "loss", "model.norm", "rotary"}
    blocks = sum(nbytes for name, nbytes in saved.items() if name not in outside)
    assert blocks == L * T * (16 * h + 2 * (q + kv + kv + q) + 8 * f + 4 * a + 8)


def test_eager_attention_adds_s_by_s_scores_and_fused_does_not() -> None:
    short, long = (small(precision="bf16", batch_size=4 * 128 // s, sequence_length=s, attention="eager").saved_bytes for s in (128, 256))
    tokens, heads, blocks = 512, 8, 4
    tables = 2 * 2 * 32 * 128  # cos and sin are longer, too
    assert long - short == 6 * heads * 128 * tokens * blocks + tables  # float32 softmax and its bf16 copy
    short, long = (small(precision="bf16", batch_size=4 * 128 // s, sequence_length=s).saved_bytes for s in (128, 256))
    assert long - short == tables


def test_a_frozen_base_keeps_less_than_a_trained_one_and_the_lab_less_than_plain_operations() -> None:
    full, lora = small(precision="bf16").saved_bytes, small(precision="bf16", method="lora", target_modules=["q_proj"]).saved_bytes
    assert lora < full
    assert small(precision="bf16", implementation="lora_lab").saved_bytes < 0.75 * full


def test_dropout_keeps_masks_of_one_byte_on_cuda_and_of_the_input_dtype_on_the_cpu_and_bits_in_the_lab() -> None:
    request = {"method": "lora", "precision": "bf16", "target_modules": ["down_proj"]}
    cuda, cpu = (small(device=device, dropout=0.1, **request).saved["dropout"] for device in ("cuda", "cpu"))
    assert cuda == 3 * 512 * 688 and cpu == 4 * cuda  # of a float32 copy; below the first block nothing needs a gradient
    lab = {**request, "implementation": "lora_lab", "target_modules": ["q_proj"]}  # whose input is kept in either case
    plain, dropped = (small(dropout=share, **lab).saved_bytes for share in (0.0, 0.1))
    assert 0 < dropped - plain < 4 * 512 * 256 / 8 + 1


def test_gradient_accumulation_keeps_gradients_through_the_next_forward() -> None:
    once, twice = small(precision="bf16"), small(precision="bf16", grad_accum_steps=2)
    assert twice.phases["forward"] - once.phases["forward"] == 2 * count_parameters(SMALL).total
    assert twice.total == small(precision="bf16", grad_accum_steps=8).total


@pytest.mark.parametrize(("kind", "extra"), [("fused", 0), ("for-loop", 2 * 4 * 4096 * 256), ("foreach", 4 * 3_819_776)])
def test_an_adamw_step_needs_temporaries_by_its_implementation(kind: str, extra: int) -> None:
    """foreach works on all tensors at once: one more copy of the model; the loop on one: two of the largest tensor."""
    footprint = small(optimizer_implementation=kind, sequence_length=8)
    assert footprint.phases["optimizer step"] == 4 * 4 * 3_819_776 + 4 * 38 + extra


def test_a_llama_3_sized_vocabulary_is_mostly_logits_unless_the_loss_is_chunked() -> None:
    request = {"method": "lora", "precision": "bf16-mixed", "gradient_checkpointing": True, "batch_size": 4, "sequence_length": 1024}
    plain, chunked = predict("llama-3.2-1b", **request), predict("llama-3.2-1b", implementation="lora_lab", **request)
    assert plain.logits > 0.5 * plain.total
    assert chunked.logits < 0.1 * plain.logits


def test_unlabelled_positions_cost_the_lab_no_logits() -> None:
    everything, few = (small(implementation="lora_lab", method="lora", label_tokens=count) for count in (None, 32))
    assert everything.logits == 508 * 4096 * 4
    assert few.phases["loss"] < everything.phases["loss"] - 400 * 4096 * 4


def test_a_gpu_reserves_at_least_what_is_allocated_and_nvidia_smi_shows_more() -> None:
    footprint = small(device="cuda")
    assert footprint.total <= footprint.reserved.estimate <= footprint.reserved.high
    allocated = footprint.intervals["allocated"]
    assert footprint.reserved.low == allocated.low and footprint.reserved.high >= 1.25 * allocated.high - 2
    assert footprint.nvidia_smi.low > footprint.reserved.low and footprint.nvidia_smi.high > footprint.reserved.high
    assert small().reserved is None
    with pytest.raises(MemoryMathError, match="figure of a GPU"):
        small().gib("reserved")


def test_the_totals_are_numbers_of_bytes_that_carry_their_range() -> None:
    footprint = small(device="cuda")
    for name, interval in footprint.intervals.items():
        assert interval == interval.estimate == getattr(footprint, name) and interval.low <= interval <= interval.high and interval.why
        assert footprint.gib(name) == interval / 2**30
        copied = copy.deepcopy(interval)
        assert (copied, copied.low, copied.high, copied.why) == (interval, interval.low, interval.high, interval.why)
        assert footprint.as_dict()["intervals"][name] == interval.as_dict() and type(interval.as_dict()["estimate"]) is int
    assert footprint.allocated == footprint.total < footprint.reserved < footprint.nvidia_smi
    assert small().intervals.keys() == {"allocated"}


def test_whole_numbers_may_be_numpys() -> None:
    footprint = predict("gpt2", batch_size=numpy.int64(2), sequence_length=numpy.arange(65)[-1])
    assert footprint == predict("gpt2", batch_size=2, sequence_length=64) and type(footprint.request["batch_size"]) is int
    for value in (numpy.float32(2), numpy.arange(2), numpy.bool_(True), "2"):
        with pytest.raises(MemoryMathError, match="batch_size=.*: expected a whole number of at least 1"):
            predict("gpt2", batch_size=value)


@pytest.mark.parametrize(
    ("name", "method", "length"),
    [("llama-3-8b", "full", 2048), ("gpt2", "full", 1024), ("gpt2", "prompt", 1004), ("bert-base-uncased", "prefix", 492),
     ("roberta-base", "lora", 512), ("opt-125m", "full", 2048), ("opt-125m", "prefix", 2028)],
)  # fmt: skip
def test_a_length_that_nobody_asked_for_is_one_that_the_model_has(name: str, method: str, length: int) -> None:
    """2048 is the default of every keyword list; GPT-2 and BERT have fewer learned positions, and virtual tokens take some of them."""
    footprint = predict(name, method=method)
    assert footprint.request["sequence_length"] == length and type(footprint.request["sequence_length"]) is int
    assert footprint == predict(name, method=method, sequence_length=length)


def test_fits_counts_usable_bytes_and_gpus_needed_nominal_ones() -> None:
    footprint = predict("llama-2-70b", method="inference", precision="bf16", sequence_length=1)
    assert footprint.weights == 2 * 68_976_648_192
    assert footprint.gpus_needed("A100-80GB") == 2 and footprint.gpus_needed("a100-40gb") == 4
    assert not footprint.fits("H100-80GB")
    assert small().fits("T4")
    assert hardware.gpu_of("A100-80GB").usable_bytes == 80 * 2**30 - hardware.CONTEXT_BYTES[1]
    with pytest.raises(MemoryMathError, match=r"gpu='A100-80GBB'.*did you mean 'A100-80GB'"):
        footprint.fits("A100-80GBB")


def test_the_table_names_every_part_and_what_was_checked() -> None:
    text = str(small(device="cuda"))
    for part in (*(part.replace("_", " ") for part in PUBLIC_PARTS), "total allocated", "reserved", "nvidia-smi", "phase", "checked:"):
        assert part in text
    assert "3,819,776 parameters x 4 B" in text


@pytest.mark.parametrize(("request_", "message"), [
    ({"method": "qalora"}, r"method='qalora' is not modelled; modelled now: full, frozen, lora, .*did you mean 'qlora'"),
    ({"precision": "int8"}, r"precision='int8': expected one of fp32, bf16, fp16, bf16-mixed, fp16-mixed"),
    ({"method": "lora", "optimizer": "foo"}, r"optimizer='foo' is not modelled; modelled now: sgd, momentum, adam, adamw, adamw8bit"),
    ({"batch_size": 0}, r"batch_size=0: expected a whole number of at least 1"),
    ({"batch_size": 2**41}, r"batch_size=2199023255552: expected a whole number of at least 1, at most 1,099,511,627,776"),
    ({"batch_size": 2.5}, r"batch_size=2.5"),
    ({"sequence_length": -1}, r"sequence_length=-1"),
    ({"rank": 0}, r"rank=0"),
    ({"grad_accum_steps": 0}, r"grad_accum_steps=0"),
    ({"gradient_checkpointing": 0.5}, r"gradient_checkpointing=0.5: expected True .every block., False, n"),
    ({"gradient_checkpointing": 0}, r"gradient_checkpointing=0: expected"),
    ({"attention": "sdp"}, r"attention='sdp'.*did you mean 'sdpa'"),
    ({"attention": "eager", "implementation": "lora_lab"}, r"'eager' is not modelled with implementation='lora_lab'; modelled now: sdpa"),
    ({"attention": "flash"}, r"attention='flash' with precision='fp32'"),
    ({"attention": "flash", "precision": "bf16"}, r"attention='flash' with device='cpu'"),
    ({"loss": "mean", "implementation": "lora_lab"}, r"loss='mean' is not modelled with implementation='lora_lab'; modelled now: chunked"),
    ({"loss": "focal"}, r"loss='focal' is not modelled"),
    ({"dropout": 0.1}, r"dropout=0.1 is LoRA's dropout"),
    ({"method": "lora", "dropout": 1.0}, r"dropout=1.0: expected a number with 0 <= dropout < 1"),
    ({"method": "lora", "target_modules": ["q_proj", "gate_porj"]}, r"'gate_porj' matches nothing(.|\n)*did you mean 'gate_proj'"),
    ({"method": "lora", "target_modules": ["lm_head"]}, r"'lm_head' matches nothing"),
    ({"method": "lora", "target_modules": []}, r"names no layer"),
    ({"method": "lora", "target_modules": "everything"}, r"target_modules='everything': expected 'all-linear'"),
    ({"method": "inference", "gradient_checkpointing": True}, r"gradient_checkpointing=True does nothing with method='inference'"),
    ({"method": "inference", "grad_accum_steps": 2}, r"grad_accum_steps=2 does nothing with method='inference'"),
    ({"label_tokens": 3}, r"label_tokens is for implementation='lora_lab'"),
    ({"label_tokens": 10_000, "implementation": "lora_lab"}, r"label_tokens=10000: expected a whole number from 0 to 508"),
    ({"quantization": "nf4"}, r"quantization='nf4' with method='full': integer codes have no gradient; use method='qlora'"),
    ({"quantization": "int8"}, r"quantization='int8' with method='full'"),
    ({"quantization": "nf5"}, r"quantization='nf5' is not modelled.*did you mean 'nf4'"),
    ({"method": "lora", "adapter_dtype": "int4"}, r"adapter_dtype='int4': expected one of float64, float32"),
    ({"zero_stage": 4}, r"zero_stage=4: expected 0"),
    ({"world_size": 0}, r"world_size=0"),
    ({"tensor_parallel": 3}, r"tensor_parallel=3: the 8 heads of config do not divide"),
    ({"compile": "yes"}, r"compile='yes': expected True or False"),
    ({"versions": "4.45"}, r"versions='4.45': expected a dict"),
    ({"versions": {"tranformers": "4.45"}}, r"versions names 'tranformers', expected torch, transformers, bitsandbytes"),
    ({"versions": {"transformers": "new"}}, r"version 'new': expected something like '4.44'"),
    ({"optimizer_in_backward": True, "grad_accum_steps": 2}, r"optimizer_in_backward=True with grad_accum_steps > 1"),
    ({"method": "inference", "optimizer_in_backward": True}, r"optimizer_in_backward=True does nothing with method='inference'"),
    ({"implementation": "peft"}, r"implementation='peft'"),
    ({"device": "mps"}, r"device='mps'"),
    ({"optimizer_implementation": "fuse"}, r"optimizer_implementation='fuse'.*did you mean 'fused'"),
])  # fmt: skip
def test_what_is_not_modelled_is_refused_by_name(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryMathError, match=message):
        small(**request_)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_byte_is_given_back_without_the_garbage_collector(checkpointing: bool) -> None:
    """Lifetimes are counted by reference: a cycle anywhere would keep bytes alive and the peak too high."""
    request = inspect.signature(predict).parameters
    asked = {name: parameter.default for name, parameter in request.items() if name != "source"}
    asked |= {"implementation": "transformers", "device": "cpu"}
    ledger = Ledger()
    gc.disable()
    try:
        simulate(check(architecture_of(SMALL), **{**asked, "gradient_checkpointing": checkpointing}), ledger)
        assert ledger.total == 0 and not any(ledger.live.values())
    finally:
        gc.enable()


@pytest.mark.parametrize("asked", [
    {}, {"method": "qlora", "target_modules": ["q_proj"], "adapter_dtype": "bf16"}, {"method": "prompt", "num_virtual_tokens": 3},
    {"implementation": "lora_lab", "label_tokens": 7}, {"versions": {"transformers": "4.40"}, "gradient_checkpointing": 2},
    {"precision": "bf16-mixed", "zero_stage": 2, "world_size": 4, "device": "cuda"},
])  # fmt: skip
def test_what_a_footprint_says_was_asked_can_be_asked_again(asked: dict[str, Any]) -> None:
    footprint = small(**asked)
    assert predict(SMALL, **footprint.request) == footprint


@pytest.mark.parametrize(("asked", "idle"), [
    ({"rank": 16, "target_modules": ["nonsense"]}, ("rank", "target_modules")),
    ({"method": "lora", "num_virtual_tokens": 5}, ("num_virtual_tokens",)),
    ({"method": "inference", "optimizer": "sgd"}, ("optimizer",)), ({"method": "lora", "rank": 16}, ()),
    ({"target_length": 5}, ("target_length",)), ({"loss": "mean"}, ()), ({"zero_stage": 3}, ("zero_stage",)),
    ({"method": "inference", "loss": "mean", "optimizer_implementation": "fused", "zero_stage": 2, "world_size": 4},
     ("optimizer_implementation", "zero_stage", "world_size", "loss")),
    ({"method": "inference", "zero_stage": 3, "world_size": 4}, ()), ({"zero_stage": 1, "precision": "bf16-mixed"}, ()),
    ({"method": "frozen", "grad_accum_steps": 2, "optimizer_in_backward": False, "optimizer": "sgd"}, ("optimizer", "grad_accum_steps")),
])  # fmt: skip
def test_what_has_no_effect_is_said(asked: dict[str, Any], idle: tuple[str, ...]) -> None:
    footprint = small(**asked)
    assert footprint.idle == idle
    assert ("without effect here: " in footprint.table()) == bool(idle)


def test_what_a_model_of_this_shape_cannot_be_asked_is_refused() -> None:
    for asked, message in (
        (({**SMALL, "architectures": ["LlamaForSequenceClassification"]},), "as ForSequenceClassification is not modelled"),
        (({**SMALL, "architectures": ["LlamaModel"]},), "as Model is not modelled"), (({**SMALL, "hidden_act": "bogus"},), "activation='bogus'"),
        (({**SMALL, "attention_dropout": 0.1},), "attention_dropout=0.1"),
    ):  # fmt: skip
        with pytest.raises(MemoryMathError, match=message):
            predict(*asked, sequence_length=8)
    for name, length in (("gpt2", 1025), ("bert-base-uncased", 513), ("roberta-base", 513), ("opt-125m", 2049)):
        with pytest.raises(MemoryMathError, match=f"sequence_length={length}: {name} has {length - 1} learned positions"):
            predict(name, sequence_length=length)
        predict(name, sequence_length=length - 1, method="inference")
        with pytest.raises(MemoryMathError, match="learned positions, the virtual tokens included"):
            predict(name, sequence_length=length - 20, method="prefix")
    for name in ("precision", "optimizer"):
        with pytest.raises(MemoryMathError, match=name):
            small(**{name: ["adamw"]})


def test_the_same_request_gives_the_same_prediction() -> None:
    assert small(device="cuda", precision="bf16-mixed") == small(device="cuda", precision="bf16-mixed")


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(MemoryMathError, match="part='weight': expected one of weights"):
        small().gib("weight")
