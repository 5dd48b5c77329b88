"""Published numbers of trainable parameters, by injecting into models of the published shapes on the meta device (no weights).

One row a figure: where it is printed, the exact number, and what is printed there. A printed figure is right when the exact number
rounds or truncates to it; the ones that are not right stand in the table too, with the reason, and the test that finds them wrong
would fail if they were right. Linear layers add rank * (in + out) parameters, DoRA out more.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lab

Q_V, ATTENTION = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
OPT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
DORA_PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


# Models ---------------------------------------------------------------------------------------------------------------------------


def llama(hidden, feed_forward, layers, kv_heads=None, cls=transformers.LlamaForCausalLM, config=transformers.LlamaConfig, **more):
    heads = hidden // 128
    return cls(config(hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
                      num_key_value_heads=kv_heads or heads, **{"vocab_size": 32000, **more}))  # fmt: skip


def gpt2(hidden, layers, heads, **more):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, **more))


def roberta(hidden, layers, cls=transformers.RobertaModel, **more):
    return cls(transformers.RobertaConfig(vocab_size=50265, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
                                          intermediate_size=4 * hidden, max_position_embeddings=514, type_vocab_size=1, **more))  # fmt: skip


def t5(hidden, layers, heads, feed_forward, flan, cls=transformers.T5ForConditionalGeneration):
    """T5 1.1 and Flan-T5 have gated feed-forward layers, an untied head, and (small) inner dimensions other than the hidden one."""
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if flan else {}
    return cls(transformers.T5Config(d_model=hidden, d_kv=64, d_ff=feed_forward, num_layers=layers, num_heads=heads, **gated))


MODELS = {
    "roberta-base": lambda: roberta(768, 12),
    "roberta-base, 2 classes": lambda: roberta(768, 12, transformers.RobertaForSequenceClassification, num_labels=2),
    "roberta-large": lambda: roberta(1024, 24),
    "deberta-v2-xxlarge": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(
        hidden_size=1536, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=24, relative_attention=True, share_att_key=True,
        pos_att_type=["p2c", "c2p"], max_relative_positions=-1, position_buckets=256, norm_rel_ebd="layer_norm", position_biased_input=False,
        conv_kernel_size=3, conv_act="gelu", type_vocab_size=0)),
    "gpt2": lambda: gpt2(768, 12, 12),
    "gpt2-medium": lambda: gpt2(1024, 24, 16),
    "gpt2-large": lambda: gpt2(1280, 36, 20),
    "gpt2-xl": lambda: gpt2(1600, 48, 25),
    "gpt3-175b, fused": lambda: gpt2(12288, 96, 96, n_positions=2048),
    "gpt3-175b": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(hidden_size=12288, word_embed_proj_dim=12288, ffn_dim=49152,
                                                                            num_hidden_layers=96, num_attention_heads=96)),
    "llama-7b": lambda: llama(4096, 11008, 32),
    "llama-13b": lambda: llama(5120, 13824, 40),
    "llama-33b": lambda: llama(6656, 17920, 60),
    "llama-65b": lambda: llama(8192, 22016, 80),
    "llama-2-70b": lambda: llama(8192, 28672, 80, kv_heads=8),
    "qwen2.5-3b": lambda: llama(2048, 11008, 36, kv_heads=2, cls=transformers.Qwen2ForCausalLM, config=transformers.Qwen2Config,
                                vocab_size=151936, tie_word_embeddings=True),
    "vit-base, 101 classes": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=101)),
    "flan-t5-small, T5Model": lambda: t5(512, 8, 6, 1024, flan=True, cls=transformers.T5Model),
    "flan-t5-large": lambda: t5(1024, 24, 16, 2816, flan=True),
    "t5-base": lambda: t5(768, 12, 12, 3072, flan=False),
    "phi-1.5": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32)),
    "stablelm-base-alpha-3b": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        hidden_size=4096, intermediate_size=16384, num_hidden_layers=16, num_attention_heads=32)),
    "mlp": lambda: nn.ModuleDict({"seq": nn.Sequential(nn.Linear(20, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 2))}),
}  # fmt: skip


@functools.cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


# The table ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One published figure.

    trainable: the exact number, the adapter's and the head's.  head: a module that trains beside the adapter, counted in full.
    printed: the text at the source, a number ("4.7M", "4,718,592") or a share of all parameters ("0.1193 %"); "" where only the shapes
    are published.  total: base + adapter, where the source states it.  wrong: why the printed figure is not the exact number.
    """

    source: str
    model: str
    request: dict[str, Any]
    trainable: int
    printed: str = ""
    total: int | None = None
    head: str = ""
    wrong: str = ""


