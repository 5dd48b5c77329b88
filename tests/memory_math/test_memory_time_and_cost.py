"""Time, operations and cost against the lecture's sums and the throughputs that other projects publish."""

from __future__ import annotations

import pytest

from memory_math import MemoryMathError, count_parameters
from memory_math.hardware import LECTURE, gpu_of
from memory_math.time_and_cost import (
    METHODS,
    active_parameters_of,
    hfu,
    mfu,
    parameters_of,
    tokens_per_gpu_second_of,
    training_flops,
    training_time,
)


def mpt(layers: int, hidden: int, positions: int = 2048, words: int = 50368) -> int:
    """Parameters of llm-foundry's MPT: 12 h^2 a layer and two norms without bias, tied embedding, learned positions."""
    return layers * (12 * hidden**2 + 2 * hidden) + (words + positions + 1) * hidden


# --- operations -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "checkpointing", "model", "hardware"), [
    ("full", False, 6, 6), ("full", True, 6, 8), ("lora", False, 4, 4), ("lora", True, 4, 6), ("qlora", True, 4, 6), ("prompt", False, 4, 4),
    ("inference", False, 2, 2),
])  # fmt: skip
def test_operations_per_parameter_and_token(method: str, checkpointing: bool, model: int, hardware: int) -> None:
    """Kaplan, section 2.1: 2 forward, 4 backward; a frozen base has no weight gradients; recomputation is a second forward pass."""
    flops = training_flops(10**9, 10**6, method=method, gradient_checkpointing=checkpointing)
    assert (flops.model, flops.hardware, flops.attention) == (model * 1e15, hardware * 1e15, 0)


def test_operations_are_those_of_the_products_one_by_one() -> None:
    """Every linear layer's three products and attention's two, counted by hand on a small Llama: 6ND without the embedding + attention."""
    config = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 176}  # fmt: skip
    tokens, length = 96, 32
    linears = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176) + 64 * 1000  # q o, k v, the MLP, the head
    products = 3 * 2 * linears * tokens  # forward, gradient of the input, gradient of the weight
    scores = 3 * 3 * 2 * 2 * (tokens // length) * 4 * length * length * 16  # layers x (1 forward + 2 backward) x two products of 2bas^2d
    flops = training_flops(config, tokens, sequence_length=length, causal=False)
    assert flops.attention == scores
    without_products = 6 * (1000 * 64 + 64 * 7) * tokens  # the embedding is looked up, the norms multiply: 6ND counts them all the same
    assert flops.model == products + scores + without_products
    assert training_flops(config, tokens, sequence_length=length).attention == scores / 2


def test_recomputation_costs_a_third_more_attention_included() -> None:
    """Korthikanti, appendix A: the second forward pass runs attention again, too."""
    flops = training_flops("llama-2-7b", 1e6, gradient_checkpointing=True, sequence_length=4096)
    assert flops.hardware / flops.model == pytest.approx(4 / 3)


def test_attention_needs_a_sequence_length_of_about_h_to_matter() -> None:
    """12 L h s against 6 * 12 L h^2: at s = 6 h attention is as much as the rest (Korthikanti's s / 6h)."""
    hidden, layers = 1024, 8
    flops = training_flops(12 * layers * hidden**2, 1, layers=layers, hidden=hidden, sequence_length=6 * hidden, causal=False)
    assert flops.attention == flops.model / 2


def test_attention_is_4_forward_and_12_with_the_backward_pass_whatever_is_frozen() -> None:
    """Both factors of attention's products are activations: a frozen base saves none of their gradients."""
    shape = {"layers": 2, "hidden": 8, "sequence_length": 16, "causal": False}
    counted = {method: training_flops(1000, 1, method=method, **shape).attention for method in METHODS}
    assert counted == {method: (4 if method == "inference" else 12) * 2 * 8 * 16 for method in METHODS}


def test_model_of_gpt3_and_of_chinchilla() -> None:
    """GPT-3 states 3.14e23 for 300e9 tokens; Chinchilla 5.76e23 for 70e9 x 1.4e12 (its own count; 6ND is 2 % more)."""
    assert training_flops(174_604_259_328, 300e9).model == pytest.approx(3.14e23, rel=0.002)
    assert training_flops(70e9, 1.4e12).model == pytest.approx(5.76e23, rel=0.022)


# --- published throughputs ----------------------------------------------------------------------------------------------------------------
LLM_FOUNDRY = [  # H100, bf16, 2,048 tokens: layers, hidden, tokens/s per GPU, stated MFU (scripts/train/benchmarking)
    (80, 8192, 1007, 41.25), (48, 7168, 2115, 40.27), (40, 5120, 4952, 41.12), (32, 4096, 9670, 42.2), (32, 2560, 21664, 39.24),
    (24, 2048, 39837, 36.65),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "hidden", "speed", "stated"), LLM_FOUNDRY)
