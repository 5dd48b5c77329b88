"""In-context learning against a tuned model: cache bytes from published tables, operations and seconds by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from memory_math import MemoryMathError
from memory_math.hardware import LECTURE
from memory_math.in_context import KNOWN_WINDOWS, in_context, kv_cache_bytes
from memory_math.presets import PRESETS

LLAMA = {"shots": 5, "tokens_per_shot": 300, "question_tokens": 200, "answer_tokens": 100}
GPUS = {"gpu": "A100-80GB", "gpus": 4, "mfu": 0.4, "price": LECTURE}
SMALL = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 176, "max_position_embeddings": 512}  # fmt: skip


@pytest.mark.parametrize(("preset", "tokens", "gib"), [
    ("llama-3-8b", 1024, 0.125), ("llama-3-8b", 16000, 1.95), ("llama-3-8b", 128000, 15.62), ("llama-3-70b", 1024, 0.313),
    ("llama-3-70b", 16000, 4.88), ("llama-3-70b", 128000, 39.06),
])  # fmt: skip
def test_cache_of_the_llama_3_1_models(preset: str, tokens: int, gib: float) -> None:
    """huggingface.co/blog/llama31, the table of KV cache sizes in fp16."""
    assert kv_cache_bytes(preset, tokens) / 2**30 == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize(("tokens", "gib"), [(1024, 0.984), (16000, 15.38), (128000, 123.05)])
def test_published_cache_of_the_405b_is_twice_the_models(tokens: int, gib: float) -> None:
    """The same table's 405B rows are of 16 key/value heads; the Llama 3 paper (arXiv:2407.21783, table 3) has 8, which is half of it."""
    with_sixteen = {**PRESETS["llama-3.1-405b"], "num_key_value_heads": 16}
    assert kv_cache_bytes(with_sixteen, tokens) / 2**30 == pytest.approx(gib, abs=0.006)
    assert kv_cache_bytes("llama-3.1-405b", tokens) / 2**30 == pytest.approx(gib / 2, abs=0.006)


def test_cache_is_what_a_built_model_keeps() -> None:
    """transformers' cache after a real forward pass with grouped-query attention, every tensor counted."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"}))
    with torch.no_grad():
        cache = model(torch.zeros(1, 37, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(SMALL, 37, bytes_per_element=4) == kept > 0
    assert kv_cache_bytes(model, 37, bytes_per_element=4) == kept


def test_llama_2_70b_chat_keeps_an_eighth_of_what_it_would_with_64_heads() -> None:
    """Lecture A10's model: 80 layers, 8 key/value heads of 128, 4,096 tokens: 1.25 GiB a request, 10 GiB without grouping."""
    assert kv_cache_bytes("llama-2-70b-chat", 4096) == 1.25 * 2**30
    with_all = {**PRESETS["llama-2-70b"], "num_key_value_heads": 64}
    assert kv_cache_bytes(with_all, 4096) == 10 * 2**30


def test_shots_take_the_window() -> None:
    """Lecture A10: examples take up the context window. 5 x 300 + 200 + 100 of 4,096 tokens; 12 examples fit, 13 do not."""
    asked = in_context("llama-2-70b-chat", **LLAMA)
    assert (asked.context_window, asked.largest_shots, asked.fits) == (4096, 12, True)
    assert asked.few_shot.window_share == 1800 / 4096 and asked.tuned.window_share == 300 / 4096
    assert in_context("llama-2-70b-chat", **{**LLAMA, "shots": 12}).fits is True
    too_many = in_context("llama-2-70b-chat", **{**LLAMA, "shots": 13})
    assert too_many.fits is False and "does not fit; at most 12 examples" in too_many.table()


def test_prefill_operations_by_hand() -> None:
    """2 N T + 2 L a hd T^2: the products of the weights, and half of attention's 4 T^2 per layer and column."""
    asked = in_context("llama-2-70b-chat", **LLAMA)
    assert asked.few_shot.prefill_flops == 2 * 68_976_648_192 * 1700 + 2 * 80 * 8192 * 1700**2
    assert asked.few_shot.prefill_flops > 8.5 * asked.tuned.prefill_flops  # 8.5 times the tokens
    assert asked.few_shot.seconds is None and asked.few_shot.dollars is None and asked.break_even_requests is None


def test_seconds_and_dollars_by_hand() -> None:
    """Prefill at 0.4 of four A100s' 312e12; each answer token reads 138 GB of weights and the cache so far at 4 x 2,039 GB/s."""
    few = in_context("llama-2-70b-chat", **LLAMA, **GPUS).few_shot
    assert few.prefill_seconds == pytest.approx(few.prefill_flops / (4 * 312e12 * 0.4))
    read = sum(2 * 68_976_648_192 + 327_680 * (1700 + position) for position in range(1, 101))
    assert few.decode_seconds == pytest.approx(read / (4 * 2039e9))
    assert few.dollars == pytest.approx((few.prefill_seconds + few.decode_seconds) * 4 * 2.5 / 3600)


def test_requests_answered_together_share_the_reading_of_the_weights_only() -> None:
    alone, together = (in_context("llama-2-70b-chat", **LLAMA, **GPUS, batch_size=size).few_shot for size in (1, 16))
    assert together.prefill_seconds == alone.prefill_seconds
    weights = 100 * 2 * 68_976_648_192 / (4 * 2039e9)
    assert alone.decode_seconds - together.decode_seconds == pytest.approx(weights * 15 / 16)


