"""Rows B7 to B12 of "Lecture 10.5": the tables of what consumes memory, naive and optimized, for Llama-2-70B, and LoRA.

The second table lets gradients vanish by gradient checkpointing. Checkpointing makes activations small, which the tables do not have;
gradients and optimizer states vanish by LoRA. predict shows both, part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..architectures import architecture_of
from ..footprint import Footprint, predict
from ..optimizers import Shape, state_bytes
from ..precision import precision_of
from .lecture_a_use import measured_in
from .lecture_b import GPU, LECTURE, MODEL, SLIDE_PARAMETERS
from .rows import Rows

WINDOW = 4096  # tokens of a row, as the lecture has it (B6)
SKINNY = ["q_proj", "k_proj", "v_proj"]  # the matrices that it adapts


@dataclass(frozen=True)
class _Steps:
    """Training Llama-2-70B in 16 bit, one row of 4,096 tokens."""

    full: Footprint
    checkpointed: Footprint
    lora: Footprint
    both: Footprint


def _steps() -> _Steps:
    def step(method: str, checkpointing: bool) -> Footprint:
        return predict(
            MODEL, method=method, precision="bf16", sequence_length=WINDOW, gradient_checkpointing=checkpointing, target_modules=SKINNY,
        )  # fmt: skip

    return _Steps(step("full", False), step("full", True), step("lora", False), step("lora", True))


def b7() -> Rows:
    rows = Rows("B7", LECTURE)
    step = predict(MODEL, precision="bf16", sequence_length=1)
    count, half = step.parameters, precision_of("bf16").trained
    momentum = state_bytes("momentum", [Shape(1, count, half)])
    rows.number("parameters", "140", step.weights / 1e9, "GB", f"{count:,} x 2 bytes.")
    rows.number("gradients", "140", step.gradients / 1e9, "GB", f"{count:,} x 2 bytes.")
    rows.number("optimizer states, least", "140", momentum / 1e9, "GB", "SGD with momentum in 16 bit: as much as the weights.")
    rows.number("optimizer states, least, in weights", "1", momentum / step.weights, "x the weights", "One 16-bit momentum.")
    most = state_bytes("adamw", [Shape(1, count, 4)])
    slide = state_bytes("adamw", [Shape(1, SLIDE_PARAMETERS, 4)])
    rows.number("optimizer states, most", "560", most / 1e9, "GB", "Adam's two moments in 32 bit; 560 is of 70e9 parameters.", assuming=slide / 1e9)
    rows.number("optimizer states, most, in weights", "4", most / step.weights, "x the weights", "Adam's two moments in 32 bit, over 16-bit weights.")
    least = state_bytes("momentum", [Shape(1, SLIDE_PARAMETERS, half)])
    for stated, ours, theirs in (("420", momentum, least), ("840", most, slide)):
        total, whole = (step.weights + step.gradients + ours) / 1e9, (2 * SLIDE_PARAMETERS * half + theirs) / 1e9
        rows.number(f"total {stated}", stated, total, "GB", "With 70e9 parameters; activations are in none of the slide's lines.", assuming=whole)
    return rows


def b7b() -> Rows:
    rows = Rows("B7b", LECTURE)
    one, two = (predict(MODEL, precision="bf16", sequence_length=WINDOW, batch_size=batch) for batch in (1, 2))
    neurons = one.saved_bytes / precision_of("bf16").compute / WINDOW
    rows.number(
        "neurons per parameter", "1", neurons / one.parameters, "",
        f"Gradients count parameters, {one.parameters:,}; neurons are activations, about {neurons / 1e6:.1f} million numbers kept for a token. "
        "They are two things, and the slide takes one for the other.",
    )  # fmt: skip
    rows.number("gradients", "140", one.gradients / 1e9, "GB", "One number per parameter, in 16 bit.")
    rows.number("gradients of two rows, in those of one", "1", two.gradients / one.gradients, "x", "Gradients do not grow with the batch ...")
    rows.number("activations of two rows, in those of one", "2", two.saved_bytes / one.saved_bytes, "x", "... and activations do.")
    codes = state_bytes("adamw8bit", [Shape(tensor.rows, tensor.columns, 2) for tensor in architecture_of(MODEL).tensors()])
    rows.number("optimizer states, #params x 1 byte x 2", "140", codes / 1e9, "GB", "Adam in 8 bit, with a scale for every 256.")
    moments = state_bytes("adamw", [Shape(1, one.parameters, 4)])
    slide = state_bytes("adamw", [Shape(1, SLIDE_PARAMETERS, 4)])
    rows.number(
        "optimizer states, #params x 4 bytes x 2", "560", moments / 1e9, "GB", "Adam in 32 bit; 560 is of 70e9 parameters.", assuming=slide / 1e9
    )
    return rows


def b8() -> Rows:
    rows = Rows("B8", LECTURE)
    found, window = _steps(), f"one row of {WINDOW:,} tokens"
    rows.number("parameters", "140", found.both.weights / 1e9, "GB", "In 16 bit; frozen or not, all of them are there.")
    rows.number(
        "gradients, by gradient checkpointing", "0", found.checkpointed.gradients / 1e9, "GB",
        f"Checkpointing does not touch gradients. It makes activations small: {found.full.saved_bytes / 1e9:.0f} GB kept for {window} without it, "
        f"{found.checkpointed.saved_bytes / 1e9:.1f} with it.",
    )  # fmt: skip
    trained = found.both.trained * precision_of("fp32").trained
    rows.number("gradients, by LoRA", "0", trained / 1e9, "GB", f"Only {found.both.trained:,} adapter weights have gradients.")
    rows.number("optimizer states, by LoRA", "0", found.both.optimizer_states / 1e9, "GB", "Two moments for each adapter weight, in 32 bit.")
    kept = {name: step.saved_bytes / 1e9 for name, step in (("without", found.lora), ("with", found.both))}
    rows.unstated("activations under LoRA, without checkpointing", kept["without"], "GB", f"For {window}: LoRA alone leaves nearly all of them.")
    rows.unstated("activations under LoRA, with checkpointing", kept["with"], "GB", f"For {window}: each block keeps its input.")
    static = found.both.weights + trained + found.both.optimizer_states
    rows.number(
        "total", "140", found.both.total / 1e9, "GB",
        f"Weights, gradients and states alone are {static / 1e9:.1f}; a checkpointed step of {window} needs more.",
        assuming=static / 1e9,
    )  # fmt: skip
    rows.number("GPUs for Llama-2-70B", "2", found.both.gpus_needed(GPU), "GPUs", f"LoRA with checkpointing, {window}, if it divided evenly.")
    for name in ("llama-2-7b", "llama-2-13b"):
        step = predict(name, method="lora", precision="bf16", sequence_length=WINDOW, gradient_checkpointing=True, target_modules=SKINNY)
        rows.number(f"GPUs for {name}", "1", step.gpus_needed(GPU), "GPUs", f"{step.gib():.1f} GiB at the peak.")
    return rows


def b9() -> Rows:
    rows = Rows("B9", LECTURE)
    shape = architecture_of(MODEL)
    key = next(layer for layer in shape.linears() if layer.name.endswith("k_proj"))
    query = next(layer for layer in shape.linears() if layer.name.endswith("q_proj"))
    rows.number("rows of A^K", "8096", key.inputs, "", f"The hidden size is {shape.hidden:,}, not 8096.")
    why = f"K has {shape.kv_heads} heads of {shape.head_dim} (grouped queries), so A^K is {key.inputs:,} x {key.outputs:,}."
    rows.number("columns of A^K", "8096", key.outputs, "", why)
    rows.number("8096 x 8096", "64", 8096 * 8096 / 1e6, "million parameters", "Of the slide's own sizes: 65.5 million, not 64.")
    rows.number("parameters of A^K", "64", key.weights / 1e6, "million parameters", f"{key.inputs:,} x {key.outputs:,} = {key.weights:,}.")
    rows.number("hidden size", "8,192", shape.hidden, "", "Of the model's config.")
    rows.number("key/value heads", "8", shape.kv_heads, "", "Of the model's config.")
    rows.number("size of a head", "128", shape.head_dim, "", "8,192 / 64 heads.")
    rows.number("A^K as it is", "8.4", key.weights / 1e6, "million parameters", "8,192 x 1,024.")
    rows.number("8096 x 8096, to one decimal", "65.5", 8096**2 / 1e6, "million", "65,545,216.")
    rows.number("A^Q", "67.1", query.weights / 1e6, "million parameters", "8,192 x 8,192; of A^Q, the slide's figure would have been nearly right.")
    rows.number("self-attention layers", "80", shape.layers, "", "One A^K in each.")
    return rows


def b10() -> Rows:
    rows = Rows("B10", LECTURE)
    rows.not_measured("the change of the weights is small and can be forced to low rank", measured_in("02"))
    return rows


def b11() -> Rows:
    rows = Rows("B11", LECTURE)
    rows.not_measured("freeze all base model parameters", "Shown by tests/lora_lab/training/test_precision.py: the base stays bit for bit.")
    rows.not_measured("the update starts at zero", "Shown by tests/lora_lab/test_injection.py and tests/real/test_demo_quick.py: no output changes.")
    rows.not_measured("SGD on the two skinny matrices", "Shown by tests/lora_lab/training/test_optimizers.py and tests/lora_lab/test_layers.py.")
    return rows


def b12() -> Rows:
    rows = Rows("B12", LECTURE)
    rows.not_measured("the effort-benefit curve of adaptation depends on the size of the base model", measured_in("08"))
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (b7, b7b, b8, b9, b10, b11, b12)
