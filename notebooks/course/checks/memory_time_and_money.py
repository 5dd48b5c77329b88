"""The exercises of notebook 01, memory, time and money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import memory_math

from . import NotYet, check, equal, expect, number, refuse, result


def pair(value: Any, what: str) -> tuple[float, float]:
    """Two numbers. Raises NotYet for anything else; what: their names."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise NotYet(f"expected two numbers: return {what}")
    return number(value[0], "the first number"), number(value[1], "the second number")


def each(found: tuple[float, float], mistakes: Mapping[tuple[float, float], str]) -> None:
    """Raise NotYet with the words of the wrong pair that this is."""
    for wrong, words in mistakes.items():
        expect(not (equal(found[0], wrong[0], 1e-3) and equal(found[1], wrong[1], 1e-3)), words)


# 1 and 2: bytes -------------------------------------------------------------------------------------------------------------------


@check
def gigabytes(answer: Any) -> str:
    """answer(parameters, bytes_each) -> (GB, GiB)."""
    found = pair(result(answer, 10**9, 4), "GB, GiB")
    gib = 4e9 / 2**30
    each(found, {
        (gib, 4): "the two are in each other's place: a GiB is the larger unit, so there are fewer of them",
        (4, 4): "both are GB: a GiB is 2**30 bytes, 7 % more than a GB",
        (4e9, 4e9): "those are bytes: divide by 1e9, and by 2**30",
        (4, 4 * 2**30 / 1e9): "that makes the GiB the smaller unit: divide the bytes by 2**30",
        (32, 8 * gib): "those are gigabits: bytes_each counts bytes already",
        (1, 1e9 / 2**30): "each parameter has bytes_each bytes: multiply first",
        (4, 4e9 / 1024**2): "1024**2 bytes are a MiB: a GiB is 1024**3",
    })  # fmt: skip
    expect(equal(found[0], 4) and equal(found[1], gib), f"for 1e9 parameters of 4 bytes it says {found[0]:,.4g} GB and {found[1]:,.4g} GiB: "
                                                        "the bytes over 1e9, and over 2**30")  # fmt: skip
    other = pair(result(answer, 7 * 10**9, 2), "GB, GiB")
    expect(equal(other[0], 14), f"right for 1e9 parameters of 4 bytes, but 7e9 of 2 bytes are 14 GB, and it says {other[0]:,.4g}: use the arguments")
    return "4 GB, which is 3.73 GiB. GPUs are sold in the one and read out in the other."


@check
def kept(answer: Any) -> str:
    """answer(hidden, query, key_value, mlp, heads) -> numbers that autograd keeps of one block for one token."""
    h, q, kv, f, a = 64, 96, 32, 160, 3
    count, right = number(result(answer, h, q, kv, f, a), "your count for sizes 64, 96, 32, 160 and 3 heads"), 4 * h + 2 * q + 2 * kv + 3 * f + a
    refuse(count, {
        right + 2 * h: "q, k and v read the same tensor, and it is kept once: 1 × hidden for the three of them",
        right + h: "gate and up read the same tensor, and it is kept once",
        right + 3 * h: "layers that read the same tensor share it: q, k and v one, gate and up another",
        right + q: "attention's output is the input of o: the same tensor, kept once",
        right + q + 3 * h: "tensors that are read twice are kept once: the input of q, k, v; of gate and up; and of o, which is attention's output",
        right - f: "gate and up are both kept (the product's gradient needs both), and so is the product, which down reads: 3 × mlp",
        right - 2 * f: "the MLP keeps three tensors as wide as mlp: gate, up, and their product, which down reads",
        right - 2 * h: "the norms' own inputs are missing: each keeps what it read, besides what it hands on",
        right - 2 * kv: "keys and values are missing: attention keeps them for its backward pass",
        right - kv: "keys and values are two tensors: 2 × key_value",
        right - q: "queries and attention's output are two tensors: 2 × query",
        right - a: "one number for each head is missing: the softmax's sum, from which it is made again",
        4 * right: "those are bytes in float32: count numbers",
        h: "that is the block's input alone, which is what gradient checkpointing keeps",
    }, 0)  # fmt: skip
    expect(count == right, f"for hidden 64, query 96, key_value 32, mlp 160 and 3 heads it says {count:,.0f}: go through the table line by line, and "
                           "count a tensor that two lines have in common once")  # fmt: skip
    other = number(result(answer, 576, 576, 192, 1536, 9), "your count for SmolLM2-135M")
    expect(other == 8457, f"right for those sizes, but for SmolLM2-135M (576, 576, 192, 1,536, 9) it says {other:,.0f}: use the arguments")
    return "4 hidden + 2 query + 2 key_value + 3 mlp + heads: 8,457 numbers for each token and block of SmolLM2, fifteen times what goes in."