def lora(rank, targets, **more):
    return {"rank": rank, "target_modules": targets, **more}


PAPER = "LoRA paper (arXiv:2106.09685)"
DORA = "DoRA paper (arXiv:2402.09353) T1"
ROWS = [
    Row(f"{PAPER} T2, T9", "roberta-base", lora(8, ["query", "value"]), 294_912, "0.3M"),
    Row("loralib README", "roberta-base", lora(8, ["query", "value"]), 294_912, "0.8M",
        wrong="unexplained: 12 * 2 * 8 * 1536 as in the paper; with a classifier of two classes it is 887,042"),
    Row("loralib README, with the classifier", "roberta-base, 2 classes", lora(8, ["query", "value"]), 887_042, head="classifier"),
    Row(f"{PAPER} T2, T9", "roberta-large", lora(8, ["query", "value"]), 786_432, "0.8M"),
    Row(f"{PAPER} T2 and its NLU script, r=16", "deberta-v2-xxlarge", lora(16, ["query_proj", "value_proj"]), 4_718_592, "4.7M"),
    Row(f"{PAPER} T10, r=8", "deberta-v2-xxlarge", lora(8, ["query_proj", "value_proj"]), 2_359_296, "4.7M",
        wrong="T10 says r=8; the script that made the result has r=16, which gives the 4.7M"),
    # The paper adapts q and v apart; on the fused c_attn the same rank has as many parameters: r (d + 3 d) = 2 r (d + d).
    Row(f"{PAPER} T3, T11", "gpt2-medium", lora(4, ["c_attn"]), 393_216, "0.35M",
        wrong="24 * 2 * 4 * 2048; the released checkpoint of 1.5 MB holds 393,216 float32 values"),
    Row(f"{PAPER} T3, T11", "gpt2-large", lora(4, ["c_attn"]), 737_280, "0.77M", wrong="36 * 2 * 4 * 2560"),
    Row(f"{PAPER} T4, T15, r_q=r_v=1", "gpt3-175b", lora(1, Q_V), 4_718_592, "4.7M"),
    Row(f"{PAPER} T15, r_v=2", "gpt3-175b", lora(2, ["v_proj"]), 4_718_592, "4.7M"),
    Row(f"{PAPER} T4, the fused layer", "gpt3-175b, fused", lora(1, ["c_attn"]), 4_718_592, "4.7M"),
    Row(f"{PAPER} T15, r_q=r_v=2", "gpt3-175b", lora(2, Q_V), 9_437_184, "9.4M"),
    Row(f"{PAPER} T15, all four r=1", "gpt3-175b", lora(1, OPT_ATTENTION), 9_437_184, "9.4M"),
    Row(f"{PAPER} T15, r_q=r_v=4", "gpt3-175b", lora(4, Q_V), 18_874_368, "18.8M"),
    Row(f"{PAPER} T5, r_q=r_v=4", "gpt3-175b", lora(4, Q_V), 18_874_368, "18M"),
    Row(f"{PAPER} T5, all four r=2", "gpt3-175b", lora(2, OPT_ATTENTION), 18_874_368, "18M"),
    Row(f"{PAPER} T5, one matrix r=8", "gpt3-175b", lora(8, ["q_proj"]), 18_874_368, "18M"),
    Row(f"{PAPER} T4, T15, r_q=r_v=8", "gpt3-175b", lora(8, Q_V), 37_748_736, "37.7M"),
    Row(f"{PAPER} T15, all four r=4", "gpt3-175b", lora(4, OPT_ATTENTION), 37_748_736, "37.7M"),
    Row(f"{PAPER} appendix D.4, all four r=2", "gpt3-175b", lora(2, OPT_ATTENTION), 18_874_368, "37.7M",
        wrong="a slip of the text: T15 has this figure at r=4"),
    Row(f"{PAPER} T15, r_q=r_v=64", "gpt3-175b", lora(64, Q_V), 301_989_888, "301.9M"),
    Row(f"{PAPER} T15, all four r=64", "gpt3-175b", lora(64, OPT_ATTENTION), 603_979_776, "603.8M", wrong="twice the truncated 301.9M"),
    Row("PEFT README", "qwen2.5-3b", lora(16, Q_V), 3_686_400, "0.1193 %", total=3_089_625_088),
    Row("PEFT docs, image classification notebook", "vit-base, 101 classes", lora(16, Q_V), 667_493, "667,493", total=86_466_149, head="classifier"),
    Row("PEFT docs, lora.md: 667,493 of 86,543,818", "vit-base, 101 classes", lora(16, Q_V), 667_493, "0.7713 %", total=86_466_149,
        head="classifier", wrong="modules_to_save keeps the head twice, and 'all parameters' counts both; the share is 0.7720 %"),
    Row("PEFT docs, troubleshooting.md", "flan-t5-small, T5Model", lora(8, ["q", "v"]), 344_064, "344,064", total=60_855_680),
    Row("PEFT docstring of T5", "t5-base", lora(8, ["q", "v"]), 884_736, "884,736", total=223_788_288),
    Row("PEFT int8 notebooks", "flan-t5-large", lora(16, ["q", "v"]), 4_718_592, "4,718,592"),
    Row("PEFT docs, custom_models.md", "mlp", lora(8, ["seq.0", "seq.2"]), 52_162, "56,164", head="seq.4",
        wrong="an older count: the head of 4,002 parameters twice"),
    Row("PEFT's default for GPT-2", "gpt2", lora(8, ["c_attn"]), 294_912),
    Row("PEFT's default for GPT-2", "gpt2-medium", lora(8, ["c_attn"]), 786_432),
    Row("PEFT's default for GPT-2", "gpt2-large", lora(8, ["c_attn"]), 1_474_560),
    Row("PEFT's default for GPT-2", "gpt2-xl", lora(8, ["c_attn"]), 2_457_600),
    Row("PEFT all-linear", "gpt2", lora(8, "all-linear"), 1_179_648),
    Row("alpaca-lora finetune.py", "llama-7b", lora(8, Q_V), 4_194_304, "0.0622 %", total=6_742_609_920),
    Row("alpaca-lora README, official weights", "llama-7b", lora(16, ATTENTION), 16_777_216),
    Row("torchtune lora_finetune.rst", "llama-7b", lora(8, Q_V), 4_194_304, "0.06 %", total=6_742_609_920),
    Row("QLoRA qlora.py", "llama-7b", lora(64, "all-linear"), 159_907_840, "79,953,920", wrong="qlora.py line 418 halves the count at 4 bits"),
    Row("QLoRA's setting", "llama-13b", lora(64, "all-linear"), 250_347_520),
    Row("QLoRA's setting", "llama-33b", lora(64, "all-linear"), 487_587_840),
    Row("QLoRA's setting", "llama-65b", lora(64, "all-linear"), 799_539_200),
    Row("the same shapes, grouped queries", "llama-2-70b", lora(8, Q_V), 16_384_000),
    Row("litgpt resource-tables", "phi-1.5", lora(8, Q_V), 1_572_864, "1,572,864"),
    Row("litgpt resource-tables (q and v of the fused layer)", "stablelm-base-alpha-3b", lora(8, ["query_key_value"]), 2_097_152, "2,097,152"),
    Row("litgpt resource-tables", "llama-7b", lora(8, Q_V), 4_194_304, "4,194,304"),
    Row("litgpt resource-tables", "llama-13b", lora(8, Q_V), 6_553_600, "6,553,600"),
    Row(f"{DORA}, LoRA r=32", "llama-7b", lora(32, DORA_PAPER), 56_098_816, "0.83 %"),
    Row(f"{DORA}, DoRA r=32", "llama-7b", lora(32, DORA_PAPER, variant="dora"), 56_975_360, "0.84 %"),
    Row(f"{DORA}, DoRA r=16", "llama-7b", lora(16, DORA_PAPER, variant="dora"), 28_925_952, "0.43 %"),
    Row(f"{DORA}, LoRA r=32", "llama-13b", lora(32, DORA_PAPER), 87_818_240, "0.67 %"),
    Row(f"{DORA}, DoRA r=32", "llama-13b", lora(32, DORA_PAPER, variant="dora"), 89_190_400, "0.68 %"),
    Row(f"{DORA}, DoRA r=16", "llama-13b", lora(16, DORA_PAPER, variant="dora"), 45_281_280, "0.35 %"),
]  # fmt: skip


