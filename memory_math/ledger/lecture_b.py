"""Rows B1 to B6 of "Lecture 10.5: Finetuning": what is updated, and the GPUs, days and dollars of training and tuning Llama-2-70B."""

from __future__ import annotations

from collections.abc import Callable

from ..architectures import count_parameters
from ..hardware import LECTURE as PRICE
from ..hardware import gpu_of
from ..optimizers import Shape, state_bytes
from ..precision import precision_of
from ..time_and_cost import mfu, tokens_per_gpu_second_of, training_time
from .rows import Rows

LECTURE = "Lecture 10.5"
MODEL, GPU, TOKENS, SPEED = "llama-2-70b", "A100-80GB", 2e12, 400
PUBLISHED_HOURS = 1_720_320  # GPU-hours of Llama-2-70B, arXiv:2307.09288, table 2
TITAN_MFU = 0.508  # of Llama-2-70B on 64 A100, rows of 4,096 (torchtitan, docs/performance.md)
SLIDE_PARAMETERS = 70 * 10**9
UPDATED = (  # the slide's list, and the parts that each item is here
    ("positional embeddings", ("positions",)), ("stand-alone embeddings", ("embedding",)), ("A^K, A^Q, A^V", ("k", "q", "v")),
    ("layer norms", ("norms",)), ("feed-forward layers", ("up", "down")), ("dense layers outside the blocks", ()), ("the softmax layer", ("head",)),
)  # fmt: skip


def b1() -> Rows:
    rows = Rows("B1", LECTURE)
    count = count_parameters("gpt2")
    listed = {name: sum(count.parts[part] for part in parts) for name, parts in UPDATED}
    reasons = {"dense layers outside the blocks": "GPT-2 has none.", "the softmax layer": "GPT-2's is its embedding, counted there."}
    for name, elements in listed.items():
        rows.unstated(f"{name} of GPT-2", elements, "parameters", reasons.get(name, "By parts; biases are a row of their own."))
    left_out = count.parts["o"] + count.parts["biases"]
    why = f"The matrices that join each block's heads ({count.parts['o']:,}), and biases ({count.parts['biases']:,})."
    rows.unstated("updated in GPT-2, and not in the slide's list", left_out, "parameters", why)
    rows.number("all that fine-tuning updates in GPT-2", "124,439,808", count.total, "parameters", "The parts add up to the published count.")
    return rows


def b2() -> Rows:
    rows = Rows("B2", LECTURE)
    rows.number(
        "Alpaca's base", "7", count_parameters("alpaca-7b") / 1e9, "billion parameters", "Llama-7B, against the other lecture's 13B (row A8)."
    )
    rows.not_measured(
        "reviews read like marketing copy before tuning, like a customer after",
        "Shown by tests/real/test_demo_quick.py: the demonstration's texts before and after; figures are in notebook 00 of the course.",
    )  # fmt: skip
    rows.not_measured(
        "'write a horrible review', an instruction that was never trained", "tests/lora_lab/data/test_bundled_reviews.py: it is in no row."
    )
    return rows


def b3() -> Rows:
    rows = Rows("B3", LECTURE)
    rows.not_measured("training rows of instruction, input and output", "Read by lora_lab.data: tests/lora_lab/data/test_formats.py.")
    return rows