# 3: a number in 16 bits ---------------------------------------------------------------------------------------------------------


def bits_of(value: float) -> int:
    """A number's 32 bits as float32."""
    import struct

    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def from_bits(bits: int) -> float:
    import struct

    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@check
def bfloat16(answer: Any) -> str:
    """answer(x) -> the nearest bfloat16, as a float."""
    e, small, tie = 2.718281828, 0.1, 1 + 2**-8
    for value in (e, small, -e):
        found = number(result(answer, value), f"your bfloat16 of {value}")
        wanted = memory_math.number_formats(value)["bf16"].nearest
        if found == wanted:
            continue
        refuse(found, {bits_of(value) >> 16: "those are the 16 bits as a whole number: put them back in front of 16 zeros, and read that as a float",
                       bits_of(value): "those are the 32 bits as a whole number: keep the upper 16, and read them as a float again"}, 0)  # fmt: skip
        _refuse_format(found, value)
        expect(not (math.copysign(1, found) != math.copysign(1, value) and abs(found) == abs(wanted)), f"the sign of {value} is lost")
        raise NotYet(f"{value} becomes {found!r}: the nearest with 8 exponent and 7 fraction bits is {wanted!r}, float32's upper 16 bits, rounded")
    found = number(result(answer, tie), f"your bfloat16 of {tie}")
    expect(found == 1.0, f"right, but for what lies just in the middle: {tie} is as near to 1.0 as to 1.0078125, and IEEE 754 takes the one whose "
                         f"last bit is 0, which is 1.0; here it is {found!r}")  # fmt: skip
    return "8 exponent bits, so it reaches as far as float32; 7 fraction bits, so it has about two and a half decimal digits."


def _refuse_format(found: float, value: float) -> None:
    formats = memory_math.number_formats(value)
    cut, up = from_bits(bits_of(value) & 0xFFFF0000), from_bits((bits_of(value) | 0xFFFF) + 1)
    for wrong, words in (
        (formats["fp32"].nearest, f"{value} is left as it was, but for float32's rounding: 16 of the 32 bits have to go"),
        (formats["fp16"].nearest, f"{found!r} is the fp16 (5 exponent bits, 10 of the fraction): bf16 keeps float32's 8 exponent bits, and 7"),
        (cut, f"{value} becomes {cut!r}: the lower 16 bits are cut off. They are more than a half of the last one kept, so round up"),
        (up, f"{value} becomes {up!r}: that rounds up always. Below a half of the last bit kept, round down"),
        (float(round(value, 2)), f"{value} becomes {round(value, 2)}: the rounding is in binary digits, not in decimal ones"),
    ):
        expect(found != wrong, words)


# 4: out of memory -----------------------------------------------------------------------------------------------------------------