def name_of(row: Row) -> str:
    return f"{row.source}: {row.model}"


def head_parameters(base: nn.Module, row: Row) -> int:
    return sum(p.numel() for p in base.get_submodule(row.head).parameters()) if row.head else 0


def base_parameters(base: nn.Module) -> int:
    return sum(p.numel() for p in base.parameters())


def agrees(printed: str, exact: float) -> bool:
    """The number rounds or truncates to the printed text: less than one unit of its last digit away, and not above when truncated."""
    text, unit = re.fullmatch(r"([\d,.]+)\s*([M%]?)", printed).groups()
    value, step = float(text.replace(",", "")), 10.0 ** -len(text.partition(".")[2])
    exact = exact / 1e6 if unit == "M" else exact
    return abs(exact - value) <= step / 2 or 0 <= exact - value < step


# The tests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_exact_number_is_what_inject_adds(row):
    base = model(row.model)
    before = base_parameters(base)
    planned = lora_lab.plan(base, **row.request)
    lora_lab.inject(base, **row.request)
    try:
        count = lora_lab.count_parameters(base)
        head = head_parameters(base, row)
    finally:
        lora_lab.eject(base)
    assert count.adapter == count.trainable == planned.parameters == row.trainable - head
    assert count.base == before == base_parameters(base)
    if row.total is not None:
        assert count.total == row.total


@pytest.mark.parametrize("row", [row for row in ROWS if row.printed], ids=name_of)
def test_a_printed_figure_agrees_with_the_exact_number_unless_the_table_says_why_not(row):
    adapter = row.trainable - head_parameters(model(row.model), row)
    exact = 100 * row.trainable / (base_parameters(model(row.model)) + adapter) if "%" in row.printed else row.trainable
    assert agrees(row.printed, exact) == (not row.wrong), f"{row.printed} for {exact:,}"


def test_agreement_is_strict_enough_to_find_a_wrong_digit():
    assert agrees("4.7M", 4_718_592) and agrees("18.8M", 18_874_368) and agrees("18M", 18_874_368) and agrees("4,718,592", 4_718_592)
    assert not agrees("4.6M", 4_718_592) and not agrees("18.9M", 18_774_368) and not agrees("4,718,593", 4_718_592) and not agrees("0.35M", 393_216)
    assert agrees("0.0622 %", 0.06220) and not agrees("0.0622 %", 0.0623)
