"""LoRA: the counts that papers, libraries and tutorials print, and the sizes and ratios of the LoRA paper's section 4.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..architectures import LinearLayer, count_parameters
from ..precision import ADAPTER_BYTES, precision_of
from ..time_and_cost import training_time
from .rows import Rows
from .sizes import lora_elements, lora_parameters, stacked

QV, BERT_QV, T5_QV = ("q_proj", "v_proj"), ("query", "value"), ("q", "v")
QKVUD = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
LORA, DORA, QLORA = "arXiv:2106.09685 (LoRA)", "arXiv:2402.09353 (DoRA), table 1", "QLoRA's qlora.py, as it counts"
PEFT, INT8 = "PEFT 0.21, default targets", "PEFT's int8 notebooks"
ALPACA, TUNE, LITGPT = "alpaca-lora, finetune.py", "torchtune, lora_finetune.rst", "litgpt, resource tables"
SUM = "r (in + out), summed over the adapted layers."

COUNTS: tuple[tuple[str, str, int, str | Sequence[str], str], ...] = (  # where, model, rank, targets, stated
    (f"{LORA}, by the shapes", "roberta-base", 8, BERT_QV, "294,912"), (f"{LORA}, by the shapes", "roberta-large", 8, BERT_QV, "786,432"),
    ("PEFT README", "qwen2.5-3b", 16, QV, "3,686,400"), ("PEFT docs, troubleshooting", "flan-t5-small", 8, T5_QV, "344,064"),
    ("PEFT docstring", "t5-base", 8, T5_QV, "884,736"), (INT8, "flan-t5-large", 16, T5_QV, "4,718,592"),
    (PEFT, "gpt2", 8, ("c_attn",), "294,912"), (PEFT, "gpt2-medium", 8, ("c_attn",), "786,432"), (PEFT, "gpt2-large", 8, ("c_attn",), "1,474,560"),
    (PEFT, "gpt2-xl", 8, ("c_attn",), "2,457,600"), ("PEFT 0.21", "gpt2", 8, "all-linear", "1,179,648"),
    (ALPACA, "llama-7b", 8, QV, "4,194,304"), ("alpaca-lora README", "llama-7b", 16, "attention", "16,777,216"),
    (QLORA, "llama-7b", 64, "all-linear", "159,907,840"), (QLORA, "llama-13b", 64, "all-linear", "250,347,520"),
    (QLORA, "llama-33b", 64, "all-linear", "487,587,840"), (QLORA, "llama-65b", 64, "all-linear", "799,539,200"),
    (LITGPT, "llama-2-7b", 8, QV, "4,194,304"), (LITGPT, "llama-2-13b", 8, QV, "6,553,600"), (TUNE, "llama-2-7b", 8, QV, "4,194,304"),
    ("shapes with grouped queries", "llama-3.1-8b", 16, QV, "6,815,744"), (DORA, "llama-7b", 32, QKVUD, "56,098,816"),
    (DORA, "llama-13b", 32, QKVUD, "87,818,240"),
)  # fmt: skip
DORA_COUNTS = (("llama-7b", 32, "56,975,360"), ("llama-7b", 16, "28,925,952"), ("llama-13b", 32, "89,190,400"))
BY_SHAPE = (  # where, what, adapted matrices, rank, stated: families that are not read from a config, and fused layers adapted in parts
    (LITGPT, "phi-1.5, rank 8, q and v", stacked(48, 2048, 2048), 8, "1,572,864"),
    (LITGPT, "StableLM-3B, rank 8, q and v", stacked(32, 4096, 4096), 8, "2,097,152"),
    (f"{LORA}, released script", "DeBERTa-XXL, rank 16, q and v", stacked(96, 1536, 1536), 16, "4,718,592"),
    (f"{LORA}, released checkpoint", "GPT-2 medium, rank 4, q and v", stacked(48, 1024, 1024), 4, "393,216"),
    (f"{LORA}, by the shapes", "GPT-2 large, rank 4, q and v", stacked(72, 1280, 1280), 4, "737,280"),
)
IN_MILLIONS = (  # where, what, adapted matrices, rank, stated, why
    (f"{LORA}, table 2", "RoBERTa-base, rank 8, q and v", stacked(24, 768, 768), 8, "0.3", "294,912: the task's head is not counted."),
    (f"{LORA}, table 2", "RoBERTa-large, rank 8, q and v", stacked(48, 1024, 1024), 8, "0.8", "786,432: the task's head is not counted."),
    (f"{LORA}, table 2", "DeBERTa-XXL, rank 16, q and v", stacked(96, 1536, 1536), 16, "4.7", "The script's rank; table 10 says 8, which is half."),
    ("loralib README", "RoBERTa-base, rank 8, q and v", stacked(24, 768, 768), 8, "0.8",
     "It is 294,912; with the head of a task of two classes it would be 887,042."),
    (f"{LORA}, table 3", "GPT-2 medium, rank 4, q and v", stacked(48, 1024, 1024), 4, "0.35", "It is 393,216, as in the released checkpoint."),
    (f"{LORA}, table 3", "GPT-2 large, rank 4, q and v", stacked(72, 1280, 1280), 4, "0.77", "It is 737,280 by the shapes."),
)  # fmt: skip
GPT3_BUDGETS = (  # tables 4, 5, 15: matrices of 12,288 x 12,288 in each of 96 blocks, their rank, millions as printed
    ("q and v at rank 1", 2, 1, "4.7"), ("q and v at rank 2", 2, 2, "9.4"), ("q, k, v and o at rank 1", 4, 1, "9.4"),
    ("q and v at rank 4", 2, 4, "18.8"), ("q, k, v and o at rank 2", 4, 2, "18.8"), ("one matrix at rank 8", 1, 8, "18.8"),
    ("q and v at rank 8", 2, 8, "37.7"), ("q, k, v and o at rank 4", 4, 4, "37.7"), ("q and v at rank 64", 2, 64, "301.9"),
    ("q, k, v and o at rank 64", 4, 64, "603.8"),
)  # fmt: skip
SHARES = (  # where, model, rank, targets, whether DoRA, per cent as printed, of the base with its adapter
    ("PEFT README", "qwen2.5-3b", 16, QV, False, "0.1193"), (ALPACA, "llama-7b", 8, QV, False, "0.0622"), (TUNE, "llama-2-7b", 8, QV, False, "0.06"),
    (INT8, "flan-t5-large", 16, T5_QV, False, "0.5989"), (DORA, "llama-7b", 32, QKVUD, False, "0.83"), (DORA, "llama-7b", 32, QKVUD, True, "0.84"),
    (DORA, "llama-7b", 16, QKVUD, True, "0.43"), (DORA, "llama-13b", 32, QKVUD, False, "0.67"), (DORA, "llama-13b", 32, QKVUD, True, "0.68"),
    (DORA, "llama-13b", 16, QKVUD, True, "0.35"),
)  # fmt: skip
TOTALS = (  # where, model, rank, targets, base and adapter
    ("PEFT README", "qwen2.5-3b", 16, QV, "3,089,625,088"), (ALPACA, "llama-7b", 8, QV, "6,742,609,920"),
    (TUNE, "llama-2-7b", 8, QV, "6,742,609,920"), (INT8, "flan-t5-large", 16, T5_QV, "787,868,672"),
    ("PEFT docs, FLAN-T5", "flan-t5-xxl", 16, T5_QV, "11,154,206,720"),
)  # fmt: skip


def counts() -> Rows:
    rows = Rows("LoRA", "printed counts of adapters")
    for where, model, rank, targets, stated in COUNTS:
        names = targets if isinstance(targets, str) else ", ".join(targets)
        rows.number(f"{model}, rank {rank}, {names}", stated, lora_parameters(model, rank, targets), "parameters", SUM, where=where)
    for where, what, layers, rank, stated in BY_SHAPE:
        rows.number(what, stated, lora_elements(layers, rank), "parameters", SUM, where=where)
    for model, rank, stated in DORA_COUNTS:
        found = lora_parameters(model, rank, QKVUD, dora=True)
        rows.number(f"DoRA on {model}, rank {rank}", stated, found, "parameters", "LoRA's, and a magnitude for each output.", where=DORA)
    _with_heads(rows)
    return rows


def _with_heads(rows: Rows) -> None:
    """Adapters with a head that is trained in full."""
    vit = lora_elements(stacked(24, 768, 768), 16) + LinearLayer("classifier", 768, 101, bias=True).parameters
    rows.number(
        "ViT-B, rank 16, q and v, head of 101 classes", "667,493", vit, "parameters", "589,824, and 768 x 101 + 101.", where="PEFT docs, lora.md"
    )
    head = LinearLayer("dense", 768, 768, bias=True).parameters + LinearLayer("out_proj", 768, 2, bias=True).parameters
    roberta = lora_elements(stacked(24, 768, 768), 8) + head
    rows.number("RoBERTa-base, rank 8, q and v, head of 2 classes", "887,042", roberta, "parameters", "294,912 and 592,130.", where="PEFT 0.21")
    last = LinearLayer("seq.4", 2000, 2, bias=True).parameters
    mlp = lora_elements([LinearLayer("seq.0", 20, 2000), LinearLayer("seq.2", 2000, 2000)], 8) + last
    why = "The page counts the head twice, the copy that trains and the original, which does not."
    rows.number("an MLP of 20, 2,000, 2,000 and 2, rank 8, and its head", "56,164", mlp, "parameters", why, assuming=mlp + last,
                where="PEFT docs, custom_models.md")  # fmt: skip


def printed() -> Rows:
    rows = Rows("LoRA-millions", f"{LORA}, tables 4, 5 and 15")
    for where, what, layers, rank, stated, why in IN_MILLIONS:
        rows.number(what, stated, lora_elements(layers, rank) / 1e6, "million parameters", why, where=where)
    for what, matrices, rank, stated in GPT3_BUDGETS:
        found = lora_elements(stacked(96 * matrices, 12288, 12288), rank)
        rows.number(f"GPT-3, {what}", stated, found / 1e6, "million parameters", f"It is {found:,}.")
    found = lora_elements(stacked(96 * 4, 12288, 12288), 2)
    why = f"A slip: {found:,} at rank 2; 37.7 million are rank 4, as table 15 has it."
    rows.number("GPT-3, q, k, v and o at rank 2, in the text", "37.7", found / 1e6, "million parameters", why, where=f"{LORA}, appendix D.4")
    found = lora_parameters("llama-7b", 64, "all-linear")
    why = f"The script halves its count under 4 bit, as if adapters were packed, too; {found:,} train."
    rows.number("llama-7b, rank 64, all-linear", "79.953920", found / 1e6, "million parameters", why, where="QLoRA's qlora.py, as it prints")
    square = LinearLayer("w", 4096, 4096).weights
    rows.number("4,096 x 4,096", "15", square / 1e6, "million", f"It is {square:,}.", where=TUNE)
    return rows


def shares() -> Rows:
    rows = Rows("LoRA-share", "printed shares of parameters that train")
    for where, model, rank, targets, dora, stated in SHARES:
        adapter = lora_parameters(model, rank, targets, dora=dora)
        share = 100 * adapter / (count_parameters(model) + adapter)
        kind = "DoRA" if dora else "LoRA"
        rows.number(f"{kind} on {model}, rank {rank}", stated, share, "%", f"{adapter:,} of base and adapter together.", where=where)
    for where, model, rank, targets, stated in TOTALS:
        total = count_parameters(model) + lora_parameters(model, rank, targets)
        rows.number(f"{model} with LoRA of rank {rank}", stated, total, "parameters", "Base and adapter, each tensor once.", where=where)
    return rows


def gpt3() -> Rows:
    rows = Rows("LoRA-GPT3", f"{LORA}, abstract and section 4.2")
    count, half = count_parameters("gpt3-175b"), precision_of("fp16").trained
    adapter = lora_elements(stacked(192, 12288, 12288), 4)
    full, small = count * half / 1e9, adapter * half / 1e6
    rows.number("checkpoint of GPT-3", "350", full, "GB", "2 bytes a parameter.")
    why = f"{adapter:,} x 2 bytes are {small:.1f} MB, or {adapter * half / 2**20:.1f} MiB."
    rows.number("checkpoint of its adapter, rank 4 on q and v", "35", small, "MB", why)
    rows.number("times fewer trained parameters", "10,000", count / adapter, "x", "At rank 4 on q and v; at rank 1 it is four times that.")
    hundred = 350 + 100 * 35 / 1000
    rows.number(
        "100 tasks with adapters",
        "354",
        full + 100 * small / 1e3,
        "GB",
        f"By the paper's own 350 GB and 35 MB it is {hundred:.1f}.",
        assuming=hundred,
    )
    rows.number("100 tasks without", "35", 100 * full / 1e3, "TB", "100 copies.")
    before, after = (training_time(count.total, 1e9, gpus=1, tokens_per_gpu_second=speed).hours for speed in (32.5, 43.1))
    more, less = 100 * (before / after - 1), 100 * (1 - after / before)
    why = f"{more:.1f} % more tokens per second; 25 holds for the time, which is {less:.1f} % less."
    rows.number("speed-up of 43.1 over 32.5 tokens per second", "25", more, "%", why, assuming=less)
    where = "PEFT, method_comparison/MetaMathQA"
    lora = lora_parameters("llama-3.2-3b", 32) * ADAPTER_BYTES / 1e6
    rows.number("file of Llama-3.2-3B's adapter, rank 32 on q and v", "36.7", lora, "MB", "In float32.", where=where)
    rows.number("file of the fully tuned model", "6.43", count_parameters("llama-3.2-3b") * half / 1e9, "GB", "In 16 bit.", where=where)
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (counts, printed, shares, gpt3)