MODEL, GPU = "llama-3-8b", "RTX-4090"
ASKED = {"precision": "bf16-mixed", "batch_size": 4, "sequence_length": 2048}
REMEDIES = {
    "weights": "they are there whether they train or not: fewer bits for each (method='qlora')",
    "gradients": "every weight that trains has one: train fewer (method=...)",
    "optimizer_states": "two numbers for every weight that trains: train fewer (method=...)",
    "activations": "they grow with rows and tokens: keep each block's input only (gradient_checkpointing=...), or send fewer rows at a time",
    "logits": "a number for each token and each of 128,256 words: a loss in chunks (loss='chunked'), or fewer rows at a time",
    "workspace": "temporaries, most of them of what trains: train fewer (method=...)",
    "other": "ids and tables",
}


@check
def make_it_fit(answer: Any) -> str:
    """answer: keywords of `memory_math.predict` that make the step fit the GPU; the model, its rows and their length stay."""
    if answer is None or answer is ...:
        raise NotYet("there is no answer yet: a dict of keywords, such as dict(method='lora')")
    expect(isinstance(answer, Mapping), f"expected a dict of keywords of predict, such as dict(method='lora'), not a {type(answer).__name__}")
    request = {**ASKED, **answer}
    expect(request["sequence_length"] == 2048, "the rows stay 2,048 tokens long: cutting the texts is another task")
    footprint = _predicted(request)
    rows = request["batch_size"] * footprint.request["grad_accum_steps"]
    expect(rows == 4, f"a step learns from 4 rows, and here from {rows}: fewer at a time need as many passes (grad_accum_steps)")
    expect(footprint.trained > 0, f"method={request.get('method')!r} trains nothing: it fits, and learns nothing")
    expect(footprint.request["world_size"] * footprint.request["tensor_parallel"] == 1, "there is one GPU: no world_size and no tensor_parallel")
    limit = memory_math.hardware.gpu_of(GPU).usable_bytes
    if footprint.total > limit:
        parts = {part: getattr(footprint, part) for part in REMEDIES}
        largest = max(parts, key=parts.__getitem__)
        frozen = largest == "weights" and footprint.request["method"] in ("lora", "dora", "prompt", "prefix")
        part = sorted(parts, key=parts.__getitem__)[-2] if frozen else largest
        raise NotYet(f"{footprint.gib():.1f} GiB against {limit / 2**30:.1f}: the most that can go are the {part.replace('_', ' ')}, "
                     f"{parts[part] / 2**30:.1f} GiB; {REMEDIES[part]}")  # fmt: skip
    return f"{footprint.gib():.1f} GiB of {limit / 2**30:.1f}, with {footprint.trained:,} of {footprint.parameters:,} weights training."


def _predicted(request: dict[str, Any]) -> Any:
    try:
        return memory_math.predict(MODEL, **request)
    except memory_math.MemoryMathError as error:
        raise NotYet(f"predict refuses this: {error}") from None
    except TypeError as error:
        raise NotYet(f"predict does not know a keyword: {str(error).rpartition(' ')[2]}") from None


# 5: the lecture's A^K -----------------------------------------------------------------------------------------------------------


@check
def weights_of_k(answer: Any) -> str:
    """answer(hidden, heads, kv_heads) -> the weights of one layer's A^K."""
    count = number(result(answer, 8192, 64, 8), "your count for Llama-2-70B")
    refuse(count, {
        8192 * 8192: "that is A^Q: each of 64 heads of queries has 128 outputs. Keys have 8 heads only",
        8096 * 8096: "that is the slide's 8096 × 8096: the hidden size is 8,192, and K is not square",
        8192 * 8: "that gives each head of keys one output: a head is hidden / heads wide",
        8192 * 128: "that is one head of keys, 8,192 × 128, of which there are kv_heads (or 1,024 × 1,024: but the input is the whole hidden state)",
        80 * 8192 * 1024: "that is all 80 layers: the question is about one",
        2 * 8192 * 1024: "that is A^K and A^V together: the question is about A^K",
    })  # fmt: skip
    expect(count == 8192 * 1024, f"for hidden 8,192, 64 heads and 8 of keys it says {count:,.0f}: hidden inputs, kv_heads × (hidden / heads) outputs")
    other = number(result(answer, 576, 9, 3), "your count for SmolLM2-135M")
    expect(other == 576 * 192, f"right for Llama-2-70B, but for hidden 576, 9 heads and 3 of keys it says {other:,.0f}: a head is 576 / 9 = 64 wide")
    return "8,192 × 1,024 = 8,388,608, an eighth of A^Q. The slide's 64 million is wrong in the size, in the shape, and in its own product."


