"""What prompts count, by their closed forms: every number of the paper's table 4, of PEFT's documentation and of P-tuning v2's code."""

from __future__ import annotations

import pytest
import torch
from closed_forms import (
    linear_parameters,
    multitask_parameters,
    p_tuning_lstm_parameters,
    p_tuning_parameters,
    prefix_mlp_parameters,
    prefix_parameters,
    prompt_parameters,
    residual_parameters,
)
from small_models import build

import lora_lab
from memory_math.architectures import architecture_of
from memory_math.architectures import count_parameters as count_of_preset
from memory_math.ledger.prompts import LENGTHS, TABLE_4, WHY_WRONG
from memory_math.ledger.sizes import prefix_parameters as prefix_of_preset
from memory_math.ledger.sizes import prompt_parameters as prompt_of_preset
from prompt_tuning_lab.counting import count_parameters, percent_text
from prompt_tuning_lab.embeddings import embedding_rms, rms
from prompt_tuning_lab.injection import inject
from prompt_tuning_lab.prompted_model import PromptedModel
from prompt_tuning_lab.summary import summary

WIDTHS = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
BASES = {"small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184, "xxl": 11_135_332_352}


def test_table_4_of_the_paper_is_length_times_width_but_for_its_misprints():
    """Lester et al. 2021, table 4: 30 counts and 30 shares; four of them are misprinted (Small/20, Large/100, and two digits cut off)."""
    wrong = set()
    for size, width in WIDTHS.items():
        preset = f"t5-v1_1-{size}"
        assert count_of_preset(preset) == BASES[size]
        assert architecture_of(preset).hidden == width
        for length, count, share in zip(LENGTHS, *(column.split() for column in TABLE_4[preset]), strict=True):
            trained = prompt_parameters(length, width)
            assert trained == prompt_of_preset(preset, length)
            percent = 100 * trained / (BASES[size] + trained)
            wrong |= {(preset, length, "count")} if int(count.replace(",", "")) != trained else set()
            wrong |= {(preset, length, "share")} if f"{percent:.5f}" != share else set()
    assert wrong == {key for key in WHY_WRONG if key[2] != "total"}
    assert len(wrong) == 4


def test_totals_of_table_4_that_are_misprinted():
    """Lester et al. 2021, table 4: Small/20 prints 76,971,572, XXL/50 prints 11,137,380,352."""
    assert BASES["small"] + prompt_parameters(20, 512) == 76_971_392
    assert BASES["xxl"] + prompt_parameters(50, 4096) == 11_135_537_152


def test_five_tokens_of_t5_xxl_are_20480_parameters():
    """Lester et al. 2021, figure 2: 20,480 for a task, over five orders of magnitude fewer than a copy of the model."""
    assert prompt_parameters(5, 4096) == 20_480
    assert BASES["xxl"] / prompt_parameters(5, 4096) > 10**5
    assert prompt_parameters(100, 4096) == 409_600


@pytest.mark.parametrize(
    ("trained", "expected", "total", "share"),
    [(prompt_parameters(8, 1024), 8_192, 559_222_784, "0.00146489"),
     (prefix_parameters(20, 24, 16, 64), 983_040, 560_197_632, "0.17548093"),
     (prefix_parameters(30, 24, 16, 64), 1_474_560, 560_689_152, None),
     (p_tuning_parameters(20, 1024, 128), 300_288, 559_514_880, "0.05366935")],
)  # fmt: skip
def test_bloomz_560m_counts_as_in_pefts_documentation(trained, expected, total, share):
    """PEFT's documentation, which prints a base of 559,214,592."""
    assert trained == expected
    assert 559_214_592 + trained == total
    assert share is None or f"{100 * trained / total:.8f}" == share


def test_t5_large_counts_half_of_what_peft_prints():
    """T13: PEFT's notebook prints 40,960 for 20 tokens, of which the decoder's half is never used."""
    assert prompt_parameters(20, 1024) == 20_480
    assert f"{100 * 2 * prompt_parameters(20, 1024) / 737_709_056:.8f}" == "0.00555232"


@pytest.mark.parametrize(
    ("preset", "tokens", "expected"),
    [("bert-base-uncased", 1, 18_432), ("bert-large-uncased", 1, 49_152), ("roberta-large", 1, 49_152), ("roberta-large", 128, 6_291_456),
     ("roberta-large", 8, 393_216), ("gpt2", 1, 18_432), ("distilgpt2", 1, 9_216), ("pythia-70m", 1, 6_144), ("smollm2-135m", 1, 11_520),
     ("smollm2-135m", 20, 230_400)],
)  # fmt: skip
def test_prefixes_count_a_key_and_a_value_for_each_layer_and_key_value_head(preset, tokens, expected):
    """P-tuning v2's scripts, and the demo models: SmolLM2's 3 key/value heads (T25), not its 9 heads."""
    shape = architecture_of(preset)
    assert prefix_parameters(tokens, shape.layers, shape.kv_heads, shape.head_dim) == expected == prefix_of_preset(preset, tokens)


def test_p_tuning_v2s_comment_is_a_prefix_mlp_with_a_head():
    """P-tuning v2, sequence_classification.py line 128: "# 9860105" is BERT-base, 5 tokens, an MLP of 512 and a head of 9 labels."""
    assert prefix_mlp_parameters(5, 768, 512, 12) == 393_728 + 9_455_616 + 3_840
    assert prefix_mlp_parameters(5, 768, 512, 12) + linear_parameters(768, 9) == 9_860_105


def test_bert_base_prefix_with_a_head_of_two_counts_as_pefts_docstring():
    assert prefix_parameters(20, 12, 12, 64) + linear_parameters(768, 2) == 370_178


def test_small_forms_equal_what_peft_makes():
    """Counts that PEFT 0.21 prints for P=5, D=32: an LSTM of 16 and two layers, an MLP of 16, three tasks of rank 2 on two submodules."""
    assert p_tuning_lstm_parameters(5, 32, 16, num_layers=2) == 15_072
    assert p_tuning_parameters(5, 32, 16) == 1_504
    assert multitask_parameters(5, 32, num_tasks=3, rank=2, submodules=2) == 572


def test_residual_form_is_2dm_2d_dn():
    """Razdaibiedina et al. 2023 (arXiv:2305.03937)."""
    assert residual_parameters(10, 768, 50) == 2 * 768 * 50 + 2 * 768 + 768 * 10


def test_demo_models_by_their_shapes():
    for preset, expected in (("gpt2", 15_360), ("distilgpt2", 15_360), ("pythia-70m", 10_240), ("smollm2-135m", 11_520)):
        assert prompt_parameters(20, architecture_of(preset).hidden) == expected
    assert percent_text(100 * 11_520 / 134_515_008) == "0.0086"


def test_small_shares_are_not_printed_as_zero():
    """0.00018 % of T5-XXL, and "0.00 %" would hide it."""
    assert [percent_text(value) for value in (0.00018391, 0.0037, 1.0, 0.0)] == ["0.00018", "0.0037", "1.00", "0.00"]


# Models ---------------------------------------------------------------------------------------------------------------------------


def test_a_prompted_model_counts_base_prompts_and_what_trains():
    """Trainable is the active task; the base is what it was before, tied weights once."""
    base = build("gpt2", torch.float32)
    alone = lora_lab.count_parameters(base).base
    prompted = inject(base, 5, task="a")
    inject(prompted, 7, task="b")
    count = count_parameters(prompted)
    assert (count.trainable, count.adapter, count.base, count.total) == (7 * 32, 12 * 32, alone, alone + 12 * 32)
    assert count.trainable_percent == pytest.approx(100 * 7 * 32 / (alone + 12 * 32))
    assert count_parameters(base).base == alone


def test_lora_in_the_base_counts_as_an_adapter_too():
    base = lora_lab.inject(build("gpt2", torch.float32), rank=2)
    lora = lora_lab.count_parameters(base).adapter
    count = count_parameters(inject(base, 5))
    assert lora > 0 and count.adapter == lora + 5 * 32


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [("prompt", {}, prompt_parameters(4, 32)), ("p-tuning", {"encoder_hidden_size": 12}, p_tuning_parameters(4, 32, 12)),
     ("residual", {"encoder_hidden_size": 10}, residual_parameters(4, 32, 10)), ("prefix", {}, prefix_parameters(4, 2, 4, 8)),
     ("prefix", {"prefix_projection": True, "encoder_hidden_size": 12}, prefix_mlp_parameters(4, 32, 12, 2))],
    ids=["prompt", "p-tuning", "residual", "prefix", "prefix with MLP"],
)  # fmt: skip
def test_each_methods_closed_form_is_what_it_has(method, more, expected):
    prompted = inject(build("gpt2", torch.float32), 4, method=method, **more)
    assert count_parameters(prompted).trainable == expected == sum(p.numel() for p in prompted.prompt().parameters())