def test_llm_foundrys_mfu(layers: int, hidden: int, speed: float, stated: float) -> None:
    """Their convention is mfu()'s default: 6N + 12 L h s, not halved for the mask, all parameters, dense bf16 peak."""
    shape = {"layers": layers, "hidden": hidden, "sequence_length": 2048}
    assert 100 * mfu(mpt(layers, hidden), tokens_per_gpu_second=speed, gpu="H100-80GB", **shape) == pytest.approx(stated, rel=0.003)


def test_llm_foundrys_hfu_with_checkpointing() -> None:
    """The 70B row: 41.25 % MFU, 55.0 % HFU, for the same tokens per second."""
    shape = {"layers": 80, "hidden": 8192, "sequence_length": 2048}
    speed = {"tokens_per_gpu_second": 1007, "gpu": "H100-80GB"}
    assert 100 * hfu(mpt(80, 8192), gradient_checkpointing=True, **speed, **shape) == pytest.approx(55.0, rel=0.003)
    assert hfu(mpt(80, 8192), gradient_checkpointing=False, **speed, **shape) == mfu(mpt(80, 8192), **speed, **shape)


@pytest.mark.parametrize(("preset", "length", "speed", "stated"), [
    ("llama-3-8b", 8192, 2904, 56.8), ("llama-2-13b", 4096, 2162, 61.1), ("llama-2-70b", 4096, 355, 50.8),
])  # fmt: skip
def test_torchtitans_mfu_on_a100(preset: str, length: int, speed: float, stated: float) -> None:
    """torchtitan's tables for the A100: attention in full, and all parameters; without the looked-up embedding, Kaplan's way, it is less."""
    assert 100 * mfu(preset, tokens_per_gpu_second=speed, gpu="A100-80GB", sequence_length=length) == pytest.approx(stated, abs=0.1)
    rest = count_parameters(preset).total - count_parameters(preset).parts["embedding"]
    shape = {"llama-3-8b": (32, 4096), "llama-2-13b": (40, 5120), "llama-2-70b": (80, 8192)}[preset]
    kaplan = mfu(rest, tokens_per_gpu_second=speed, gpu="A100-80GB", sequence_length=length, layers=shape[0], hidden=shape[1])
    assert 100 * kaplan < stated - 0.1


def test_torchtunes_packed_3b_run() -> None:
    """torchtune, Llama-3.2-3B, full, packed and compiled: 9,174 tokens/s on an A100 is 57 % by 6N alone; unpacked 2,091 is 13 %."""
    packed, padded = (mfu("llama-3.2-3b", tokens_per_gpu_second=speed, gpu="A100-80GB") for speed in (9174, 2091))
    assert (round(100 * packed), round(100 * padded)) == (57, 13)


