"""Rows A1 to A8 of "Instruction Finetuning": memory, number formats, scaling laws, the models that follow instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal

from ..architectures import count_parameters
from ..errors import MemoryMathError
from ..footprint import Footprint, predict
from ..hardware import gpu_of
from ..number_formats import number_formats
from ..optimizers import STEP_COUNTER_BYTES, Shape, state_bytes
from ..precision import precision_of
from ..scaling_laws import chinchilla, kaplan_optimal_parameters
from ..time_and_cost import training_time
from .rows import Rows, Written

LECTURE = "Instruction Finetuning"
BILLION = 10**9
RULE_OF_THUMB = (("llama-3.2-1b", 3100), ("tinyllama-1.1b", 3390), ("llama-2-7b", 7140), ("smollm2-135m", 825))  # model, one row's tokens
TOKENS_PER_PAIR, EPOCHS, MFU, GPU = 300, 3, 0.35, "A100-80GB"
FINE_TUNED = (  # instruction model, base, pairs and billions of parameters as stated
    ("FLAN-T5-XXL", "t5-v1_1-xxl", "15,000,000", "11"), ("Falcon-40B-Instruct", "falcon-40b", "100,000", "40"),
    ("Llama-2-70B-Chat", "llama-2-70b", "27,500", "70"), ("Dolly", "pythia-12b", "15,000", "12"), ("Alpaca-13B", "llama-13b", "52,000", "13"),
    ("Vicuna-13B", "llama-13b", "70,000", "13"), ("Koala-13B", "llama-13b", "500,000", "13"),
)  # fmt: skip


def a1() -> Rows:
    rows = Rows("A1", LECTURE)
    itemsize = precision_of("fp32").trained
    rows.number("one parameter in 32 bits", "4", itemsize, "bytes", "32 bits are 4 bytes.")
    gib = BILLION * itemsize / 2**30
    rows.number("1B parameters", "4", BILLION * itemsize / 1e9, "GB", f"GB are 1e9 bytes; in GiB, 2**30 bytes, which tools print, it is {gib:.2f}.")
    real = count_parameters("pythia-1b")
    rows.number("1B parameters, of a model with that name", "4", real * itemsize / 1e9, "GB", f"Pythia-1B has {real.total:,}.")
    return rows


def a2() -> Rows:
    rows = Rows("A2", LECTURE)
    model, length = RULE_OF_THUMB[0]
    short, fitting = (_full(model, tokens) for tokens in (2048, length))
    count = short.parameters
    moments = state_bytes("adam", [Shape(1, 1000, 4)]) - STEP_COUNTER_BYTES
    rows.number("weights", "4", short.weights / count, "bytes per parameter", "float32, of Llama-3.2-1B as predicted.")
    rows.number(
        "Adam states", "8", moments / 1000, "bytes per parameter",
        f"Two float32 moments; each tensor's step counter of 4 bytes makes it {short.optimizer_states / count:.8f} for Llama-3.2-1B.",
    )  # fmt: skip
    rows.number("gradients", "4", short.gradients / count, "bytes per parameter", "float32, all of them alive at the optimizer's step.")
    rows.number(
        "activations and temporary memory", "8", _rest(short), "bytes per parameter",
        f"A rule of thumb that depends on the batch: at 1 x 2,048 tokens there are only the optimizer's temporaries; at 1 x {length:,} it holds.",
        assuming=_rest(fitting),
    )  # fmt: skip
    rows.number(
        "all together", "24", short.total / count, "bytes per parameter, so GB for 1B",
        f"16 are exact; the whole is 24 only where activations take 8, for Llama-3.2-1B at 1 x {length:,} tokens.", assuming=fitting.total / count,
    )  # fmt: skip
    for name, tokens in RULE_OF_THUMB:
        rows.number(
            f"activations and temporary memory, {name} at 1 x {tokens:,}", "8", _rest(_full(name, tokens)), "bytes per parameter",
            "Where the rule of thumb holds: float32, AdamW in torch's default form, no checkpointing, fused attention, one row of this length.",
        )  # fmt: skip
    return rows


def _full(model: str, tokens: int) -> Footprint:
    return predict(model, precision="fp32", sequence_length=tokens)


def _rest(footprint: Footprint) -> float:
    """Bytes per parameter beside weights, gradients and Adam's states, which are 16 whenever the peak is."""
    return footprint.total / footprint.parameters - 16


