"""Prompt and prefix tuning: Lester et al.'s table 4 with its misprints, and the counts that other projects print."""

from __future__ import annotations

from collections.abc import Callable

from ..architectures import LinearLayer, architecture_of, count_parameters
from ..precision import ADAPTER_BYTES
from .rows import Rows
from .sizes import prefix_parameters, prompt_parameters

PAPER, PEFT, SCRIPTS = "arXiv:2104.08691 (prompt tuning)", "PEFT docs", "arXiv:2110.07602 (P-tuning v2)"
LENGTHS = (1, 5, 20, 50, 100, 150)
TABLE_4 = {  # preset -> trained parameters, and per cent of all, for each length, as printed
    "t5-v1_1-small": ("512 2,560 10,420 25,600 51,200 76,800", "0.00067 0.00333 0.01330 0.03325 0.06648 0.09969"),
    "t5-v1_1-base": ("768 3,840 15,360 38,400 76,800 115,200", "0.00031 0.00155 0.00620 0.01551 0.03101 0.04651"),
    "t5-v1_1-large": ("1,024 5,120 20,480 51,200 102,400 153,600", "0.00013 0.00065 0.00262 0.00654 0.01907 0.01961"),
    "t5-v1_1-xl": ("2,048 10,240 40,960 102,400 204,800 307,200", "0.00007 0.00036 0.00143 0.00359 0.00718 0.01078"),
    "t5-v1_1-xxl": ("4,096 20,480 81,920 204,800 409,600 614,400", "0.00004 0.00018 0.00074 0.00184 0.00368 0.00552"),
}
TOTALS = (("t5-v1_1-small", 20, "76,971,572"), ("t5-v1_1-xxl", 50, "11,137,380,352"))  # those that do not add up
WHY_WRONG = {
    ("t5-v1_1-small", 20, "count"): "Misprint: 20 x 512 = 10,240; two digits changed places, in the total, too.",
    ("t5-v1_1-large", 100, "share"): "Misprint: 102,400 of 783,252,480 are 0.01307 %.",
    ("t5-v1_1-xl", 20, "share"): "0.00144 %, rounded: the last digit was cut off.",
    ("t5-v1_1-xl", 100, "share"): "0.00719 %, rounded: the last digit was cut off.",
    ("t5-v1_1-small", 20, "total"): "Misprint: 76,961,152 + 10,240 = 76,971,392.",
    ("t5-v1_1-xxl", 50, "total"): "Misprint: 11,135,332,352 + 204,800 = 11,135,537,152.",
}


def table_4() -> Rows:
    rows = Rows("Lester", f"{PAPER}, table 4")
    for model, (trained, shares) in TABLE_4.items():
        base = count_parameters(model)
        for length, count, share in zip(LENGTHS, trained.split(), shares.split(), strict=True):
            found = prompt_parameters(model, length)
            what, percent = f"{model}, {length} tokens", 100 * found / (base + found)
            rows.number(f"{what}: trained", count, found, "parameters", WHY_WRONG.get((model, length, "count"), "Length x width of the embedding."))
            rows.number(f"{what}: share", share, percent, "%", WHY_WRONG.get((model, length, "share"), "Of model and prompt together."))
    for model, length, stated in TOTALS:
        total = count_parameters(model) + prompt_parameters(model, length)
        rows.number(f"{model}, {length} tokens: total", stated, total, "parameters", WHY_WRONG[model, length, "total"])
    return rows


def prompts() -> Rows:
    rows = Rows("Prompt", "Length x width, by the shapes")
    large, smol = "t5-large", "smollm2-135m"
    _of_lester(rows)
    twice = 2 * prompt_parameters(large, 20)
    why = "PEFT allocates 40 rows for an encoder-decoder and uses the first 20; the other half never has a gradient."
    rows.number("t5-large, 20 tokens", "40,960", prompt_parameters(large, 20), "parameters", why, assuming=twice, where=PEFT)
    total = count_parameters(large) + twice
    rows.number("t5-large with them", "737,709,056", total, "parameters", "With the rows that are not used.", where=PEFT)
    rows.number("their share", "0.00555232", 100 * twice / total, "%", "With the rows that are not used.", where=PEFT)
    for model, tokens, stated in (("gpt2", 20, "15,360"), ("distilgpt2", 20, "15,360"), ("pythia-70m", 20, "10,240"), (smol, 20, "11,520")):
        rows.number(f"{model}, prompt of {tokens}", stated, prompt_parameters(model, tokens), "parameters", "Length x width of the embedding.")
    rows.number(
        f"{smol}, prompt of 20, share", "0.00856", 100 * prompt_parameters(smol, 20) / count_parameters(smol), "%", "Of the model's 134,515,008."
    )
    _of_bloom(rows)
    return rows