def test_palms_mfu() -> None:
    """PaLM, appendix B and table 3: 540.35e9 parameters, 118 layers, 48 heads of 256, 2,048 tokens, 238.3K tokens/s on 6,144 TPU v4: 46.2 %."""
    flops = training_flops(540.35e9, 238.3e3, layers=118, hidden=48 * 256, sequence_length=2048, causal=False)
    assert 100 * flops.model / (6144 * 275e12) == pytest.approx(46.2, abs=0.05)


# --- the lecture's sums ---------------------------------------------------------------------------------------------------------------------
def test_lecture_eleven_gpus_take_5261_days() -> None:
    """Lecture B5: 2e12 / (11 * 400) seconds."""
    assert training_time(70e9, 2e12, gpus=11, tokens_per_gpu_second=400).days == pytest.approx(5260.9, abs=0.05)


def test_lecture_2048_gpus_take_28_days_and_cost_3_47_million() -> None:
    """Lecture B5 says 28 days and rounds to $4M; the sum is $3.47M."""
    run = training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=400, price=LECTURE)
    assert (round(run.days, 1), round(run.dollars / 1e6, 2)) == (28.3, 3.47)
    assert run.gpu_hours == pytest.approx(1.389e6, rel=1e-3) and run.mfu is None


@pytest.mark.parametrize(("preset", "gpu_hours", "speed", "share"), [("llama-2-7b", 184_320, 3014, 39), ("llama-2-70b", 1_720_320, 323, 43)])
def test_llama_2s_published_gpu_hours(preset: str, gpu_hours: int, speed: int, share: int) -> None:
    """Llama 2 (arXiv:2307.09288), table 2: what 2e12 tokens took on A100-80GB, and so 323 tokens/s where the lecture has 400."""
    run = training_time(preset, 2e12, gpus=2048, tokens_per_gpu_second=2e12 / (gpu_hours * 3600), gpu="A100-80GB", price=2.5)
    assert run.gpu_hours == pytest.approx(gpu_hours)
    assert (round(run.tokens_per_gpu_second), round(100 * run.mfu)) == (speed, share)
    if preset == "llama-2-70b":
        assert (round(run.days), round(run.dollars / 1e6, 2)) == (35, 4.30)


def test_lecture_alpaca_takes_20_hours_on_7_gpus() -> None:
    """Lecture B6: 2e8 / (7 * 400) seconds."""
    assert training_time(70e9, 2e8, gpus=7, tokens_per_gpu_second=400).hours == pytest.approx(19.8, abs=0.05)


# --- one way to the speed -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_mfu_and_tokens_per_second_are_inverses(method: str) -> None:
    speed = tokens_per_gpu_second_of("llama-3-8b", gpu="L40S", mfu=0.31, method=method, sequence_length=2048)
    assert mfu("llama-3-8b", tokens_per_gpu_second=speed, gpu="L40S", method=method, sequence_length=2048) == pytest.approx(0.31)
    run = training_time("llama-3-8b", 1e9, gpus=4, gpu="L40S", mfu=0.31, method=method, sequence_length=2048)
    assert run.tokens_per_gpu_second == pytest.approx(speed) and run.seconds == pytest.approx(1e9 / (4 * speed))


def test_lora_trains_half_as_many_tokens_again_per_second_at_the_same_utilisation() -> None:
    full, lora = (tokens_per_gpu_second_of(8e9, gpu="A100-80GB", mfu=0.4, method=method) for method in ("full", "lora"))
    assert lora / full == pytest.approx(1.5)


def test_gpus_divide_the_time_and_not_the_gpu_hours() -> None:
    one, many = (training_time(7e9, 1e9, gpus=gpus, gpu="A100-80GB", mfu=0.4, price=2) for gpus in (1, 64))
    assert one.seconds / many.seconds == pytest.approx(64) and one.dollars == pytest.approx(many.dollars)


