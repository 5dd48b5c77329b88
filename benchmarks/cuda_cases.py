"""The 20 configurations of cuda_truth.py, and how each is built, run and measured."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RANK = 8
TINY_ROWS, TINY_LENGTH = 2, 32
TINY = {
    "llama": {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 344},
    "gpt2": {"vocab_size": 256, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One configuration; the words are those of memory_math.predict."""

    model: str
    method: str
    precision: str
    rows: int
    length: int
    implementation: str = "transformers"
    checkpointing: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    step: str = "foreach"
    micro_batches: int = 1

    @property
    def name(self) -> str:
        words = [self.model, self.implementation, self.method, self.precision, f"{self.rows}x{self.length}", self.attention]
        if self.method != "inference":
            words += [self.optimizer, self.step]
        return " ".join(words + ["checkpointing"] * self.checkpointing + [f"{self.micro_batches} micro-batches"] * (self.micro_batches > 1))

    def config(self, tiny: bool) -> dict[str, Any]:
        from memory_math.presets import PRESETS

        preset = dict(PRESETS[self.model])
        return {**preset, **TINY[preset["model_type"]]} if tiny else preset

    def shape(self, tiny: bool) -> tuple[int, int]:
        return (TINY_ROWS, TINY_LENGTH) if tiny else (self.rows, self.length)

    def request(self, tiny: bool) -> dict[str, Any]:
        rows, length = self.shape(tiny)
        training = {"optimizer": self.optimizer, "optimizer_implementation": self.step, "gradient_checkpointing": self.checkpointing,
                    "grad_accum_steps": self.micro_batches}  # fmt: skip
        return {
            "method": self.method, "precision": self.precision, "batch_size": rows, "sequence_length": length, "rank": RANK,
            "attention": self.attention, "implementation": self.implementation, "device": "cpu" if tiny else "cuda",
            **({} if self.method == "inference" else training),
        }  # fmt: skip


OURS = "lora_lab"
CASES = (
    Case("smollm2-135m", "full", "fp32", 4, 512),
    Case("smollm2-135m", "full", "fp32", 4, 512, attention="eager"),
    Case("smollm2-135m", "full", "bf16-mixed", 8, 1024),
    Case("smollm2-135m", "full", "bf16", 8, 1024, step="fused"),
    Case("smollm2-135m", "full", "bf16-mixed", 8, 1024, checkpointing=True),
    Case("smollm2-135m", "full", "bf16", 4, 512, optimizer="momentum", micro_batches=2),
    Case("smollm2-135m", "lora", "bf16-mixed", 8, 1024),
    Case("smollm2-135m", "lora", "bf16-mixed", 8, 1024, OURS, step="fused"),
    Case("smollm2-135m", "full", "fp32", 4, 512, OURS, step="fused"),
    Case("smollm2-360m", "full", "bf16-mixed", 4, 2048, checkpointing=True),
    Case("smollm2-360m", "lora", "bf16", 8, 1024, checkpointing=True),
    Case("smollm2-360m", "lora", "bf16", 8, 1024, OURS, checkpointing=True, step="fused"),
    Case("tinyllama-1.1b", "full", "bf16", 2, 2048, checkpointing=True, step="for-loop"),
    Case("tinyllama-1.1b", "full", "bf16", 2, 2048, checkpointing=True, optimizer="adamw8bit", step="fused"),
    Case("tinyllama-1.1b", "lora", "bf16-mixed", 2, 2048),
    Case("tinyllama-1.1b", "inference", "bf16", 8, 2048),
    Case("llama-3.2-1b", "full", "bf16", 2, 2048, checkpointing=True, step="fused"),
    Case("llama-3.2-1b", "lora", "bf16-mixed", 4, 2048, OURS, checkpointing=True, step="fused"),
    Case("gpt2", "full", "fp32", 4, 1024, attention="eager"),
    Case("gpt2-medium", "full", "bf16-mixed", 4, 1024),
)


def missing_library(case: Case) -> str | None:
    """The library that this configuration needs and that is not installed."""
    needs = ["transformers"] * (case.implementation == "transformers") + ["bitsandbytes"] * (case.optimizer == "adamw8bit")
    needs += ["peft"] * (case.implementation == "transformers" and case.method == "lora")
    return next((name for name in needs if importlib.util.find_spec(name) is None), None)


