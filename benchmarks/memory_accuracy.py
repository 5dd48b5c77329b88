"""Predicted against measured by others: published GPU figures, row by row, with the signed error.

    python benchmarks/memory_accuracy.py

No constant was fitted to a row. What a row needs to be understood (library versions, dtypes, what was read when) is in its source; where a
source does not name a version, the group says from what it was concluded. Shown and not scored are compiled rows, as what Inductor keeps has no
rule that holds for all versions, and rows whose version was concluded from the very figure. Every total is held against its predicted interval,
too. Sixteen rows are two notebooks of one author, and three are plain arithmetic. Below stand rows that were found when the formulas were
written: nobody had them in view, and they are scored for themselves. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from memory_math import Footprint, predict
from memory_math.architectures import architecture_of

GB, GIB = 1e9, 2**30
SMALL_LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip
QV = ["q_proj", "v_proj"]


def total(footprint: Footprint) -> float:
    return footprint.total


def after_forward(footprint: Footprint) -> float:
    """memory_allocated() right after the forward pass of a model that has no optimizer."""
    return footprint.phases["after forward"] - footprint.optimizer_states


def kept(footprint: Footprint) -> float:
    """What a forward pass has added once it is done."""
    return footprint.phases["after forward"] - footprint.phases["load"]


def reserved(footprint: Footprint) -> float:
    assert footprint.reserved is not None
    return footprint.reserved.estimate


def nvidia_smi_2022(footprint: Footprint) -> float:
    """What is reserved, and the CUDA context of 1343 MB that the same source measured."""
    return reserved(footprint) + 1343 * 2**20


@dataclass(frozen=True)
class Row:
    """One published figure: measured in `unit` bytes; `read` takes the same figure from a prediction."""

    group: str
    name: str
    measured: float
    unit: float
    model: Any
    request: dict[str, Any]
    read: Callable[[Footprint], float] = total
    unscored: str = ""  # why the row is shown and not scored

    def predicted(self) -> tuple[float, Footprint]:
        footprint = predict(self.model, **self.request)
        return self.read(footprint) / self.unit, footprint


def answer_ai(env: str, versions: dict[str, str], rows: dict[int, tuple[float, float]]) -> list[Row]:
    """bf16, one row, logits.mean(), memory_allocated() after forward; adapters in bf16, dropout 0.1."""
    both = {"precision": "bf16", "loss": "mean", "versions": versions}
    lora = {"method": "lora", "rank": 8, "target_modules": QV, "dropout": 0.1, "adapter_dtype": "bf16"}
    found = []
    for length, (full, adapted) in rows.items():
        found.append(Row(env, f"full, s {length}", full, GB, SMALL_LLAMA, {**both, "sequence_length": length}, after_forward))
        found.append(Row(env, f"LoRA, s {length}", adapted, GB, SMALL_LLAMA, {**both, **lora, "sequence_length": length}, after_forward))
    return found


def litgpt() -> list[Row]:
    """A100-40, torch 2.1, bitsandbytes 0.41.1, bf16-true (adapters, too), longest row 1304 tokens, max_memory_allocated."""
    same = {
        "precision": "bf16", "rank": 8, "target_modules": QV, "dropout": 0.05, "adapter_dtype": "bf16", "sequence_length": 1304,
        "versions": {"torch": "2.1", "bitsandbytes": "0.41.1"},
    }  # fmt: skip
    rows = []
    for model, name, measured in (
        ("llama-2-7b", "7B", {"none": 21.30, "nf4": 14.14, "nf4-dq": 13.84}), ("llama-2-13b", "13B", {"none": 38.12, "nf4": 23.14, "nf4-dq": 22.55}),
    ):  # fmt: skip
        for quantization, figure in measured.items():
            method = "lora" if quantization == "none" else "qlora"
            rows.append(Row("litgpt LoRA", f"{name} {quantization}", figure, GB, model, {**same, "method": method, "quantization": quantization}))
    return [*rows, Row("litgpt LoRA", "7B none, 2 rows", 29.07, GB, "llama-2-7b", {**same, "method": "lora", "batch_size": 2})]


def torchtune() -> list[Row]:
    """Llama-3.2-3B, A100, 2 x 4096 packed, bf16 weights and fused AdamW; each step adds one thing. The 8B rows: RTX 4090, 2 x 2048."""
    request: dict[str, Any] = {"precision": "bf16", "batch_size": 2, "sequence_length": 4096, "optimizer_implementation": "fused"}
    rows = [Row("torchtune 3B full", "plain", 60.0, GIB, "llama-3.2-3b", dict(request))]
    for name, measured, change in (
        ("+ compile", 51.0, {"compile": True}),
        ("+ chunked loss", 42.9, {"loss": "chunked"}),
        ("+ checkpointing", 24.9, {"gradient_checkpointing": True}),
        ("+ optimizer in backward", 23.1, {"optimizer_in_backward": True}),
        ("+ activation offload", 21.8, {"offload_activations": True}),
        ("+ 8-bit AdamW", 17.6, {"optimizer": "adamw8bit"}),
    ):
        request.update(change)
        rows.append(Row("torchtune 3B full", name, measured, GIB, "llama-3.2-3b", dict(request), unscored="compiled"))
    lora = {
        "precision": "bf16", "batch_size": 2, "sequence_length": 2048, "rank": 8, "target_modules": QV, "adapter_dtype": "bf16", "compile": True,
        "loss": "chunked", "gradient_checkpointing": True, "optimizer_implementation": "fused",
    }  # fmt: skip
    for method, measured in (("lora", 16.2), ("qlora", 7.4)):
        rows.append(Row("torchtune 8B", f"{method}, compiled", measured, GIB, "llama-3.1-8b", {**lora, "method": method}, unscored="compiled"))
    return rows


def lomo() -> list[Row]:
    """LLaMA-7B, fp16 with float32 masters, 8 x 512, eager attention of transformers 4.28; its table adds all gradients to all activations."""
    request = {
        "precision": "fp16-mixed", "zero_stage": 1, "batch_size": 8, "sequence_length": 512, "attention": "eager", "grad_accum_steps": 2,
        "optimizer_implementation": "fused", "versions": {"transformers": "4.28", "torch": "2.0"},
    }  # fmt: skip
    lone = {**request, "grad_accum_steps": 1}
    parts = (("parameters", 12.55, "weights"), ("AdamW states", 75.31, "optimizer_states"))
    rows = [Row("LOMO 7B", name, measured, GIB, "llama-7b", lone, lambda f, p=part: getattr(f, p)) for name, measured, part in parts]  # type: ignore[misc]
    return [
        *rows,
        Row("LOMO 7B", "gradients", 12.55, GIB, "llama-7b", request, lambda f: f.gradients),
        Row("LOMO 7B", "activations", 45.61, GIB, "llama-7b", lone, kept),
        Row("LOMO 7B", "total", 147.02, GIB, "llama-7b", request),
    ]


def peft() -> list[Row]:
    """PEFT's MetaMathQA benchmark: Llama-3.2-3B in bf16, float32 adapters, worst batch 4 x 768, AdamW (foreach), memory reserved."""
    same = {"precision": "bf16", "batch_size": 4, "sequence_length": 768}
    lora = {**same, "method": "lora", "rank": 32, "target_modules": QV}
    return [
        Row("PEFT 3B reserved", "full", 36.2, GIB, "llama-3.2-3b", same, reserved),
        Row("PEFT 3B reserved", "LoRA r32 q,v", 20.76, GIB, "llama-3.2-3b", lora, reserved),
    ]


