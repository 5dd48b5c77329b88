"""GPU-hours, tokens per second and utilisations that papers and libraries print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..hardware import gpu_of
from ..time_and_cost import hfu, mfu, tokens_per_gpu_second_of, training_flops, training_time
from .rows import Rows

A100, H100 = "A100-80GB", "H100-80GB"
LLAMA_2_HOURS = {"7b": 184_320, "13b": 368_640, "34b": 1_038_336, "70b": 1_720_320}  # A100-hours, arXiv:2307.09288, table 2
LLAMA_65B_HOURS = 1_022_362  # A100-hours, arXiv:2302.13971, table 15
THEIR_PEAK = 989.5e12  # what llm-foundry takes for an H100
FOUNDRY = (  # H100, bf16, 2,048 tokens: name, parameters, blocks, hidden, tokens/s, MFU
    ("70b", 64_862_437_376, 80, 8192, 1007, "41.25"), ("30b", 29_975_214_080, 48, 7168, 2115, "40.27"),
    ("13b", 12_853_954_560, 40, 5120, 4952, "41.12"), ("7b", 6_658_859_008, 32, 4096, 9670, "42.2"),
    ("3b", 2_651_837_440, 32, 2560, 21664, "39.24"), ("1b", 1_315_950_592, 24, 2048, 39837, "36.65"),
)  # fmt: skip
TITAN = (("llama-3-8b", 8192, 2904, "56.8"), ("llama-2-13b", 4096, 2162, "61.1"), ("llama-2-70b", 4096, 355, "50.8"))
TUNE = ((9174, "packed and compiled", "57"), (2091, "padded", "13"))


def llama() -> Rows:
    rows = Rows("Hours", "arXiv:2307.09288 (Llama 2), table 2")
    unit = "tokens per GPU and second"
    for name, stated, percent in (("7b", "3,014", "39"), ("70b", "323", "43")):
        speed = 2e12 / (LLAMA_2_HOURS[name] * 3600)
        share = 100 * mfu(f"llama-2-{name}", tokens_per_gpu_second=speed, gpu=A100)
        rows.number(f"Llama-2-{name.upper()} in {LLAMA_2_HOURS[name]:,} A100-hours", stated, speed, unit, "2e12 tokens.")
        rows.number(f"Llama-2-{name.upper()}, MFU", percent, share, "%", "By 6N, without attention.")
    rows.number("Llama-2-70B at 323 tokens/s", "134", training_flops("llama-2-70b", 323).model / 1e12, "TFLOP/s", "6N operations a token.")
    naive = training_time("llama-2-70b", 2e12, gpus=1, tokens_per_gpu_second=400)
    rows.number("Llama-2-70B at 400 tokens/s", "1.389", naive.gpu_hours / 1e6, "million A100-hours", "What lecture 10.5 reckons with.")
    fewer = 100 * (1 - naive.gpu_hours / LLAMA_2_HOURS["70b"])
    rows.number("fewer than it took", "19", fewer, "%", "323 tokens/s instead of 400.")
    rows.number("Llama 2, all sizes", "3,311,616", sum(LLAMA_2_HOURS.values()), "A100-hours", "The four rows of the table.")
    speed = tokens_per_gpu_second_of("llama-2-70b", gpu=A100, mfu=0.43)
    ends = [tokens_per_gpu_second_of("llama-2-70b", gpu=A100, mfu=share) for share in (0.425, 0.435)]
    rows.number("Llama-2-70B at 43 % MFU", "323", speed, unit, "43 is rounded, so between the ends of what it can have been.", spread=ends)
    first = training_time("llama-65b", 1.4e12, gpus=2048, tokens_per_gpu_second=380)
    where = "arXiv:2302.13971 (LLaMA), section 2.4 and table 15"
    rows.number("LLaMA-65B on 2,048 A100 at 380 tokens/s", "21", first.days, "days", "1.4e12 tokens.", where=where)
    rows.number(f"LLaMA-65B in {LLAMA_65B_HOURS:,} A100-hours", "380", 1.4e12 / (LLAMA_65B_HOURS * 3600), unit, "1.4e12 tokens.", where=where)
    return rows


def utilisations() -> Rows:
    rows = Rows("MFU", "llm-foundry, scripts/train/benchmarking")
    card = replace(gpu_of(H100), flops_per_second=THEIR_PEAK)
    for name, count, blocks, hidden, speed, stated in FOUNDRY:
        found, low, high = (
            100 * mfu(count, tokens_per_gpu_second=value, gpu=card, layers=blocks, hidden=hidden, sequence_length=2048)
            for value in (speed, speed - 0.5, speed + 1)
        )
        why = "6N + 12 L h s a token over their peak, 989.5 TFLOP/s; the speed is printed without decimals, cut off or rounded."
        rows.number(f"MPT-{name} at {speed:,} tokens/s", stated, found, "% MFU", why, spread=(low, high))
    _, count, blocks, hidden, speed, _ = FOUNDRY[0]
    executed = hfu(count, tokens_per_gpu_second=speed, gpu=card, gradient_checkpointing=True, layers=blocks, hidden=hidden, sequence_length=2048)
    rows.number("MPT-70b with checkpointing", "55.0", 100 * executed, "% HFU", "A second forward pass: 4/3 of the MFU.")
    for model, length, speed, stated in TITAN:
        share = 100 * mfu(model, tokens_per_gpu_second=speed, gpu=A100, sequence_length=length)
        why = f"A100, rows of {length:,}, attention in full."
        rows.number(f"{model} at {speed:,} tokens/s", stated, share, "% MFU", why, where="torchtitan, docs/performance.md")
    for speed, kind, stated in TUNE:
        share = 100 * mfu("llama-3.2-3b", tokens_per_gpu_second=speed, gpu=A100)
        why = "A100, by 6N, without attention; padding counts as nothing."
        rows.number(f"llama-3.2-3b at {speed:,} tokens/s, {kind}", stated, share, "% MFU", why, where="torchtune README's speeds")
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (llama, utilisations)