def test_a_prefix_counts_key_value_heads_not_query_heads():
    """T25: the small Llama has 4 heads and 2 key/value heads of 8."""
    assert count_parameters(inject(build("llama", torch.float32), 3, method="prefix")).trainable == prefix_parameters(3, 2, 2, 8)


def test_the_summary_has_a_line_for_each_task():
    prompted = inject(build("gpt2", torch.float32), 5, task="first", top_n=60)
    inject(prompted, 4, method="p-tuning", encoder_hidden_size=12, task="second", init="random")
    head, first, second, scale, totals = summary(prompted).splitlines()
    assert head.split() == ["task", "method", "tokens", "parameters", "file", "bytes", "state", "rms", "began", "as"]
    assert all(part in first for part in ("first", "prompt", "5", "160", "640", "off, frozen", f"{rms(prompted.prompt('first')()):.3g}"))
    assert all(part in second for part in ("p-tuning (12 hidden)", f"{p_tuning_parameters(4, 32, 12):,}", "512", "active, trains", "random"))
    assert f"{embedding_rms(prompted.base):.3g}" in scale
    assert totals == str(count_parameters(prompted))


def test_the_summary_of_a_model_without_tasks_says_so():
    assert summary(PromptedModel(build("gpt2", torch.float32))).startswith("no tasks\n")