def b4() -> Rows:
    rows = Rows("B4", LECTURE)
    count, half, gpu = count_parameters(MODEL), precision_of("fp16").trained, gpu_of(GPU)
    binary = int(gpu.memory_gib * 2**30)
    rows.number("parameters of Llama-2-70B", "70", count / 1e9, "billion", f"Exactly {count.total:,}.")
    rows.number("fp16", "2", half, "bytes per parameter", "16 bits.")
    for times, stated, gpus, ratio in ((3, "420", "6", "5.25"), (6, "840", "11", "10.5")):
        exact, slide = count * half * times, SLIDE_PARAMETERS * half * times
        rows.number(
            f"70B x 2 bytes x {times}", stated, exact / 1e9, "GB", f"With 70e9 parameters; with all {count.total:,} it is less.", assuming=slide / 1e9
        )
        rows.number(f"{stated} GB over GPUs of 80e9 bytes", ratio, slide / gpu.nominal_bytes, "GPUs", "With 70e9 parameters.")
        rows.number(f"GPUs for {stated} GB", gpus, -(-exact // gpu.nominal_bytes), "GPUs", "At 80e9 bytes each, if it divided evenly.")
        rows.number(
            f"GPUs for {stated} GB, at the 80 GiB that an A100 has", gpus, -(-slide // binary), "GPUs",
            f"80 GiB are {binary / 1e9:.1f}e9 bytes, so one GPU fewer; the slide's holds at 80e9.", assuming=-(-slide // gpu.nominal_bytes),
        )  # fmt: skip
    _multiplier(rows)
    rows.number(
        "memory of an A100", "80", binary / 1e9, "GB", "The driver has 80 GiB for processes; on the box, and in the slide, it is 80 GB.",
        assuming=gpu.nominal_bytes / 1e9,
    )  # fmt: skip
    return rows


def _multiplier(rows: Rows) -> None:
    """What the 3 and the 6 are made of, in units of the 16-bit weights."""
    count, half = count_parameters(MODEL), precision_of("fp16").trained
    weights = count * half
    momentum = state_bytes("momentum", [Shape(1, count.total, half)])
    moments = state_bytes("adamw", [Shape(1, count.total, 4)])
    masters = state_bytes("adamw", [Shape(1, count.total, half)], masters=True)
    rows.number("lowest multiplier", "3", (2 * weights + momentum) / weights, "x the weights", "Weights, gradients and one momentum, all in 16 bit.")
    rows.number(
        "highest multiplier", "6", (2 * weights + masters) / weights, "x the weights",
        "6 is 16-bit weights and gradients with Adam's moments in 32 bit; the usual mixed precision has 32-bit masters too, and is 8.",
        assuming=(2 * weights + moments) / weights,
    )  # fmt: skip


def b5() -> Rows:
    rows = Rows("B5", LECTURE)
    few = training_time(MODEL, TOKENS, gpus=11, tokens_per_gpu_second=SPEED, price=PRICE)
    many = training_time(MODEL, TOKENS, gpus=2048, tokens_per_gpu_second=SPEED, price=PRICE)
    speed = TOKENS / (PUBLISHED_HOURS * 3600)
    real = training_time(MODEL, TOKENS, gpus=2048, tokens_per_gpu_second=speed, price=PRICE)
    reached = mfu(MODEL, tokens_per_gpu_second=SPEED, gpu=GPU)
    fastest = tokens_per_gpu_second_of(MODEL, gpu=GPU, mfu=TITAN_MFU, sequence_length=4096)
    rows.not_measured("training tokens", "An input, as Llama 2's paper states it (arXiv:2307.09288, table 1).", stated="2000000000000", unit="tokens")
    rows.number(
        "tokens per second on an A100, optimistically", "400", speed, "tokens per GPU and second",
        f"Meta's GPU-hours are {speed:.0f}; 400 would be {reached:.0%} of the peak. torchtitan's later run, 50.8 % with attention, is {fastest:.0f}, "
        "which rounds to 400: optimistic, as the slide says.", assuming=fastest,
    )  # fmt: skip
    rows.number("11 GPUs", "5,261", few.days, "days", "2e12 / (11 x 400) seconds.")
    rows.number("11 GPUs, to one decimal", "5,260.9", few.days, "days", "2e12 / (11 x 400) seconds.")
    rows.number("2,048 GPUs", "28", many.days, "days", f"As fast as Meta's run, it would be {real.days:.0f}.")
    rows.number("2,048 GPUs, to one decimal", "28.3", many.days, "days", "2e12 / (2,048 x 400) seconds.")
    rows.not_measured("price of a GPU-hour", "A price of a time and a seller; hardware.py has others with their dates.", stated="2.5", unit="dollars")
    rows.number(
        "cost of the run", "4", (many.dollars or 0) / 1e6, "million dollars", "At 400 tokens/s it is 3.47; 4 holds for the published GPU-hours.",
        assuming=(real.dollars or 0) / 1e6,
    )  # fmt: skip
    rows.number("cost at 400 tokens/s", "3.47", (many.dollars or 0) / 1e6, "million dollars", "1,388,889 GPU-hours at $2.5.")
    rows.number("the published GPU-hours on 2,048 GPUs", "35", real.days, "days", "1,720,320 / 2,048 / 24.")
    rows.number("their cost", "4.30", (real.dollars or 0) / 1e6, "million dollars", "1,720,320 GPU-hours at $2.5.")
    rows.number("their tokens per GPU and second", "323", real.tokens_per_gpu_second, "tokens", "2e12 tokens / 1,720,320 hours.")
    return rows


def b6() -> Rows:
    rows = Rows("B6", LECTURE)
    pairs, length = 50_000, 4096
    stated = training_time(MODEL, 2e8, gpus=7, tokens_per_gpu_second=SPEED)
    full = training_time(MODEL, pairs * length, gpus=7, tokens_per_gpu_second=SPEED)
    rows.not_measured("pairs of Alpaca's data", "A count of the data set.", stated="50,000", unit="pairs")
    rows.not_measured(
        "tokens of each pair", "4,096 is Llama 2's window, the most that a pair could have, not its length; notebook 01 of the course counts it.",
        stated="4,096", unit="tokens",
    )  # fmt: skip
    rows.number("all of them, if each fills the window", "200", full.tokens / 1e6, "million tokens", "50,000 x 4,096.")
    rows.number(
        "7 GPUs, 2e8 tokens", "20", stated.hours, "hours", f"2e8 / (7 x 400) seconds; with all {full.tokens / 1e6:.1f}M tokens {full.hours:.1f}."
    )
    rows.number("7 GPUs, to one decimal", "19.8", stated.hours, "hours", "2e8 / (7 x 400) seconds.")
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (b1, b2, b3, b4, b5, b6)