def a3() -> Rows:
    rows = Rows("A3", LECTURE)
    lost = "The slide's figure is lost; ours is for Llama-2-7B."
    for name, quantization in (("16-bit", "none"), ("8-bit", "int8"), ("4-bit", "nf4-dq")):
        found = predict("llama-2-7b", method="inference", precision="bf16", sequence_length=1, quantization=quantization)
        why = f"{lost} Inference: weights only{'' if quantization == 'none' else '; embeddings, norms and the head stay in 16 bit'}."
        rows.unstated(f"{name} weights", found.weights / found.parameters, "bytes per parameter", why)
    half = predict("llama-2-7b", precision="bf16", sequence_length=1)
    states = (half.weights + half.gradients + half.optimizer_states) / half.parameters
    rows.unstated("16-bit training: weights, gradients, Adam", states, "bytes per parameter", f"{lost} Everything in 16 bit, 2 + 2 + 4.")
    masters = predict("llama-2-7b", precision="bf16-mixed", zero_stage=1, sequence_length=1)
    states = (masters.weights + masters.gradients + masters.optimizer_states) / masters.parameters
    why = f"{lost} 2 + 2 and 12 for float32 masters and moments: mixed precision makes activations smaller and weights' bytes no fewer than 16."
    rows.unstated("16-bit training with float32 masters", states, "bytes per parameter", why)
    qlora = predict("llama-2-7b", method="qlora", quantization="nf4-dq", precision="bf16", sequence_length=1)
    states = (qlora.weights + qlora.gradients + qlora.optimizer_states) / qlora.parameters
    why = f"{lost} Not the 4-bit weights are trained but adapters of rank 8 over them (QLoRA)."
    rows.unstated("4-bit training: base, adapters, their Adam", states, "bytes per parameter", why)
    return rows


def a4() -> Rows:
    rows = Rows("A4", LECTURE)
    formats = number_formats(math.pi)
    slide = "3.1415920257568359375"
    exact = Written(formats["fp32"].exact)
    steps = (exact.decimal - Written(slide).decimal) / Decimal(formats["fp32"].spacing or math.nan)
    six = number_formats(3.141592)["fp32"].exact
    rows.number(
        "pi in FP32", slide, exact, "", f"The nearest FP32 to pi is {exact}; the slide's is FP32 of 3.141592, {steps} steps below.",
    )  # fmt: skip
    rows.number("what FP32 makes of 3.141592", slide, Written(six), "", "Where the slide's figure comes from: pi was cut to six decimals first.")
    rows.number("the slide's pi below the nearest FP32", "3", float(steps), "units in the last place", "One unit is 2**-22 here.")
    for name, value, exponent, fraction in (("fp32", "", 8, 23), ("fp16", "3.140625", 5, 10), ("bf16", "3.140625", 8, 7), ("int8", "3", 0, 7)):
        found = formats[name]
        if value:
            rows.number(f"pi in {name.upper()}", value, Written(found.exact), "", f"Stored as {found.bits}; off by {found.absolute_error:.2g}.")
        rows.number(f"{name.upper()}: exponent", str(exponent), found.exponent_bits, "bits", f"{found.stored_bits} bits with the sign.")
        rows.number(
            f"{name.upper()}: fraction",
            str(fraction),
            found.fraction_bits,
            "bits",
            "Of the magnitude, for an integer." if not exponent else "The digits.",
        )
    return rows


def a5() -> Rows:
    rows = Rows("A5", LECTURE)
    for name, quantization in (("INT8", "int8"), ("INT4", "nf4")):
        why = "Integer codes have no gradient: predict refuses method='full' on them."
        rows.words(f"training {name} weights themselves", "not possible", _training(quantization), why)
    full = _training("nf4")
    lora = predict("llama-2-7b", method="qlora", precision="bf16", sequence_length=512)
    rows.words(
        "fine-tuning a model whose weights are 4-bit", "not possible", "possible" if lora.trained else "not possible",
        f"True of the codes themselves; QLoRA trains {lora.trained:,} adapter weights over the frozen 4-bit base and its gradients pass through.",
        assuming=full,
    )  # fmt: skip
    rows.words(
        "running a model whose weights are INT8", "possible",
        "possible" if predict("llama-2-7b", method="inference", precision="bf16", quantization="int8").weights else "not possible",
        "Inference needs no gradient.",
    )  # fmt: skip
    return rows