def bert() -> list[Row]:
    """The performance guide of transformers 4.18: bert-large with a classifier, float32, s 512, V100, adamw_hf (a plain loop), nvidia-smi.

    PyTorch is not named; of that winter is 1.10, whose softmax kept its input.
    """
    same = {
        "sequence_length": 512, "attention": "eager", "optimizer_implementation": "for-loop", "versions": {"transformers": "4.18", "torch": "1.10"},
    }  # fmt: skip
    four, one = {**same, "batch_size": 4}, {**same, "batch_size": 1, "grad_accum_steps": 4}
    return [
        Row("bert-large nvidia-smi", "4 rows", 14949, 2**20, "bert-large-uncased", four, nvidia_smi_2022),
        Row("bert-large nvidia-smi", "1 row x 4", 8681, 2**20, "bert-large-uncased", one, nvidia_smi_2022),
        Row("bert-large nvidia-smi", "+ checkpointing", 6775, 2**20, "bert-large-uncased", {**one, "gradient_checkpointing": True}, nvidia_smi_2022),
    ]


def one_layer() -> list[Row]:
    """Copies of [T, h] in bf16 that one block leaves behind, its output included, at 32,768 tokens; the copies say transformers 4.48 to 4.55."""
    request = {"precision": "bf16", "sequence_length": 32768, "versions": {"transformers": "4.51"}}
    outside = ("log_softmax", "loss", "shift", "model.norm", "lm_head.weight", "model.embed_tokens.weight", "embedding scale", "rotary")

    def copies(model: str) -> Callable[[Footprint], float]:
        shape = architecture_of(model)
        size = 2 * shape.hidden * 32768
        return lambda f: 1 + sum(nbytes for name, nbytes in f.saved.items() if name not in outside) / shape.layers / size

    figures = {"llama-3.1-8b": 28.0, "mistral-7b-v0.1": 28.0, "gemma-2b": 48.0}
    return [
        Row("copies per block", model, measured, 1, model, request, copies(model), unscored="the version is concluded from the figure")
        for model, measured in figures.items()
    ]