def _of_lester(rows: Rows) -> None:
    model, released = "t5-v1_1-xxl", "google-research/prompt-tuning"
    share = 100 * prompt_parameters(model, 100) / count_parameters(model)
    rows.number("T5-XXL, 100 tokens, share", "0.0037", share, "%", "409,600 of 11 billion.", where=f"{released}, implementation.md")
    ratio = count_parameters(model) / prompt_parameters(model, 5)
    rows.number("T5-XXL, 5 tokens, times fewer", "5.4e5", ratio, "x", "Over five orders of magnitude.", where=f"{PAPER}, figure 2")
    size = 128 + ADAPTER_BYTES * prompt_parameters("t5-v1_1-base", 100)
    rows.number(
        "T5-base, file of 100 tokens", "307,328", size, "bytes", "A header of 128 bytes, and 100 x 768 float32.", where=f"{released}, sst2.npy"
    )


def _of_bloom(rows: Rows) -> None:
    """bloomz-560m: hidden 1,024, 24 blocks, 16 heads; PEFT's documentation prints its base's 559,214,592, from which the shares are."""
    shape, base = _decoder(hidden=1024, layers=24, heads=16), 559_214_592
    encoder = (LinearLayer("0", 1024, 128, bias=True), LinearLayer("2", 128, 128, bias=True), LinearLayer("4", 128, 1024, bias=True))
    tuned = prompt_parameters(shape, 20) + sum(layer.parameters for layer in encoder)
    for what, found, stated, total, share in (
        ("prompt of 8", prompt_parameters(shape, 8), "8,192", "559,222,784", "0.00146489"),
        ("prefix of 20", prefix_parameters(shape, 20), "983,040", "560,197,632", "0.17548093"),
        ("prefix of 30", prefix_parameters(shape, 30), "1,474,560", "560,689,152", None),
        ("P-tuning, 20 tokens and an MLP of 128", tuned, "300,288", "559,514,880", "0.05366935"),
    ):
        rows.number(f"bloomz-560m, {what}", stated, found, "parameters", "By its shape.", where=PEFT)
        rows.number(f"bloomz-560m, {what}, with the base", total, base + found, "parameters", f"{base:,} and what trains.", where=PEFT)
        if share:
            rows.number(f"bloomz-560m, {what}, share", share, 100 * found / (base + found), "%", "Of both together.", where=PEFT)


def prefixes() -> Rows:
    rows = Rows("Prefix", "A key and a value for each token, block and key/value head, by the shapes")
    for model, tokens, stated, where in (
        ("bert-base-uncased", 1, "18,432", SCRIPTS), ("bert-large-uncased", 1, "49,152", SCRIPTS), ("roberta-large", 1, "49,152", SCRIPTS),
        ("roberta-large", 128, "6,291,456", f"{SCRIPTS}, run_rte_roberta"), ("roberta-large", 8, "393,216", f"{SCRIPTS}, run_boolq_roberta"),
        ("bert-base-uncased", 20, "368,640", PEFT), ("gpt2", 1, "18,432", ""), ("distilgpt2", 1, "9,216", ""), ("pythia-70m", 1, "6,144", ""),
        ("smollm2-135m", 1, "11,520", ""), ("smollm2-135m", 20, "230,400", ""),
    ):  # fmt: skip
        shape = architecture_of(model)
        why = f"2 x {shape.layers} blocks x {shape.kv_heads} key/value heads x {shape.head_dim}, for each token."
        rows.number(f"{model}, prefix of {tokens}", stated, prefix_parameters(model, tokens), "parameters", why, where=where)
    both = prefix_parameters("bert-base-uncased", 20) + LinearLayer("classifier", 768, 2, bias=True).parameters
    rows.number(
        "bert-base-uncased, prefix of 20, and a head of 2 classes", "370,178", both, "parameters", "368,640 and 1,538.", where="PEFT docstring"
    )
    return rows


def _decoder(hidden: int, layers: int, heads: int) -> dict[str, object]:
    """A shape: of a model whose family is not modelled, good for what depends on its sizes alone."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    return {"model_type": "llama", "vocab_size": 250880, **sizes}


SECTIONS: tuple[Callable[[], Rows], ...] = (table_4, prompts, prefixes)
