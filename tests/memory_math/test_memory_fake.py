"""Steps on fake tensors: they hold what real ones do, and a 7B model's step is what is predicted."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from known_versions import equals
from torch.distributed._tools.mem_tracker import MemTracker

import lora_lab
from lora_lab.models import llama
from memory_math import MemoryMathError, measure, predict, saved_bytes
from memory_math.fake_runs import fake_saved_bytes, fake_step, fake_tensors

SHAPE = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 176,
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008,
}  # fmt: skip
BATCH, LENGTH, RANK = 2, 48, 4
CASES = [
    *itertools.product(("transformers", "lora_lab"), ("full", "frozen", "lora"), ("fp32",), (False, True)),
    *itertools.product(("transformers", "lora_lab"), ("full", "lora"), ("bf16-mixed",), (False,)),
]


def model_of(config: dict[str, Any], implementation: str, method: str, precision: str, checkpointing: bool) -> Any:
    """The model as a user sets it up: weights that do not train in 16 bit unless all is float32."""
    model: Any
    if implementation == "lora_lab":
        model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    else:
        fields = {key: value for key, value in config.items() if key != "model_type"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, use_cache=False))
    if precision == "bf16" or (precision == "bf16-mixed" and method != "full"):
        model = model.bfloat16()
    if method == "frozen" or (method == "lora" and checkpointing and implementation == "transformers"):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    model.requires_grad_(method != "frozen")
    if checkpointing:
        model.gradient_checkpointing_enable(*([{"use_reentrant": False}] if implementation == "transformers" else []))
    if method == "lora":
        model = lora_lab.inject(model, rank=RANK) if implementation == "lora_lab" else with_peft(model)
    return model.train()


def with_peft(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))


def autocast(precision: str) -> Any:
    return torch.bfloat16 if precision == "bf16-mixed" else None


def predicted(config: dict[str, Any], **request: Any) -> Any:
    return predict(config, **{"batch_size": BATCH, "sequence_length": LENGTH, "rank": RANK, "device": "cpu", **request})


@pytest.mark.parametrize(("implementation", "method", "precision", "checkpointing"), CASES)
def test_autograd_keeps_exactly_what_is_predicted(implementation: str, method: str, precision: str, checkpointing: bool) -> None:
    def build() -> Any:
        return model_of(SHAPE, implementation, method, precision, checkpointing)

    kept = fake_saved_bytes(build, batch_size=BATCH, sequence_length=LENGTH, autocast=autocast(precision))
    footprint = predicted(SHAPE, implementation=implementation, method=method, precision=precision, gradient_checkpointing=checkpointing)
    stamps = 0  # watched by hooks, our LoRA layers take themselves for checkpointed: an int64 for each input, of the first for each of q, k, v
    if (implementation, method, checkpointing) == ("lora_lab", "lora", False):
        stamps = 8 * (4 * SHAPE["num_hidden_layers"] + 2)  # type: ignore[operator]
    assert footprint.saved_bytes == equals(kept - stamps, implementation)


@pytest.mark.parametrize(("implementation", "method", "checkpointing"), [
    ("transformers", "full", False), ("transformers", "lora", True), ("lora_lab", "full", True), ("lora_lab", "lora", False),
])  # fmt: skip
def test_a_fake_step_holds_what_a_real_one_does(implementation: str, method: str, checkpointing: bool) -> None:
    """The second step, in every phase, within the few bytes that counters and masks of one element make."""
    fake = fake_step(lambda: model_of(SHAPE, implementation, method, "fp32", checkpointing), batch_size=BATCH, sequence_length=LENGTH)
    elsewhere = measure(lambda: None).start_bytes
    model = model_of(SHAPE, implementation, method, "fp32", checkpointing)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        ids = torch.full((BATCH, LENGTH), 2)
        model(input_ids=ids, labels=ids.clone()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    real = measure(step, saved=True)
    assert fake.saved_bytes == real.saved_bytes
    assert fake.start_bytes == pytest.approx(real.start_bytes - elsewhere, rel=1e-3)
    for phase in ("forward", "backward", "optimizer step"):
        assert fake.by_phase[phase] == pytest.approx(real.by_phase[phase] - elsewhere, rel=1e-3), phase


@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("full", True), ("lora", False)])
def test_what_autograd_keeps_of_llama_2_7b(method: str, checkpointing: bool) -> None:
    """In its real size: 32 blocks, 2 rows of 2,048 tokens, 16-bit weights."""
    shape = {"batch_size": 2, "sequence_length": 2048}
    kept = fake_saved_bytes(lambda: model_of(LLAMA_2_7B, "transformers", method, "bf16", checkpointing), **shape)
    footprint = predicted(LLAMA_2_7B, method=method, precision="bf16", gradient_checkpointing=checkpointing, **shape)
    assert footprint.saved_bytes == equals(kept)


@pytest.mark.slow
def test_peak_of_a_7b_step_is_what_mem_tracker_finds() -> None:
    """Llama-2-7B, bf16, gradient checkpointing, 2 rows of 2,048 tokens, AdamW without foreach; torch.distributed._tools.mem_tracker
    looks on from outside, and so does our own instrument."""
    tracker = MemTracker()
    with fake_tensors():
        model = model_of(LLAMA_2_7B, "transformers", "full", "bf16", checkpointing=True)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the optimizer's states: this is to be the second step
        optimizer.zero_grad()
        ids = torch.randint(0, 32000, (2, 2048))
        tracker.track_external(model, optimizer, ids)
        with tracker, measure(device="cpu") as ours:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    footprint = predicted(LLAMA_2_7B, precision="bf16", batch_size=2, sequence_length=2048, gradient_checkpointing=True)
    assert footprint.total == pytest.approx(theirs, rel=0.02), ours.against(footprint)
    assert ours.peak_bytes == pytest.approx(theirs, rel=0.001)
    for phase in ("backward", "optimizer step"):
        assert footprint.phases[phase] == pytest.approx(ours.by_phase[phase], rel=0.02), ours.against(footprint)


def test_a_step_can_be_accumulated_and_take_an_optimizer_of_ones_own() -> None:
    def build() -> Any:
        return model_of(SHAPE, "lora_lab", "full", "fp32", True)

    request = {"implementation": "lora_lab", "gradient_checkpointing": True}
    fused = fake_step(build, batch_size=BATCH, sequence_length=LENGTH, optimizer=lambda found: torch.optim.AdamW(found, fused=True))
    assert fused.peak_bytes == pytest.approx(predicted(SHAPE, **request).total, rel=0.01)
    plain, twice = (fake_step(build, batch_size=BATCH, sequence_length=LENGTH, optimizer="sgd", grad_accum_steps=n) for n in (1, 2))
    gradients = twice.by_phase["forward"] - plain.by_phase["forward"]  # those of the first micro-batch
    assert gradients == pytest.approx(predicted(SHAPE, **request).weights, rel=0.01)
    assert fused.start_bytes == pytest.approx(3 * plain.start_bytes, rel=0.01)  # weights and two moments


def test_fake_tensors_are_for_ones_own_loop_too() -> None:
    with fake_tensors():
        weight = torch.zeros(2**30, 10, requires_grad=True)  # 40 GiB
        with measure(device="cpu") as m:
            kept = saved_bytes(lambda: (weight * 2).exp())
        assert kept == 40 * 2**30
    assert (m.start_bytes, m.peak_bytes - m.start_bytes) == (40 * 2**30, 80 * 2**30)
    assert "fake tensors" in str(m)


def test_a_fake_run_leaves_real_tensors_alone() -> None:
    here = torch.zeros(1000)
    with fake_tensors():
        assert measure(lambda: None, device="cpu").start_bytes == 0
    assert here.sum().item() == 0 and type(torch.zeros(1)) is torch.Tensor


def test_token_ids_stay_real_and_large_masks_do_not() -> None:
    ids = torch.tensor([[1, 2, 0], [1, 0, 0]])
    with fake_tensors():
        hidden = torch.zeros(2, 3, 8)
        assert hidden[ids != 0].shape == (3, 8)
        assert int((ids != 0).sum()) == 3
        positions = torch.arange(100_000)
        assert (positions[:, None] >= positions).shape == (100_000, 100_000)


def test_what_a_fake_step_cannot_do_is_refused() -> None:
    def build() -> Any:
        return model_of(SHAPE, "lora_lab", "full", "fp32", False)

    with pytest.raises(MemoryMathError, match="optimizer='lion': a fake step has sgd"):
        fake_step(build, batch_size=1, sequence_length=8, optimizer="lion")
    with pytest.raises(MemoryMathError, match="make the model on the CPU"), fake_tensors():
        torch.zeros(1, device="xpu")


def test_a_model_without_a_loss_says_so() -> None:
    class Mute(torch.nn.Linear):
        def forward(self, input_ids: Any, labels: Any) -> Any:
            return SimpleNamespace(loss=None)

    with pytest.raises(MemoryMathError, match="Mute"):
        fake_step(lambda: Mute(2, 2), batch_size=1, sequence_length=8)