def fms_acceleration() -> list[Row]:
    """scripts/benchmarks/refs/a100_80gb.csv: A100-80, 4,096 tokens, checkpointing, FlashAttention 2, LoRA r16 on q, k, v, o; max_memory_allocated.

    torch 2.4.1, transformers 4.45.2, PEFT 0.13.2 and bitsandbytes 0.43.3 stand beside it; the 4-bit rows are its accelerated ones, under autocast.
    Mixtral's were the occasion to write down its experts as transformers 4 had them.
    """
    versions = {"torch": "2.4", "transformers": "4.45", "bitsandbytes": "0.43.3"}
    same = {"sequence_length": 4096, "gradient_checkpointing": True, "attention": "flash", "versions": versions}
    lora = {**same, "precision": "fp16", "method": "lora", "rank": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    qlora = {**lora, "precision": "fp16-mixed", "method": "qlora", "quantization": "nf4-dq"}
    full = {**same, "precision": "fp16"}
    rows = (
        ("mistral-7b-v0.1", full, {4: 72_971_724_288, 8: 72_972_117_504}), ("mistral-7b-v0.1", lora, {4: 26_108_963_328, 8: 37_098_695_168}),
        ("mistral-7b-v0.1", qlora, {4: 15_860_019_712, 8: 26_849_751_552}), ("mixtral-8x7b", qlora, {4: 36_218_024_448, 8: 47_207_756_288}),
        ("llama-2-70b", qlora, {4: 68_159_977_472}),
    )  # fmt: skip
    return [
        Row("fms-acceleration", f"{model} {request.get('method', 'full')}, {batch} rows", nbytes / GB, GB, model, {**request, "batch_size": batch})
        for model, request, measured in rows
        for batch, nbytes in measured.items()
    ]


def peft_methods() -> list[Row]:
    """PEFT's MetaMathQA benchmark again (method_comparison/MetaMathQA/results): L40S, the versions of transformers that each result names."""
    same = {"precision": "bf16", "batch_size": 4, "sequence_length": 768}
    lora, virtual = {"target_modules": QV, "rank": 32}, {"num_virtual_tokens": 200}
    rows = (
        ("LoRA r64 q,v", "lora", "4.52", {**lora, "rank": 64}, 22_540_189_696), ("DoRA r32 q,v", "dora", "4.57", lora, 24_540_872_704),
        ("LoRA r10 on the MLP", "lora", "4.57", {"rank": 10, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, 24_712_839_168),
        ("prompt of 200", "prompt", "4.52", virtual, 24_379_392_000), ("prefix of 200", "prefix", "4.52", virtual, 20_912_799_744),
    )  # fmt: skip
    requests = {name: {**same, **change, "method": method, "versions": {"transformers": version}} for name, method, version, change, _ in rows}
    return [Row("PEFT 3B reserved", name, nbytes / GIB, GIB, "llama-3.2-3b", requests[name], reserved) for name, *_, nbytes in rows]


def litgpt_neox() -> list[Row]:
    """The same table as `litgpt`, StableLM Alpha 3B: longest row 1034 tokens, LoRA on the fused query_key_value (of k not)."""
    model = {
        "model_type": "gpt_neox", "vocab_size": 50688, "hidden_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 32,
        "intermediate_size": 16384, "tie_word_embeddings": False,
    }  # fmt: skip
    same = {
        "method": "lora", "precision": "bf16", "rank": 8, "target_modules": ["query_key_value"], "dropout": 0.05, "adapter_dtype": "bf16",
        "sequence_length": 1034, "versions": {"torch": "2.1", "bitsandbytes": "0.41.1"},
    }  # fmt: skip
    rows = ((1, "none", 9.69), (2, "none", 12.10), (4, "none", 16.92), (1, "nf4", 6.35), (1, "nf4-dq", 6.19))
    return [
        Row("litgpt StableLM 3B", f"{batch} rows {kind}", measured, GB, model, {**same, "batch_size": batch, "quantization": kind})
        for batch, kind, measured in rows
    ]


def later_rows() -> list[Row]:
    """Rows that were found when the formulas were written."""
    return [*fms_acceleration(), *peft_methods(), *litgpt_neox()]


def all_rows() -> list[Row]:
    """Every row, in groups."""
    early, late = {"torch": "2.1", "transformers": "4.37"}, {"torch": "2.2", "transformers": "4.38"}
    first = {512: (3.605, 3.451), 1024: (4.907, 4.580), 2048: (7.493, 6.835), 3072: (10.093, 9.105)}
    second = {512: (3.521, 3.363), 1024: (4.757, 4.437), 2048: (7.283, 6.642), 3072: (9.879, 8.916)}
    return [
        *torchtune(), *litgpt(), *answer_ai("answer.ai profile", early, first), *answer_ai("answer.ai hqq profile", late, second),
        *lomo(), *peft(), *bert(), *one_layer(),
    ]  # fmt: skip


@dataclass
class Score:
    """Errors as shares, of every scored row; whether totals and reserved figures, compiled ones too, lie in the interval that is predicted."""

    errors: list[float] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)

    def add(self, row: Row, error: float, footprint: Footprint) -> None:
        if not row.unscored:
            self.errors.append(error)
        interval = {total: "allocated", reserved: "reserved"}.get(row.read)
        if interval is not None:
            self.inside.append(footprint.intervals[interval].low <= row.measured * row.unit <= footprint.intervals[interval].high)

    @property
    def summary(self) -> dict[str, float | int]:
        sizes = [abs(error) for error in self.errors]
        return {
            "scored_rows": len(sizes), "median_absolute_error": round(median(sizes), 4), "worst_absolute_error": round(max(sizes), 4),
            "rows_with_an_interval": len(self.inside), "inside_their_interval": sum(self.inside),
        }  # fmt: skip


def score(show: Callable[[str], object] = print, rows: list[Row] | None = None) -> Score:
    """Predict every row, or these, and show it."""
    result, group = Score(), ""
    show(f"{'':<34}{'measured':>10}{'predicted':>11}{'error':>8}")
    for row in all_rows() if rows is None else rows:
        predicted, footprint = row.predicted()
        error = predicted / row.measured - 1
        result.add(row, error, footprint)
        if row.group != group:
            show(row.group)
        group = row.group
        show(f"  {row.name:<32}{row.measured:>10,.3f}{predicted:>11,.3f}{error:>+8.1%}{row.unscored and f'  not scored: {row.unscored}'}")
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    summary = score().summary
    print("found later")
    later = score(rows=later_rows()).summary
    print(json.dumps({**summary, **{f"later_{name}": value for name, value in later.items()}}))


if __name__ == "__main__":
    main()