# 6 and 7: time, money and scaling -----------------------------------------------------------------------------------------------


@check
def days_and_dollars(answer: Any) -> str:
    """answer(tokens, gpus, tokens_per_gpu_second, dollars_per_gpu_hour) -> (days, dollars)."""
    found = pair(result(answer, 2e12, 2048, 400, 2.5), "days, dollars")
    run = memory_math.training_time(70e9, 2e12, gpus=2048, tokens_per_gpu_second=400, price=2.5)
    days, dollars = run.days, run.dollars
    each(found, {
        (dollars, days): "the two are in each other's place: return days, dollars",
        (days * 2048, dollars): "those are the days of one GPU: 2,048 of them share the work",
        (days * 2048, dollars * 2048): "2,048 GPUs share the work: divide the tokens by all that they read in a second",
        (run.hours, dollars): "those are hours: a day has 24",
        (run.seconds, dollars): "those are seconds: a day has 86,400",
        (days, dollars / 2048): "that pays for one GPU: every one of the 2,048 costs 2.50 an hour",
        (days, dollars / 24): "the price is for an hour, and this takes it for a day",
        (days, dollars / 3600): "the price is for an hour, not a second",
    })  # fmt: skip
    expect(equal(found[0], days, 1e-3), f"the lecture's run takes {days:.2f} days, and here {found[0]:,.4g}: tokens / (gpus × tokens_per_gpu_second)")
    expect(equal(found[1], dollars, 1e-3), f"the days are right; the lecture's run costs {dollars / 1e6:.2f} million dollars, and here it says "
                                           f"{found[1]:,.4g}: hours × GPUs × price")  # fmt: skip
    return "28.3 days and 3.47 million dollars. Twice as many GPUs halve the days and leave the dollars as they are."


@check
def compute_optimal(answer: Any) -> str:
    """answer(flops) -> (parameters, tokens) by 20 tokens for each parameter and C = 6 N D."""
    budget = 5.76e23
    found = pair(result(answer, budget), "parameters, tokens")
    n, d = math.sqrt(budget / 120), 20 * math.sqrt(budget / 120)
    each(found, {
        (d, n): "the two are in each other's place: 20 tokens for each parameter, so there are more tokens",
        (math.sqrt(budget / 20), 20 * math.sqrt(budget / 20)): "the 6 is missing: each parameter and token takes 6 operations",
        (math.sqrt(budget / 6), math.sqrt(budget / 6)): "the 20 is missing: that is as many tokens as parameters",
        (math.sqrt(budget / 6), 20 * math.sqrt(budget / 6)): "that spends 20 times the budget: put D = 20 N into C = 6 N D before you solve for N",
        (budget / 120, budget / 6): "N appears twice in C = 6 N × 20 N: take the square root",
        (n, n / 20): "20 tokens for each parameter, not 20 parameters for each token",
    })  # fmt: skip
    expect(equal(6 * found[0] * found[1], budget, 1e-3), f"6 × {found[0]:.3g} × {found[1]:.3g} is {6 * found[0] * found[1]:.3g}, and the budget is "
                                                         f"{budget:.3g}")  # fmt: skip
    expect(equal(found[0], n, 1e-3), f"the budget is spent, but with {found[1] / found[0]:.3g} tokens for each parameter instead of 20")
    return "69 billion parameters and 1.4 trillion tokens: Chinchilla, which had 70 and 1.4. Four times the budget buys twice of each."