def test_tuning_pays_off_where_the_examples_have_cost_as_much() -> None:
    asked = in_context("llama-2-70b-chat", **LLAMA, **GPUS, tuning_tokens=2e6, tuning_mfu=0.3)
    assert asked.tuning.gpu_hours * 3600 == pytest.approx(4 * 68_976_648_192 * 2e6 / (312e12 * 0.3))
    requests, saved = asked.break_even_requests, asked.few_shot.dollars - asked.tuned.dollars
    assert (requests - 1) * saved < asked.tuning.dollars <= requests * saved
    full = in_context("llama-2-70b-chat", **LLAMA, **GPUS, tuning_tokens=2e6, tuning_mfu=0.3, tuning_method="full")
    assert full.break_even_requests == pytest.approx(1.5 * requests, abs=2)
    free = in_context("llama-2-70b-chat", **LLAMA, **{**GPUS, "price": None}, tuning_tokens=2e6, tuning_mfu=0.3)
    assert free.break_even_requests == requests and free.few_shot.dollars is None


def test_more_shots_pay_off_sooner() -> None:
    ways = [in_context("llama-2-7b", **{**LLAMA, "shots": shots}, **GPUS, tuning_tokens=1e6).break_even_requests for shots in (1, 4, 12)]
    assert ways[0] > ways[1] > ways[2] > 0


def test_window_is_read_from_the_config_wherever_it_is(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "max_position_embeddings": 777}))
    model = SimpleNamespace(config=SimpleNamespace(**SMALL))
    question = {"shots": 1, "tokens_per_shot": 1, "question_tokens": 1, "answer_tokens": 1}
    windows = [in_context(source, **question).context_window for source in (SMALL, str(tmp_path), model, "gpt2", "smollm2-135m-instruct")]
    assert windows == [512, 777, 512, 1024, 8192]
    assert in_context(SMALL, **question, context_window=99).context_window == 99
    unknown = in_context({key: value for key, value in SMALL.items() if key != "max_position_embeddings"}, **question)
    assert (unknown.context_window, unknown.largest_shots, unknown.fits, unknown.few_shot.window_share) == (None, None, None, None)


def test_a_window_is_of_the_model_that_is_counted(tmp_path) -> None:
    question = {"shots": 1, "tokens_per_shot": 1, "question_tokens": 1, "answer_tokens": 1}
    names = ("meta-llama/Llama-2-70b-hf", "openai-community/gpt2", "GPT2", transformers.GPT2Config(n_positions=99))
    assert [in_context(name, **question).context_window for name in names] == [4096, 1024, 1024, 99]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MemoryMathError, match="cannot be read as JSON"):
        in_context(str(tmp_path), **question)


def test_known_windows_are_for_presets_that_exist() -> None:
    for beginning in KNOWN_WINDOWS:
        assert any(preset.startswith(beginning) for preset in PRESETS), beginning


@pytest.mark.parametrize(("change", "words"), [
    ({"shots": 0}, "shots=0"), ({"answer_tokens": 1.5}, "answer_tokens=1.5"), ({"gpu": "T4"}, "seconds need both"),
    ({"mfu": 0.4}, "seconds need both"), ({"price": 2.5}, "price=2.5 does nothing"), ({"gpus": 4}, "gpus=4 does nothing"),
    ({"tuning_tokens": 1e6}, "tuning_tokens=1000000.0 does nothing"), ({"batch_size": 4}, "batch_size=4 does nothing"),
    ({**GPUS, "tuning_mfu": 0.3}, "tuning_mfu=0.3 does nothing"), ({**GPUS, "mfu": 40}, "mfu=40"), ({**GPUS, "price": -1}, "price=-1"),
    ({**GPUS, "price": 10**400}, "price=10+: expected"),
    ({**GPUS, "tuning_tokens": 1e6, "tuning_mfu": 0}, "mfu=0"), ({**GPUS, "gpu": "A100"}, "A100-40GB or A100-80GB"),
    ({"context_window": 0}, "context_window=0"),
])  # fmt: skip
def test_what_is_wrong_or_does_nothing_is_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(MemoryMathError, match=words):
        in_context("llama-2-7b", **{**LLAMA, **change})


@pytest.mark.parametrize("model", ["flan-t5-xl", "bert-base-uncased"])
def test_only_decoders_learn_in_context(model: str) -> None:
    with pytest.raises(MemoryMathError, match="is for decoders"):
        in_context(model, **LLAMA)


def test_table_sets_both_ways_side_by_side() -> None:
    asked = in_context("llama-2-70b-chat", **LLAMA, **GPUS, tuning_tokens=2e6)
    table = asked.table()
    assert str(asked) == table
    end = f"pays off after {asked.break_even_requests:,} requests"
    for words in ("llama-2-70b-chat: 5 examples of 300 tokens", "5-shot", "562.50 MiB", "43.9%", "4,096 tokens: fits", end):
        assert words in table, words
    bare = in_context(SMALL, **LLAMA).table()
    assert bare.count(" -\n") == 3 and "pays off" not in bare and not math.isnan(in_context(SMALL, **LLAMA).few_shot.prefill_flops)
