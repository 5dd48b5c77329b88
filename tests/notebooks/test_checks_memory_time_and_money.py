"""The checks of notebook 01: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from check_tools import each_gets_its_own, said

import memory_math
from course.checks import memory_time_and_money as check

GIB = 2**30


def test_gigabytes():
    each_gets_its_own(
        check.gigabytes,
        right=[lambda n, b: (n * b / 1e9, n * b / GIB), lambda n, b: [n * b / 10**9, n * b / 1024**3]],
        wrong={
            "each other's place": lambda n, b: (n * b / GIB, n * b / 1e9),
            "both are GB": lambda n, b: (n * b / 1e9, n * b / 1e9),
            "those are bytes": lambda n, b: (n * b, n * b),
            "the smaller unit": lambda n, b: (n * b / 1e9, n * b / 1e9 * GIB / 1e9),
            "gigabits": lambda n, b: (8 * n * b / 1e9, 8 * n * b / GIB),
            "multiply first": lambda n, b: (n / 1e9, n / GIB),
            "MiB": lambda n, b: (n * b / 1e9, n * b / 1024**2),
            "two numbers": lambda n, b: n * b / 1e9,
            "use the arguments": lambda n, b: (4.0, 4e9 / GIB),
            "over 1e9, and": lambda n, b: (n * b / 1e6, n * b / GIB),
        },
    )


def kept(h, q, kv, f, a):
    return 4 * h + 2 * q + 2 * kv + 3 * f + a


def test_kept():
    each_gets_its_own(
        check.kept,
        right=[kept, lambda h, q, kv, f, a: h + h + q + kv + kv + a + q + h + h + f + f + f],
        wrong={
            "1 × hidden for the three": lambda *s: kept(*s) + 2 * s[0],
            "gate and up read the same": lambda *s: kept(*s) + s[0],
            "gate and up another": lambda *s: kept(*s) + 3 * s[0],
            "is the input of o:": lambda *s: kept(*s) + s[1],
            "and of o, which": lambda *s: kept(*s) + s[1] + 3 * s[0],
            "are both kept": lambda *s: kept(*s) - s[3],
            "three tensors": lambda *s: kept(*s) - 2 * s[3],
            "norms": lambda *s: kept(*s) - 2 * s[0],
            "are missing: attention": lambda *s: kept(*s) - 2 * s[2],
            "2 × key_value": lambda *s: kept(*s) - s[2],
            "2 × query": lambda *s: kept(*s) - s[1],
            "each head": lambda *s: kept(*s) - s[4],
            "those are bytes": lambda *s: 4 * kept(*s),
            "input alone": lambda *s: s[0],
            "line by line": lambda *s: sum(s),
            "use the arguments": lambda *s: 995,
            "TypeError": lambda h: 4 * h,
        },
    )


def test_kept_is_what_memory_math_derives():
    """activation_formula in float32, 4 bytes a number."""
    formula = memory_math.activation_formula("smollm2-135m", precision="fp32", implementation="lora_lab")
    assert formula(h=576, q=576, kv=192, f=1536, a=9) == 4 * kept(576, 576, 192, 1536, 9)


def by_bits(x, halves="even"):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    if halves != "cut":
        bits += 0x7FFF + ((bits >> 16) & 1 if halves == "even" else 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def test_bfloat16():
    each_gets_its_own(
        check.bfloat16,
        right=[by_bits, lambda x: torch.tensor(x).bfloat16().item(), lambda x: torch.tensor(x, dtype=torch.bfloat16)],
        wrong={
            "cut off": lambda x: by_bits(x, "cut"),
            "just in the middle": lambda x: by_bits(x, "up"),
            "is the fp16": lambda x: torch.tensor(x).half().item(),
            "left as it was": lambda x: torch.tensor(x).item(),
            "16 bits as a whole number": lambda x: struct.unpack("<I", struct.pack("<f", x))[0] >> 16,
            "32 bits as a whole number": lambda x: struct.unpack("<I", struct.pack("<f", x))[0],
            "decimal": lambda x: round(x, 2),
            "sign": lambda x: abs(by_bits(x)),
            "nearest with 8 exponent": lambda x: 2 * by_bits(x),
        },
    )


@pytest.mark.parametrize("value", [3.14159265, 1e-30, -7e20, 0.3])
def test_the_solution_by_bits_is_bfloat16(value):
    assert by_bits(value) == memory_math.number_formats(value)["bf16"].nearest


def test_make_it_fit():
    adapters = {"method": "lora", "gradient_checkpointing": True}
    each_gets_its_own(
        check.make_it_fit,
        right=[{**adapters, "loss": "chunked"}, {**adapters, "batch_size": 1, "grad_accum_steps": 4}, {**adapters, "method": "qlora"},
               {**adapters, "implementation": "lora_lab"}],
        wrong={
            "optimizer states": {},
            "activations": {"method": "lora"},
            "logits": adapters,
            "fewer bits": {"method": "full", "optimizer": "sgd", "batch_size": 1, "grad_accum_steps": 4, "gradient_checkpointing": True},
            "stay 2,048": {"sequence_length": 512, **adapters},
            "from 1:": {"batch_size": 1, **adapters},
            "trains nothing": {"method": "inference", "quantization": "nf4", "batch_size": 4},
            "one GPU": {"method": "lora", "world_size": 4, "zero_stage": 3},
            "predict refuses": {"method": "lorra"},
            "'metod'": {"metod": "lora"},
            "a dict of keywords of predict": "lora",
        },
    )  # fmt: skip


def test_make_it_fit_says_how_much_the_answer_takes():
    assert "18.8 GiB" in said(check.make_it_fit, {"method": "lora", "gradient_checkpointing": True, "batch_size": 1, "grad_accum_steps": 4})


def test_weights_of_k():
    each_gets_its_own(
        check.weights_of_k,
        right=[lambda hidden, heads, kv_heads: hidden * kv_heads * hidden // heads],
        wrong={
            "that is A^Q": lambda hidden, heads, kv_heads: hidden * hidden,
            "8096 × 8096": lambda hidden, heads, kv_heads: 8096 * 8096,
            "one output": lambda hidden, heads, kv_heads: hidden * kv_heads,
            "one head of keys": lambda hidden, heads, kv_heads: hidden * hidden // heads,
            "all 80 layers": lambda hidden, heads, kv_heads: 80 * hidden * kv_heads * hidden // heads,
            "A^V together": lambda hidden, heads, kv_heads: 2 * hidden * kv_heads * hidden // heads,
            "64 wide": lambda hidden, heads, kv_heads: hidden * kv_heads * 128,
            "ZeroDivisionError": lambda hidden, heads, kv_heads: hidden / 0,
        },
    )


def test_days_and_dollars():
    def days(tokens, gpus, speed):
        return tokens / (gpus * speed) / 86_400

    def dollars(tokens, speed, price):
        return tokens / speed / 3600 * price

    each_gets_its_own(
        check.days_and_dollars,
        right=[lambda t, g, s, p: (days(t, g, s), dollars(t, s, p))],
        wrong={
            "each other's place": lambda t, g, s, p: (dollars(t, s, p), days(t, g, s)),
            "of one GPU": lambda t, g, s, p: (days(t, 1, s), dollars(t, s, p)),
            "share the work: divide": lambda t, g, s, p: (days(t, 1, s), g * dollars(t, s, p)),
            "those are hours": lambda t, g, s, p: (24 * days(t, g, s), dollars(t, s, p)),
            "those are seconds": lambda t, g, s, p: (86_400 * days(t, g, s), dollars(t, s, p)),
            "pays for one GPU": lambda t, g, s, p: (days(t, g, s), dollars(t, s, p) / g),
            "takes it for a day": lambda t, g, s, p: (days(t, g, s), dollars(t, s, p) / 24),
            "not a second": lambda t, g, s, p: (days(t, g, s), dollars(t, s, p) / 3600),
            "two numbers": lambda t, g, s, p: days(t, g, s),
            "hours × GPUs × price": lambda t, g, s, p: (days(t, g, s), 2 * dollars(t, s, p)),
        },
    )


def test_compute_optimal():
    each_gets_its_own(
        check.compute_optimal,
        right=[lambda c: (math.sqrt(c / 120), 20 * math.sqrt(c / 120)), lambda c: ((c / 120) ** 0.5, c / 6 / (c / 120) ** 0.5)],
        wrong={
            "each other's place": lambda c: (20 * math.sqrt(c / 120), math.sqrt(c / 120)),
            "the 6 is missing": lambda c: (math.sqrt(c / 20), 20 * math.sqrt(c / 20)),
            "the 20 is missing": lambda c: (math.sqrt(c / 6), math.sqrt(c / 6)),
            "20 times the budget": lambda c: (math.sqrt(c / 6), 20 * math.sqrt(c / 6)),
            "square root": lambda c: (c / 120, c / 6),
            "not 20 parameters": lambda c: (math.sqrt(c / 120), math.sqrt(c / 120) / 20),
            "and the budget is": lambda c: (1e9, 20e9),
            "instead of 20": lambda c: (2 * math.sqrt(c / 120), 10 * math.sqrt(c / 120)),
        },
    )