def _training(quantization: str) -> str:
    """Whether predict accepts training the quantised weights."""
    try:
        predict("llama-2-7b", method="full", quantization=quantization)
    except MemoryMathError:
        return "not possible"
    return "possible"


def a6() -> Rows:
    rows = Rows("A6", LECTURE)
    budget = 5.76e23
    rule, printed, refit = (chinchilla(budget, name) for name in ("rule", "published", "refit"))
    lost = "The slide's content is lost; this is Chinchilla's budget, 5.76e23 operations."
    rows.number("parameters by 20 tokens each", "70", rule.parameters / 1e9, "billion", f"{lost} Stated is what Chinchilla had.")
    rows.number("tokens by 20 each", "1.4", rule.tokens / 1e12, "trillion", f"{lost} Stated is what Chinchilla had.")
    rows.number(
        "tokens per parameter by the paper's printed constants", "20", printed.tokens_per_parameter, "",
        "The constants printed for approach 3 do not give the 20 tokens per parameter of the paper's other methods and its model: they are rounded "
        "too far, and of a fit that stopped early (Besiroglu et al.). The refitted ones give 18.",
    )  # fmt: skip
    rows.number(
        "tokens per parameter by the refitted constants", "20", refit.tokens_per_parameter, "", "Besiroglu et al. fitted the same data again."
    )
    kaplan = kaplan_optimal_parameters(budget) / 1e9
    rows.unstated(
        "parameters by Kaplan's law", kaplan, "billion", "For the same budget, without the embedding: far larger models on far fewer tokens."
    )
    return rows


def a7() -> Rows:
    rows = Rows("A7", LECTURE)
    before = predict("llama-2-7b", precision="fp32", sequence_length=1024)
    after = predict("llama-2-7b", precision="fp32", sequence_length=1024, method="lora", gradient_checkpointing=True)
    gpu = gpu_of(GPU)
    rows.words(
        "what a newcomer meets who trains Llama-2-7B in float32 on one A100", "out of memory", "fits" if before.fits(GPU) else "out of memory",
        f"{before.gib():.0f} GiB at the peak against {gpu.usable_bytes / 2**30:.1f} usable; with LoRA and checkpointing {after.gib():.0f}. "
        "tests/memory_math/test_memory_questions.py holds the advice on what to turn.",
    )  # fmt: skip
    return rows


def a8() -> Rows:
    rows = Rows("A8", LECTURE)
    rows.not_measured("tasks of FLAN (FLAN-T5-XXL and Flan-PaLM)", "A count of the data set; no arithmetic tells it.", stated="1,836", unit="tasks")
    rows.not_measured("preference pairs of Llama-2-70B-Chat", "A count of the data set.", stated="2,900,000", unit="pairs")
    for name, base, pairs, billions in FINE_TUNED:
        count = count_parameters(base)
        if name != "Dolly":  # the slide says Pythia and no size
            rows.number(f"size of {name}", billions, count / 1e9, "billion parameters", f"Counted: {count.total:,}.")
        rows.not_measured(f"pairs that {name} was tuned on", "A count of the data set; the next row computes with it.", stated=pairs, unit="pairs")
        tokens = int(pairs.replace(",", "")) * TOKENS_PER_PAIR * EPOCHS
        run = training_time(base, tokens, gpus=8, gpu=GPU, mfu=MFU)
        why = f"{tokens / 1e6:,.0f} million tokens at {TOKENS_PER_PAIR} a pair and {EPOCHS} epochs; all weights trained, {MFU:.0%} of an A100's peak."
        if base.startswith("t5"):
            why += " An upper bound: a token goes through one half of an encoder-decoder."
        rows.unstated(f"tuning {name} on them", run.gpu_hours, "A100-hours", why)
    rows.not_measured("GPT-3.5 and PaLM", "Their weights are closed: there is no config to count from.")
    rows.number(
        "Alpaca's base", "13", count_parameters("alpaca-7b") / 1e9, "billion parameters",
        "Stanford's Alpaca is Llama-7B, tuned; the other lecture says 7B (row B2), and is right.",
    )  # fmt: skip
    rows.not_measured(
        "prompt formats of these models",
        "Alpaca's form and chat templates are shown by tests/lora_lab/data/test_templates.py. The others are in notebook 07 "
        "of the course.",
    )  # fmt: skip
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (a1, a2, a3, a4, a5, a6, a7, a8)