def build(case: Case, tiny: bool, device: str) -> Any:
    """The model as `case` trains it, with random weights, made on the device and in its dtype: a larger copy would stay reserved."""
    import torch

    low = case.precision == "bf16" or (case.precision == "bf16-mixed" and case.method == "lora")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if low else torch.float32)
    try:
        with torch.device(device):
            model = (our_model if case.implementation == OURS else their_model)(case, tiny)
    finally:
        torch.set_default_dtype(before)
    if case.checkpointing:
        model.gradient_checkpointing_enable(*([] if case.implementation == OURS else [{"use_reentrant": False}]))
    return (adapted(case, model) if case.method == "lora" else model).train(case.method != "inference")


def our_model(case: Case, tiny: bool) -> Any:
    from lora_lab.models import llama

    return llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(case.config(tiny)))


def their_model(case: Case, tiny: bool) -> Any:
    import torch
    import transformers

    fields = case.config(tiny)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, use_cache=case.method == "inference")
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=case.attention, dtype=torch.get_default_dtype())


def adapted(case: Case, model: Any) -> Any:
    if case.implementation == OURS:
        import lora_lab

        return lora_lab.inject(model, rank=RANK)
    import peft

    if case.checkpointing:
        model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))


def make_optimizer(case: Case, model: Any) -> Any:
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-5)
    foreach, fused = case.step == "foreach", case.step == "fused"
    if case.optimizer == "momentum":
        return torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, foreach=foreach, fused=fused)
    return torch.optim.AdamW(parameters, lr=1e-5, foreach=foreach, fused=fused)


class Run:
    """A model, its optimizer, and the one thing that is measured: `once`."""

    def __init__(self, case: Case, tiny: bool, device: str) -> None:
        self.case, self.tiny, self.device = case, tiny, device
        self.model = build(case, tiny, device)
        self.trains = case.method != "inference"
        self.optimizer = make_optimizer(case, self.model) if self.trains else None

    def forward(self, ids: Any, labels: Any) -> Any:
        import torch

        mixed = self.case.precision == "bf16-mixed"
        with torch.autocast(self.device, torch.bfloat16) if mixed else contextlib.nullcontext():
            return self.model(input_ids=ids, labels=labels).loss

    def ids(self) -> Any:
        import torch

        return torch.randint(0, self.case.config(self.tiny)["vocab_size"], self.case.shape(self.tiny), device=self.device)

    def once(self, phase: Callable[[str], None] = lambda name: None) -> None:
        """One step, or one prompt; no name lives longer than it is needed."""
        phase("forward")
        if self.optimizer is None:
            self.prompt()
            return
        for _ in range(self.case.micro_batches):
            phase("forward")
            ids = self.ids()
            labels = ids.clone()
            loss = self.forward(ids, labels)
            phase("backward")
            loss.backward()
            del loss, ids, labels
        phase("optimizer step")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prompt(self) -> None:
        import torch

        with torch.no_grad():
            self.model(input_ids=self.ids(), use_cache=True, logits_to_keep=1)


def measured(case: Case, tiny: bool, device: str) -> Any:
    """The memory_math Measurement of the second step; on the CPU less the tensors that were there before the model."""
    import torch

    from memory_math import measure, saved_bytes

    elsewhere = measure(lambda: None, device="cpu").start_bytes if device == "cpu" else 0
    torch.manual_seed(0)
    run = Run(case, tiny, device)
    run.once()
    with measure(device=device) as m:
        run.once(m.phase)
    m.start_bytes, m.peak_bytes, m.end_bytes = (nbytes - elsewhere for nbytes in (m.start_bytes, m.peak_bytes, m.end_bytes))
    m.by_phase = {phase: nbytes - elsewhere for phase, nbytes in m.by_phase.items()}
    if run.trains:
        ids = run.ids()
        labels = ids.clone()
        m.saved_bytes = saved_bytes(lambda: run.forward(ids, labels))
    return m


def truth(case: Case, tiny: bool, device: str) -> dict[str, Any]:
    """Prediction and measurement of one configuration, as numbers."""
    from memory_math import predict
    from memory_math.measurement import comparison

    footprint = predict(case.config(tiny), **case.request(tiny))
    m = measured(case, tiny, device)
    found = {"measured": {"allocated": m.peak_bytes, "reserved": m.reserved_bytes, "nvidia_smi": m.used_bytes, "saved": m.saved_bytes}}
    rows = [{"what": what, "predicted": predicted, "measured": real} for what, predicted, real in comparison(footprint, m)]
    return {**found, "rows": rows}
