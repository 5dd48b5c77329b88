"""Rows B4's multiplier, B7, B7b and B8 of "Lecture 10.5": the tables of what consumes memory, naive and optimized, for Llama-2-70B.

The second table lets gradients vanish by gradient checkpointing. Checkpointing makes activations small, which the tables do not have;
gradients and optimizer states vanish by LoRA. predict shows both, part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..architectures import count_parameters
from ..footprint import Footprint, predict
from ..optimizers import Shape, state_bytes
from ..precision import precision_of
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
            optimizer_implementation="fused",
        )  # fmt: skip

    return _Steps(step("full", False), step("full", True), step("lora", False), step("lora", True))


def b4_multiplier() -> Rows:
    rows = Rows("B4m", LECTURE)
    count, half = count_parameters(MODEL), precision_of("fp16").trained
    weights = count * half
    moments = state_bytes("adamw", [Shape(1, count.total, 4)])
    masters = state_bytes("adamw", [Shape(1, count.total, half)], masters=True)
    momentum = state_bytes("momentum", [Shape(1, count.total, half)])
    rows.number("lowest multiplier", "3", (2 * weights + momentum) / weights, "x the weights", "Weights, gradients, and one momentum, all in 16 bit.")
    rows.number(
        "highest multiplier", "6", (2 * weights + masters) / weights, "x the weights",
        "6 is 16-bit weights and gradients with Adam's moments in 32 bit; the usual mixed precision has 32-bit masters too, and is 8.",
        assuming=(2 * weights + moments) / weights,
    )  # fmt: skip
    return rows


def b7() -> Rows:
    rows = Rows("B7", LECTURE)
    step = predict(MODEL, precision="bf16", sequence_length=1, optimizer="momentum")
    count = step.parameters
    rows.number("parameters", "140", step.weights / 1e9, "GB", f"{count:,} x 2 bytes.")
    rows.number("gradients", "140", step.gradients / 1e9, "GB", f"{count:,} x 2 bytes.")
    rows.number("optimizer states, least", "140", step.optimizer_states / 1e9, "GB", "SGD with momentum in 16 bit: as much as the weights.")
    rows.number("optimizer states, least, in weights", "1", step.optimizer_states / step.weights, "x the weights", "One 16-bit momentum.")
    most = state_bytes("adamw", [Shape(1, count, 4)])
    slide = state_bytes("adamw", [Shape(1, SLIDE_PARAMETERS, 4)])
    rows.number("optimizer states, most", "560", most / 1e9, "GB", "Adam's two moments in 32 bit; 560 is of 70e9 parameters.", assuming=slide / 1e9)
    rows.number("optimizer states, most, in weights", "4", most / step.weights, "x the weights", "Adam's two moments in 32 bit, over 16-bit weights.")
    half = precision_of("bf16").trained
    least = state_bytes("momentum", [Shape(1, SLIDE_PARAMETERS, half)])
    for stated, ours, theirs in (("420", step.optimizer_states, least), ("840", most, slide)):
        total, whole = (step.weights + step.gradients + ours) / 1e9, (2 * SLIDE_PARAMETERS * half + theirs) / 1e9
        rows.number(f"total {stated}", stated, total, "GB", "With 70e9 parameters; activations are in none of the slide's lines.", assuming=whole)
    return rows


def b7b() -> Rows:
    rows = Rows("B7b", LECTURE)
    one, two = (predict(MODEL, precision="bf16", sequence_length=WINDOW, batch_size=batch, optimizer="adamw8bit") for batch in (1, 2))
    neurons = one.saved_bytes / precision_of("bf16").compute / WINDOW
    rows.number(
        "neurons per parameter", "1", neurons / one.parameters, "",
        f"Gradients count parameters, {one.parameters:,}; neurons are activations, about {neurons / 1e6:.1f} million numbers kept for a token. "
        "They are two things, and the slide takes one for the other.",
    )  # fmt: skip
    rows.number("gradients", "140", one.gradients / 1e9, "GB", "One number per parameter in 16 bit, whatever the batch.")
    rows.number("gradients of two rows, in those of one", "1", two.gradients / one.gradients, "x", "Gradients do not grow with the batch ...")
    rows.number("activations of two rows, in those of one", "2", two.saved_bytes / one.saved_bytes, "x", "... and activations do.")
    rows.number("optimizer states, #params x 1 byte x 2", "140", one.optimizer_states / 1e9, "GB", "Adam in 8 bit, with a scale for every 256.")
    moments = state_bytes("adamw", [Shape(1, one.parameters, 4)])
    slide = state_bytes("adamw", [Shape(1, SLIDE_PARAMETERS, 4)])
    rows.number("optimizer states, #params x 4 bytes x 2", "560", moments / 1e9, "GB", "Adam in 32 bit; 560 is of 70e9 parameters.", assuming=slide / 1e9)
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
        f"Weights, gradients and states alone are {static / 1e9:.1f}; with what a checkpointed step of {window} needs it is {found.both.total / 1e9:.1f}.",
        assuming=static / 1e9,
    )  # fmt: skip
    rows.number("GPUs for Llama-2-70B", "2", found.both.gpus_needed(GPU), "GPUs", f"LoRA with checkpointing, {window}, if it divided evenly.")
    for name in ("llama-2-7b", "llama-2-13b"):
        step = predict(name, method="lora", precision="bf16", sequence_length=WINDOW, gradient_checkpointing=True, target_modules=SKINNY)
        rows.number(f"GPUs for {name}", "1", step.gpus_needed(GPU), "GPUs", f"{step.gib():.1f} GiB at the peak.")
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (b4_multiplier, b7, b7b, b8)
