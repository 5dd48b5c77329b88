"""Bytes and laws in print: bits per parameter, optimizers' states, ZeRO's table 1, key/value caches, activations, scaling laws."""

from __future__ import annotations

from collections.abc import Callable

from ..architectures import architecture_of, count_parameters
from ..footprint import predict
from ..hardware import CUBLAS_BYTES, CUBLAS_HOPPER_BYTES
from ..in_context import kv_cache_bytes
from ..optimizers import Shape, state_bytes
from ..precision import precision_of
from ..presets import PRESETS
from ..quantization import quantized_bytes
from ..scaling_laws import chinchilla, hoffmann_table_3, loss
from ..time_and_cost import training_flops
from .counts import TINY_LLAMA_OF_ANSWER_AI
from .rows import Rows
from .sizes import quantized_linear_bytes, zero_states_bytes

MATRIX = (4096, 4096)
STATES = (("sgd", "0"), ("momentum", "4"), ("adam", "8"), ("adamw", "8"), ("lion", "4"))
ZERO_SIZES = ((7_500_000_000, "7.5B"), (128_000_000_000, "128B"), (1_000_000_000_000, "1T"))
ZERO_TABLE = {  # devices -> GB in stages 1, 2, 3 for each size, as printed
    1: ("120", "120", "120", "2048", "2048", "2048", "16000", "16000", "16000"),
    4: ("52.5", "41.3", "30", "896", "704", "512", "7000", "5500", "4000"),
    16: ("35.6", "21.6", "7.5", "608", "368", "128", "4750", "2875", "1000"),
    64: ("31.4", "16.6", "1.88", "536", "284", "32", "4187", "2218", "250"),
    256: ("30.4", "15.4", "0.47", "518", "263", "8", "4046", "2054", "62.5"),
    1024: ("30.1", "15.1", "0.12", "513", "257", "2", "4011", "2013", "15.6"),
}
CACHES = (  # Hugging Face's Llama 3.1 post: preset, GiB in 16 bit at 1,024, 16,000 and 128,000 tokens
    ("llama-3.1-8b", ("0.125", "1.95", "15.62")), ("llama-3.1-70b", ("0.313", "4.88", "39.06")), ("llama-3.1-405b", ("0.984", "15.38", "123.05")),
)  # fmt: skip
OPTIMA = (  # at 5.76e23 operations: constants, billions of parameters, trillions of tokens, their ratio, the loss
    ("published", "32.19", "2.982", "92.6", "1.9307"), ("published-unrounded", "40.31", "2.382", "59.1", None),
    ("refit", "72.25", "1.329", "18.4", "1.9744"),
)  # fmt: skip
TABLE_3 = "arXiv:2203.15556, table 3"


def quantised() -> Rows:
    rows = Rows("QLoRA", "arXiv:2305.14314, sections 2 and 3; arXiv:2110.02861")
    weights = MATRIX[0] * MATRIX[1]
    bits = {name: quantized_bytes(name, *MATRIX) * 8 / weights for name in ("nf4", "nf4-dq")}
    rows.number("NF4, blocks of 64", "4.5", bits["nf4"], "bits per parameter", "4 + 32 / 64; here with the table of levels, for 4,096 x 4,096.")
    rows.number("NF4 with double quantisation", "4.127", bits["nf4-dq"], "bits per parameter", "4 + 8 / 64 + 32 / (64 x 256), and the tables.")
    rows.number("of these, constants", "0.127", bits["nf4-dq"] - 4, "bits per parameter", "8 / 64 + 32 / (64 x 256).")
    rows.number("double quantisation saves", "0.373", bits["nf4"] - bits["nf4-dq"], "bits per parameter", "0.5 - 0.127.")
    linear = sum(layer.weights for layer in architecture_of("llama-2-7b").linears())
    packed, rest = quantized_linear_bytes("llama-2-7b", "nf4-dq"), 2 * (count_parameters("llama-2-7b") - linear)
    rows.number("Llama-2-7B: weights in linear layers", "6.476", linear / 1e9, "billion", "All but embedding, head and norms.")
    rows.number("their bytes with double quantisation", "3.34", packed / 1e9, "GB", "4.127 bits each.")
    rows.number("what stays in 16 bit", "0.525", rest / 1e9, "GB", "Embedding, head and norms.")
    rows.number("both", "3.87", (packed + rest) / 1e9, "GB", "What a 4-bit Llama-2-7B weighs.")
    full = count_parameters("llama-65b")
    states = 4 * full + state_bytes("adamw", [Shape(1, full.total, 4)])
    rows.number("16-bit fine-tuning of LLaMA-65B, more than", "780", states / 1e9, "GB", "2 + 2 bytes, and Adam's 8: activations come on top.")
    step = predict("llama-65b", method="qlora", quantization="nf4-dq", precision="bf16", rank=64, sequence_length=512, gradient_checkpointing=True,
                   optimizer="adamw8bit")  # fmt: skip
    fits = "fits" if step.total < 48e9 else "does not fit"
    rows.words("QLoRA of LLaMA-65B in 48 GB", "fits", fits, f"{step.total / 1e9:.1f} GB, for rank 64 on all linear layers and one row of 512 tokens.")
    states_8bit = state_bytes("adamw8bit", [Shape(*MATRIX, 4)]) / weights
    rows.number("8-bit Adam", "2.031", states_8bit, "bytes per parameter", "2 + 2 x 4 / 256, and two tables of codes for each tensor.")
    return rows