@pytest.mark.parametrize("way", [
    {}, {"gpu": "A100-80GB"}, {"mfu": 0.4}, {"tokens_per_gpu_second": 400, "mfu": 0.4},
    {"tokens_per_gpu_second": 400, "mfu": 0.4, "gpu": "A100-80GB"},
])  # fmt: skip
def test_speed_is_given_in_exactly_one_way(way: dict[str, object]) -> None:
    with pytest.raises(MemoryMathError, match=r"one way, tokens_per_gpu_second, or gpu and mfu \(typical MFUs: pretraining"):
        training_time(7e9, 1e9, gpus=1, **way)


@pytest.mark.parametrize(("change", "words"), [
    ({"mfu": 45}, "mfu=45"), ({"gpus": 0}, "gpus=0"), ({"gpus": 1.5}, "gpus=1.5"), ({"gpu": "A100"}, "A100-40GB or A100-80GB"),
    ({"price": -1}, "price=-1"), ({"price": 10**400}, "price=10+: expected a number above 0, from 1e-100 to 1e"),
    ({"method": "loar"}, "did you mean 'lora'"), ({"sequence_length": 2048}, "give both, or a model"),
])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(MemoryMathError, match=words):
        training_time(7e9, 1e9, **{"gpus": 1, "gpu": "A100-80GB", "mfu": 0.4, **change})


@pytest.mark.parametrize(("arguments", "keywords", "words"), [
    ((0, 1e9), {}, "params=0"), ((7e9, float("nan")), {}, "tokens=nan"), ((7e9, True), {}, "tokens=True"),
    ((10**400, 1), {}, "params=10+: expected"), ((7e9, 10**400), {}, "tokens=10+: expected"), ((0.3, 1), {}, "params=0.3: expected at least one"),
    (("llama-9", 1), {}, "llama-9"),
    ((7e9, 1), {"layers": 32}, "attention's share needs all three"), ((7e9, 1), {"layers": 32, "sequence_length": 9}, "give both"),
    ((7e9, 1), {"method": "inference", "gradient_checkpointing": True}, "no backward pass"),
])  # fmt: skip
def test_flops_refuses_what_it_cannot_count(arguments: tuple[object, object], keywords: dict[str, object], words: str) -> None:
    with pytest.raises(MemoryMathError, match=words):
        training_flops(*arguments, **keywords)


def test_a_token_goes_through_two_of_mixtrals_eight_experts() -> None:
    """Mixtral (arXiv:2401.04088), section 2: 47B parameters, of which a token uses 13B."""
    assert parameters_of("mixtral-8x7b") == 46_702_792_704
    assert training_flops("mixtral-8x7b", 1).model == 6 * active_parameters_of("mixtral-8x7b")
    assert active_parameters_of("mixtral-8x7b") == 12_879_925_248  # 46.7B less six of eight experts
    assert active_parameters_of("llama-2-7b") == parameters_of("llama-2-7b") and active_parameters_of(7e9) == 7e9


def test_attention_of_an_encoder_decoder_is_refused() -> None:
    assert training_flops("flan-t5-xl", 1).model == 6 * parameters_of("flan-t5-xl")
    with pytest.raises(MemoryMathError, match="encoder-decoder is not counted"):
        training_flops("flan-t5-xl", 1, sequence_length=512)


def test_parameters_may_be_a_number_or_a_model() -> None:
    assert parameters_of("llama-2-70b") == 68_976_648_192 and parameters_of(70e9) == 70_000_000_000
    assert training_time("llama-2-70b", 1e9, gpus=1, tokens_per_gpu_second=1).parameters == 68_976_648_192


def test_table_says_what_was_computed_and_what_was_not() -> None:
    run = training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=400, gpu="A100-80GB", price=gpu_of("A100-80GB").prices[0])
    assert str(run) == run.table()
    for words in ("68,976,648,192", "2,048 x A100-80GB", "28.3 days", "1,388,888.9", "3,472,222.22 at 2.5", "53.1%"):
        assert words in run.table(), words
    bare = training_time(7e9, 60, gpus=1, tokens_per_gpu_second=1).table()
    assert "60.00 seconds" in bare and bare.count(" -") == 2
