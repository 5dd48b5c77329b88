"""Rows A9 to A23 of "Instruction Finetuning": fine-tuning for a use case, LoRA, prompt tuning, and what each option costs.

What only a measurement can show is here without a number of ours; the reason names the test or the notebook of the course that shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..architectures import LinearLayer, architecture_of, count_parameters
from ..footprint import predict
from ..hardware import LECTURE as PRICE
from ..in_context import in_context
from ..precision import ADAPTER_BYTES, precision_of
from ..time_and_cost import TrainingTime, training_flops, training_time
from .lecture_a import EPOCHS, GPU, LECTURE, MFU, TOKENS_PER_PAIR
from .rows import Rows
from .sizes import lora_elements, lora_parameters, prompt_parameters

ATTENTION = "attention"


def measured_in(notebook: str) -> str:
    """notebook: its number in the course."""
    return f"A measurement, made in notebook {notebook} of the course."


def a9() -> Rows:
    rows = Rows("A9", LECTURE)
    rows.not_measured("tuning on one task raises it and can lower others (catastrophic forgetting)", measured_in("05"))
    return rows


def a10() -> Rows:
    rows = Rows("A10", LECTURE)
    model = "llama-2-70b-chat"
    asked = in_context(
        model, shots=5, tokens_per_shot=300, question_tokens=200, answer_tokens=100, gpu=GPU, gpus=4, mfu=0.4,
        price=PRICE, tuning_tokens=1000 * TOKENS_PER_PAIR * EPOCHS,
    )  # fmt: skip
    few, tuned, shape = asked.few_shot, asked.tuned, architecture_of(model)
    assert few.prefill_seconds and tuned.prefill_seconds and few.window_share and tuned.window_share
    sizes = "5 examples of 300 tokens, a question of 200, an answer of 100"
    rows.number("context window of Llama-2-70B-Chat", "4,096", asked.context_window or 0, "tokens", "Of the model's config.")
    rows.number("its blocks", "80", shape.layers, "", "Of the model's config.")
    rows.number("its key/value heads", "8", shape.kv_heads, "", "An eighth of its 64 query heads.")
    per_token = few.kv_cache_bytes // (few.prompt_tokens + few.answer_tokens)
    rows.unstated("keys and values of one token", per_token, "bytes", "2 x 80 blocks x 8 heads x 128 x 2 bytes, in 16 bit.")
    more = "take up" if few.window_share > tuned.window_share else "do not take up"
    why = f"{few.window_share:.0%} of it against {tuned.window_share:.0%} ({sizes}); {asked.largest_shots} such examples leave no room for more."
    rows.words("examples and the context window", "take up", more, why)
    slower = "slower" if few.prefill_seconds > tuned.prefill_seconds else "not slower"
    why = f"Reading the prompt takes {few.prefill_seconds / tuned.prefill_seconds:.1f} times as long on four A100 ({sizes}, 40 % of the peak)."
    rows.words("larger prompts make inference", "slower", slower, why)
    why = f"Requests after which tuning on 1,000 examples has cost no more than the examples in every prompt ({sizes})."
    rows.unstated("break-even of a tuned model", asked.break_even_requests or 0, "requests", why)
    rows.not_measured("prefill time and cost per request on a small model", measured_in("08"))
    return rows


def a11() -> Rows:
    rows = Rows("A11", LECTURE)
    rows.not_measured("in-context learning may not work for smaller models", measured_in("08"))
    return rows


def a12() -> Rows:
    rows = Rows("A12", LECTURE)
    trained = predict("llama-2-7b", sequence_length=1).trained
    rows.number("parameters updated", "7", trained / 1e9, "billion", f"Full fine-tuning of Llama-2-7B trains all {trained:,}.")
    rows.not_measured("500 examples are enough for a task", measured_in("05"), stated="500", unit="examples")
    rows.not_measured("1,000 examples are enough for a task", measured_in("05"), stated="1,000", unit="examples")
    rows.not_measured("the loss is cross-entropy, over labelled tokens", "Shown by tests/lora_lab/training/test_fit.py.")
    rows.not_measured("overfitting, and hyper-parameters that are hard to find", measured_in("05"))
    return rows


def a13() -> Rows:
    rows = Rows("A13", LECTURE)
    model, half = "llama-2-7b", precision_of("bf16").trained
    full = count_parameters(model) * half
    lora, prompt = lora_parameters(model, 8, ATTENTION) * ADAPTER_BYTES, prompt_parameters(model, 20) * ADAPTER_BYTES
    rows.unstated(
        "a file per task, full fine-tuning", full / 1e6, "MB", "A whole copy of Llama-2-7B in 16 bit: the inefficiency that the slide names."
    )
    rows.unstated("a file per task, LoRA", lora / 1e6, "MB", "Rank 8 on q, k, v and o of Llama-2-7B, in float32.")
    rows.unstated("a file per task, prompt tuning", prompt / 1e6, "MB", "20 tokens for Llama-2-7B, in float32.")
    ratio = training_flops(model, 1, method="lora").model / training_flops(model, 1).model
    why = "4ND instead of 6ND: the weights' gradients are saved, the passes are not. Memory is where the difference is."
    rows.words("PEFT's compute", "less", "less" if ratio < 1 else "no less", f"{ratio:.2f} of full fine-tuning: {why}")
    rows.not_measured("frozen weights stay what they were", "Shown bit for bit by tests/lora_lab/training/test_precision.py.")
    rows.not_measured("less prone to forgetting", measured_in("05"))
    return rows


def a14() -> Rows:
    rows = Rows("A14", LECTURE)
    rows.not_measured("freeze, inject two matrices", "Shown by tests/lora_lab/test_injection.py and tests/lora_lab/test_layers.py.")
    rows.not_measured("train the weights of the smaller matrices only", "Shown by tests/lora_lab/test_layers.py: nothing else receives a gradient.")
    layer, rank = LinearLayer("w", 512, 64), 8
    update = LinearLayer("A", layer.inputs, rank), LinearLayer("B", rank, layer.outputs)
    product = f"{update[0].inputs} x {update[1].outputs}"
    why = "In the layers here it is B A, with A [r, in] and B [out, r]; the slide's A x B is the same for rows times matrices."
    rows.words("shape of the product that is added to a 512 x 64 weight", "512 x 64", product, why)
    rows.not_measured("merged for inference, the model computes the same", "Shown by tests/lora_lab/test_merging.py.")
    return rows


def a15() -> Rows:
    rows = Rows("A15", LECTURE)
    layer, rank = LinearLayer("w", 512, 64), 8
    count = lora_elements([layer], rank)
    saved = 100 * (1 - count / layer.weights)
    rows.number("weights of a 512 x 64 layer", "32,768", layer.weights, "parameters", "512 x 64.")
    rows.number("A", "4,096", LinearLayer("A", layer.inputs, rank).weights, "parameters", "512 x 8.")
    rows.number("B", "512", LinearLayer("B", rank, layer.outputs).weights, "parameters", "8 x 64.")
    rows.number("both", "4,608", count, "parameters", "The sum, which the slide leaves out.")
    rows.number("fewer parameters", "86", saved, "%", "1 - 4,608 / 32,768.")
    rows.number("fewer parameters, to one decimal", "85.9", saved, "%", "1 - 4,608 / 32,768.")
    return rows


def a16() -> Rows:
    rows = Rows("A16", LECTURE)
    rows.not_measured("other matrices for each task on one base", "Shown by tests/lora_lab/test_injection.py: adapters side by side, one active.")
    rows.not_measured(
        "swap them before inference", "Shown by tests/lora_lab/test_checkpoint.py (load, replace) and tests/lora_lab/test_injection.py."
    )
    return rows


def a17() -> Rows:
    rows = Rows("A17", LECTURE)
    model = "t5-v1_1-xxl"
    prompt, count = prompt_parameters(model, 5), count_parameters(model)
    rows.number("parameters of a prompt of 5 tokens for T5-XXL", "20,480", prompt, "parameters", "5 x 4,096.")
    rows.number("parameters of T5-XXL", "11", count / 1e9, "billion", f"T5 1.1 XXL, which the paper adapts, has {count.total:,}.")
    orders = math.log10(count / prompt)
    rows.number(
        "whole orders of magnitude between them", "5", math.floor(orders), "orders", f"A factor of {count / prompt:,.0f}, {orders:.2f} orders."
    )
    rows.not_measured("a batch of mixed tasks on one frozen model", "Shown by tests/prompt_tuning_lab/test_mixed_tasks.py: as alone.")
    return rows


def a18() -> Rows:
    rows = Rows("A18", LECTURE)
    rows.not_measured("prompt tuning reaches model tuning as size grows, and beats prompt design", measured_in("08"))
    rows.not_measured("mean and standard deviation of 3 runs", measured_in("08"), stated="3", unit="runs")
    layers = architecture_of("smollm2-135m").layers
    rows.number("blocks of the uncut SmolLM2-135M", "30", layers, "", "The sizes compared here are this model cut to 10, 20 and 30 blocks.")
    return rows


def a19() -> Rows:
    rows = Rows("A19", LECTURE)
    rows.not_measured("start from an instruction model", "Notebook 08 of the course says why it is not: our model's base is not in the repository.")
    rows.not_measured("prefer PEFT to full fine-tuning", measured_in("08"))
    rows.not_measured("quality of data beats quantity", measured_in("07"))
    return rows


def a20() -> Rows:
    rows = Rows("A20", LECTURE)
    for task, notebook in (("sentiment analysis as text classification", "05"), ("dialogue summarisation", "06"), ("training Alpaca or Dolly", "07")):
        rows.not_measured(task, measured_in(notebook))
    return rows


def a21() -> Rows:
    rows = Rows("A21", LECTURE)
    rows.not_measured("instruction tuning on many tasks from a base model", measured_in("07"))
    return rows


def a22() -> Rows:
    rows = Rows("A22", LECTURE)
    rows.not_measured("models that imitate copy the style and not the substance", measured_in("07"))
    return rows


def a23() -> Rows:
    rows = Rows("A23", LECTURE)
    few = _run("falcon-40b", 1_000 * TOKENS_PER_PAIR * EPOCHS, "lora")
    many = _run("falcon-40b", 50_000 * TOKENS_PER_PAIR * EPOCHS, "full")
    scratch = training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=2e12 / (1_720_320 * 3600), price=PRICE)
    how = f"{TOKENS_PER_PAIR} tokens an example, {EPOCHS} epochs, {MFU:.0%} of an A100's peak, ${PRICE.dollars_per_hour:g} an hour"
    rows.not_measured("labelled examples for PEFT, at least", measured_in("05"), stated="100", unit="examples")
    rows.not_measured("labelled examples for PEFT, at most", measured_in("05"), stated="1,000", unit="examples")
    rows.not_measured("labelled examples for instruction tuning", "A judgement; notebook 08 of the course, the decision guide, has it as stated.",
                      stated="50,000", unit="examples")  # fmt: skip
    rows.unstated("PEFT over Falcon-40B on 1,000 examples", few.dollars or 0.0, "dollars", f"LoRA: {how}.")
    rows.unstated("instruction tuning Falcon-40B on 50,000 examples", many.dollars or 0.0, "dollars", f"All weights: {how}.")
    rows.unstated("pre-training a model of 70B", scratch.dollars or 0.0, "dollars", "Llama-2-70B's published 1,720,320 GPU-hours at the same price.")
    costs = {"PEFT": few.dollars or 0.0, "instruction tuning": many.dollars or 0.0, "pre-training": scratch.dollars or 0.0}
    why = "By the dollars of the three rows above."
    rows.words("from low to very high cost", "PEFT, instruction tuning, pre-training", ", ".join(sorted(costs, key=costs.__getitem__)), why)
    rows.not_measured("accuracy, privacy, customisation, skills", "Judgements; notebook 08 of the course, the decision guide, has them as stated.")
    return rows


def _run(model: str, tokens: int, method: str) -> TrainingTime:
    return training_time(model, tokens, gpus=8, gpu=GPU, mfu=MFU, price=PRICE, method=method)


SECTIONS: tuple[Callable[[], Rows], ...] = (a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23)