def optimizers() -> Rows:
    rows = Rows("Optim", "states in float32, as torch.optim and the papers define them")
    for name, stated in STATES:
        found = state_bytes(name, [Shape(*MATRIX, 4)]) / (MATRIX[0] * MATRIX[1])
        rows.number(f"states of {name}", stated, found, "bytes per parameter", "Of a 4,096 x 4,096 matrix, the step's counter included.")
    rows.number(
        "sums that Adafactor keeps of a 4,096 x 4,096 matrix", "8,192", state_bytes("adafactor", [Shape(*MATRIX, 4)]) // 4 - 1, "numbers",
        "Rows and columns instead of the matrix.",
    )  # fmt: skip
    rows.number("cuBLAS workspace on A100", "8,519,680", CUBLAS_BYTES, "bytes", "2 x 4,096 KiB + 8 x 16 KiB; counted in what torch allocates.")
    rows.number("cuBLAS workspace on H100", "32", CUBLAS_HOPPER_BYTES / 2**20, "MiB", "Counted in what torch allocates.")
    return rows


def lomo() -> Rows:
    rows = Rows("LOMO", "arXiv:2306.09782, table 1: LLaMA-7B in mixed precision")
    count, half = count_parameters("llama-7b"), precision_of("fp16").trained
    rows.number("parameters", "12.55", count * half / 2**30, "GiB", "16 bit.")
    rows.number("gradients", "12.55", count * half / 2**30, "GiB", "16 bit.")
    states = state_bytes("adamw", [Shape(1, count.total, half)], masters=True)
    rows.number("AdamW's states", "75.31", states / 2**30, "GiB", "A 32-bit master and two 32-bit moments for each.")
    largest = max(tensor.numel for tensor in architecture_of("llama-7b").tensors()) * half
    rows.number("gradients where each is used at once", "0.24", largest / 2**30, "GiB", "Of the largest tensor only, the embedding.")
    return rows


def zero() -> Rows:
    rows = Rows("ZeRO", "arXiv:1910.02054, table 1")
    for devices, cells in ZERO_TABLE.items():
        for at, stated in enumerate(cells):
            (parameters, name), stage = ZERO_SIZES[at // 3], at % 3 + 1
            found = zero_states_bytes(parameters, stage, devices) / 1e9
            why = "2 + 2 + 12 bytes per parameter; stage 1 divides the 12, stage 2 a 2 as well, stage 3 all."
            rows.number(f"{name}, stage {stage}, {devices:,} devices", stated, found, "GB", why)
    return rows


def caches() -> Rows:
    rows = Rows("KV", "huggingface.co/blog/llama31")
    old = {**PRESETS["llama-3.1-405b"], "num_key_value_heads": 16}
    for model, sizes in CACHES:
        for tokens, stated in zip((1024, 16_000, 128_000), sizes, strict=True):
            found = kv_cache_bytes(model, tokens) / 2**30
            large = model.endswith("405b")
            why = "2 x blocks x key/value heads x 128 x 2 bytes a token."
            if large:
                why = "The post is of a config with 16 key/value heads; the model as it is now has 8, so half of it."
            rows.number(
                f"{model}, {tokens:,} tokens", stated, found, "GiB", why, assuming=kv_cache_bytes(old, tokens) / 2**30 if large else None,
            )  # fmt: skip
    shape, tokens = TINY_LLAMA_OF_ANSWER_AI, 1024
    more, less = (predict({**shape, "num_hidden_layers": layers}, precision="bf16", sequence_length=tokens).saved_bytes for layers in (24, 23))
    width = tokens * architecture_of(shape).hidden
    why = "What one more block keeps for backward, by token and by width: 16h + 2(q + k + v + o) + 8f + 4a + 8 at this shape."
    rows.number("kept by one block of answer.ai's Llama in bf16", "40.035", (more - less) / width, "bytes per token and width", why)
    return rows


def laws() -> Rows:
    rows = Rows("Scale", "arXiv:2203.15556 (Chinchilla) and arXiv:2404.10102 (refit)")
    for name, size, tokens, ratio, lowest in OPTIMA:
        best = chinchilla(5.76e23, name)
        rows.number(f"optimal parameters, {name} constants", size, best.parameters / 1e9, "billion", "At 5.76e23 operations.")
        rows.number(f"optimal tokens, {name} constants", tokens, best.tokens / 1e12, "trillion", "At 5.76e23 operations.")
        rows.number(f"tokens per parameter, {name} constants", ratio, best.tokens_per_parameter, "", "At 5.76e23 operations.")
        if lowest is not None:
            rows.number(f"loss there, {name} constants", lowest, best.loss or 0.0, "nats", "The law's own loss, at its own optimum.")
    for name, stated in (("published", "1.9366"), ("refit", "1.9739")):
        rows.number(f"loss of 70B on 1.4T tokens, {name} constants", stated, loss(70e9, 1.4e12, name), "nats", "Chinchilla's size and data.")
    for row in hoffmann_table_3():
        found = training_flops(row.parameters, row.tokens).model
        unit = 1e12 if row.tokens >= 1e12 else 1e9  # the tokens are printed to one decimal of these
        ends = [training_flops(row.parameters, row.tokens + half * unit).model for half in (-0.05, 0.05)]
        why = "6ND of the row's own N and D, the rounding of D allowed."
        if abs(row.six_n_d - 1) > 0.03:
            why = f"6ND of the row's own N and D is {row.six_n_d - 1:.1%} more: they are two fits, whose product need not be the budget."
        rows.number(f"operations for {row.parameters / 1e9:g}B parameters", f"{row.flops:.2e}", found, "operations", why, spread=ends, where=TABLE_3)
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (quantised, optimizers, lomo, zero, caches, laws)
