"""The configs that have a name here: lower-case hub names, the fields that the arithmetic needs, and what they are held to.

`PRESETS["gpt2"]` is the part of its config.json that shapes the model; `.source` is the repository on huggingface.co (or the paper) that the
fields are of, and `.parameters` the number of parameters, each tensor once: as published, or as transformers builds the model. Nothing is
computed from that integer; tests hold the count to it. (The hub's own totals count a tied head twice where the file has a copy of it.)
"""

from __future__ import annotations

from typing import Any


class Preset(dict[str, Any]):
    """The fields of a config.json, with the source that they are of and the model's number of parameters."""

    def __init__(self, fields: dict[str, Any], source: str, parameters: int) -> None:
        super().__init__(fields)
        self.source, self.parameters = source, parameters


def _llama(vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
        "tie_word_embeddings": tied,
        **more,
    }


def _qwen2(vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool = False) -> dict[str, Any]:
    return _llama(vocabulary, hidden, layers, heads, kv_heads, mlp_width, tied, model_type="qwen2")


def _qwen3(hidden: int, layers: int, heads: int, mlp_width: int, tied: bool = False) -> dict[str, Any]:
    return _llama(151936, hidden, layers, heads, 8, mlp_width, tied, model_type="qwen3", head_dim=128)


def _gemma(hidden: int, layers: int, heads: int, kv_heads: int, mlp_width: int) -> dict[str, Any]:
    return _llama(256000, hidden, layers, heads, kv_heads, mlp_width, True, model_type="gemma", head_dim=256)


def _mixtral(hidden: int, layers: int, heads: int, mlp_width: int) -> dict[str, Any]:
    return _llama(32000, hidden, layers, heads, 8, mlp_width, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)


def _gpt2(hidden: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions}


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 2048,
        **more,
    }


def _neox(vocabulary: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "tie_word_embeddings": False,
    }


def _falcon(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 65024, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "falcon", **sizes, **more}


def _grouped_falcon(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return _falcon(hidden, layers, heads, new_decoder_architecture=True, num_kv_heads=8)


def _bert(vocabulary: int, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        **more,
    }


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    more = {"architectures": ["RobertaModel"], "max_position_embeddings": 514, "type_vocab_size": 1}
    return _bert(50265, hidden, layers, heads, model_type="roberta", **more)


def _t5(hidden: int, mlp_width: int, layers: int, heads: int, head_dim: int = 64, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": hidden,
        "d_ff": mlp_width,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "d_kv": head_dim,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        **more,
    }


def _t5_1_1(hidden: int, mlp_width: int, layers: int, heads: int) -> dict[str, Any]:
    return _t5(hidden, mlp_width, layers, heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _mt5(hidden: int, mlp_width: int, layers: int, heads: int) -> dict[str, Any]:
    return {**_t5_1_1(hidden, mlp_width, layers, heads), "model_type": "mt5", "vocab_size": 250112}


PRESETS: dict[str, Preset] = {
    # Llama. 30b is the hub's name of what the paper calls 33B
    "llama-7b": Preset(_llama(32000, 4096, 32, 32, 32, 11008), "huggyllama/llama-7b", 6_738_415_616),
    "llama-13b": Preset(_llama(32000, 5120, 40, 40, 40, 13824), "huggyllama/llama-13b", 13_015_864_320),
    "llama-30b": Preset(_llama(32000, 6656, 60, 52, 52, 17920), "huggyllama/llama-30b", 32_528_943_616),
    "llama-65b": Preset(_llama(32000, 8192, 80, 64, 64, 22016), "huggyllama/llama-65b", 65_285_660_672),
    "llama-2-7b": Preset(_llama(32000, 4096, 32, 32, 32, 11008), "meta-llama/Llama-2-7b-hf", 6_738_415_616),
    "llama-2-13b": Preset(_llama(32000, 5120, 40, 40, 40, 13824), "meta-llama/Llama-2-13b-hf", 13_015_864_320),
    "llama-2-70b": Preset(_llama(32000, 8192, 80, 64, 8, 28672), "meta-llama/Llama-2-70b-hf", 68_976_648_192),
    "llama-3-8b": Preset(_llama(128256, 4096, 32, 32, 8, 14336), "meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    "llama-3-70b": Preset(_llama(128256, 8192, 80, 64, 8, 28672), "meta-llama/Meta-Llama-3-70B", 70_553_706_496),
    "llama-3.1-405b": Preset(_llama(128256, 16384, 126, 128, 8, 53248), "meta-llama/Llama-3.1-405B", 405_853_388_800),
    "llama-3.2-1b": Preset(_llama(128256, 2048, 16, 32, 8, 8192, tied=True), "meta-llama/Llama-3.2-1B", 1_235_814_400),
    "llama-3.2-3b": Preset(_llama(128256, 3072, 28, 24, 8, 8192, tied=True), "meta-llama/Llama-3.2-3B", 3_212_749_824),
    "tinyllama-1.1b": Preset(_llama(32000, 2048, 22, 32, 4, 5632), "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
    "smollm2-135m": Preset(_llama(49152, 576, 30, 9, 3, 1536, tied=True), "HuggingFaceTB/SmolLM2-135M", 134_515_008),
    "smollm2-360m": Preset(_llama(49152, 960, 32, 15, 5, 2560, tied=True), "HuggingFaceTB/SmolLM2-360M", 361_821_120),
    "smollm2-1.7b": Preset(_llama(49152, 2048, 24, 32, 32, 8192, tied=True), "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
    # Built like Llama
    "mistral-7b-v0.1": Preset(_llama(32000, 4096, 32, 32, 8, 14336, model_type="mistral"), "mistralai/Mistral-7B-v0.1", 7_241_732_096),
    "mistral-7b-v0.3": Preset(_llama(32768, 4096, 32, 32, 8, 14336, model_type="mistral", sliding_window=None), "mistralai/Mistral-7B-v0.3",
                              7_248_023_552),
    "mixtral-8x7b": Preset(_mixtral(4096, 32, 32, 14336), "mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "qwen2.5-0.5b": Preset(_qwen2(151936, 896, 24, 14, 2, 4864, tied=True), "Qwen/Qwen2.5-0.5B", 494_032_768),
    "qwen2.5-1.5b": Preset(_qwen2(151936, 1536, 28, 12, 2, 8960, tied=True), "Qwen/Qwen2.5-1.5B", 1_543_714_304),
    "qwen2.5-3b": Preset(_qwen2(151936, 2048, 36, 16, 2, 11008, tied=True), "Qwen/Qwen2.5-3B", 3_085_938_688),
    "qwen2.5-7b": Preset(_qwen2(152064, 3584, 28, 28, 4, 18944), "Qwen/Qwen2.5-7B", 7_615_616_512),
    "qwen2.5-14b": Preset(_qwen2(152064, 5120, 48, 40, 8, 13824), "Qwen/Qwen2.5-14B", 14_770_033_664),
    "qwen2.5-32b": Preset(_qwen2(152064, 5120, 64, 40, 8, 27648), "Qwen/Qwen2.5-32B", 32_763_876_352),
    "qwen2.5-72b": Preset(_qwen2(152064, 8192, 80, 64, 8, 29568), "Qwen/Qwen2.5-72B", 72_706_203_648),
    "qwen3-0.6b": Preset(_qwen3(1024, 28, 16, 3072, tied=True), "Qwen/Qwen3-0.6B", 596_049_920),
    "qwen3-1.7b": Preset(_qwen3(2048, 28, 16, 6144, tied=True), "Qwen/Qwen3-1.7B", 1_720_574_976),
    "qwen3-4b": Preset(_qwen3(2560, 36, 32, 9728, tied=True), "Qwen/Qwen3-4B", 4_022_468_096),
    "qwen3-8b": Preset(_qwen3(4096, 36, 32, 12288), "Qwen/Qwen3-8B", 8_190_735_360),
    "gemma-2b": Preset(_gemma(2048, 18, 8, 1, 16384), "google/gemma-2b", 2_506_172_416),
    "gemma-7b": Preset(_gemma(3072, 28, 16, 16, 24576), "google/gemma-7b", 8_537_680_896),
    # GPT-2 and GPT-3
    "gpt2": Preset(_gpt2(768, 12, 12), "openai-community/gpt2", 124_439_808),
    "gpt2-medium": Preset(_gpt2(1024, 24, 16), "openai-community/gpt2-medium", 354_823_168),
    "gpt2-large": Preset(_gpt2(1280, 36, 20), "openai-community/gpt2-large", 774_030_080),
    "gpt2-xl": Preset(_gpt2(1600, 48, 25), "openai-community/gpt2-xl", 1_557_611_200),
    "distilgpt2": Preset(_gpt2(768, 6, 12), "distilbert/distilgpt2", 81_912_576),
    "gpt3-175b": Preset(_gpt2(12288, 96, 96, 2048), "Brown et al. 2020 (arXiv:2005.14165), table 2.1; weights not released", 174_604_259_328),
    # OPT
    "opt-125m": Preset(_opt(768, 12, 12), "facebook/opt-125m", 125_239_296),
    "opt-350m": Preset(_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), "facebook/opt-350m", 331_196_416),
    "opt-1.3b": Preset(_opt(2048, 24, 32), "facebook/opt-1.3b", 1_315_758_080),
    "opt-2.7b": Preset(_opt(2560, 32, 32), "facebook/opt-2.7b", 2_651_596_800),
    "opt-6.7b": Preset(_opt(4096, 32, 32), "facebook/opt-6.7b", 6_658_473_984),
    "opt-13b": Preset(_opt(5120, 40, 40), "facebook/opt-13b", 12_853_473_280),
    "opt-30b": Preset(_opt(7168, 48, 56), "facebook/opt-30b", 29_974_540_288),
    "opt-66b": Preset(_opt(9216, 64, 72), "facebook/opt-66b", 65_719_701_504),
    # GPT-NeoX; Dolly's vocabulary is Pythia's tokenizer with three more tokens
    "pythia-14m": Preset(_neox(50304, 128, 6, 4), "EleutherAI/pythia-14m", 14_067_712),
    "pythia-31m": Preset(_neox(50304, 256, 6, 8), "EleutherAI/pythia-31m", 30_494_720),
    "pythia-70m": Preset(_neox(50304, 512, 6, 8), "EleutherAI/pythia-70m", 70_426_624),
    "pythia-160m": Preset(_neox(50304, 768, 12, 12), "EleutherAI/pythia-160m", 162_322_944),
    "pythia-410m": Preset(_neox(50304, 1024, 24, 16), "EleutherAI/pythia-410m", 405_334_016),
    "pythia-1b": Preset(_neox(50304, 2048, 16, 8), "EleutherAI/pythia-1b", 1_011_781_632),
    "pythia-1.4b": Preset(_neox(50304, 2048, 24, 16), "EleutherAI/pythia-1.4b", 1_414_647_808),
    "pythia-2.8b": Preset(_neox(50304, 2560, 32, 32), "EleutherAI/pythia-2.8b", 2_775_208_960),
    "pythia-6.9b": Preset(_neox(50432, 4096, 32, 32), "EleutherAI/pythia-6.9b", 6_857_302_016),
    "pythia-12b": Preset(_neox(50688, 5120, 36, 40), "EleutherAI/pythia-12b", 11_846_072_320),
    "gpt-neox-20b": Preset(_neox(50432, 6144, 44, 64), "EleutherAI/gpt-neox-20b", 20_554_567_680),
    "dolly-v2-3b": Preset(_neox(50280, 2560, 32, 32), "databricks/dolly-v2-3b", 2_775_086_080),
    "dolly-v2-7b": Preset(_neox(50280, 4096, 32, 32), "databricks/dolly-v2-7b", 6_856_056_832),
    "dolly-v2-12b": Preset(_neox(50280, 5120, 36, 40), "databricks/dolly-v2-12b", 11_841_894_400),
    # Falcon
    "falcon-7b": Preset(_falcon(4544, 32, 71), "tiiuae/falcon-7b", 6_921_720_704),
    "falcon-40b": Preset(_grouped_falcon(8192, 60, 128), "tiiuae/falcon-40b", 41_303_293_952),
    "falcon-180b": Preset(_grouped_falcon(14848, 80, 232), "tiiuae/falcon-180B", 178_557_088_768),
    "falcon-rw-1b": Preset(
        _falcon(2048, 24, 32, vocab_size=50304, multi_query=False, parallel_attn=False, bias=True, alibi=True),
        "tiiuae/falcon-rw-1b", 1_311_625_216,
    ),
    # Encoders, as the bare model with its pooler
    "bert-base-uncased": Preset(_bert(30522, 768, 12, 12), "google-bert/bert-base-uncased", 109_482_240),
    "bert-base-cased": Preset(_bert(28996, 768, 12, 12), "google-bert/bert-base-cased", 108_310_272),
    "bert-large-uncased": Preset(_bert(30522, 1024, 24, 16), "google-bert/bert-large-uncased", 335_141_888),
    "bert-large-cased": Preset(_bert(28996, 1024, 24, 16), "google-bert/bert-large-cased", 333_579_264),
    "roberta-base": Preset(_roberta(768, 12, 12), "FacebookAI/roberta-base", 124_645_632),
    "roberta-large": Preset(_roberta(1024, 24, 16), "FacebookAI/roberta-large", 355_359_744),
    "all-minilm-l6-v2": Preset(_bert(30522, 384, 6, 12), "sentence-transformers/all-MiniLM-L6-v2", 22_713_216),
    "all-minilm-l12-v2": Preset(_bert(30522, 384, 12, 12), "sentence-transformers/all-MiniLM-L12-v2", 33_360_000),
    # T5 1.0, 1.1 and mT5
    "t5-small": Preset(_t5(512, 2048, 6, 8), "google-t5/t5-small", 60_506_624),
    "t5-base": Preset(_t5(768, 3072, 12, 12), "google-t5/t5-base", 222_903_552),
    "t5-large": Preset(_t5(1024, 4096, 24, 16), "google-t5/t5-large", 737_668_096),
    "t5-3b": Preset(_t5(1024, 16384, 24, 32, 128), "google-t5/t5-3b", 2_851_598_336),
    "t5-11b": Preset(_t5(1024, 65536, 24, 128, 128), "google-t5/t5-11b", 11_307_321_344),
    "t5-v1_1-small": Preset(_t5_1_1(512, 1024, 8, 6), "google/t5-v1_1-small", 76_961_152),
    "t5-v1_1-base": Preset(_t5_1_1(768, 2048, 12, 12), "google/t5-v1_1-base", 247_577_856),
    "t5-v1_1-large": Preset(_t5_1_1(1024, 2816, 24, 16), "google/t5-v1_1-large", 783_150_080),
    "t5-v1_1-xl": Preset(_t5_1_1(2048, 5120, 24, 32), "google/t5-v1_1-xl", 2_849_757_184),
    "t5-v1_1-xxl": Preset(_t5_1_1(4096, 10240, 24, 64), "google/t5-v1_1-xxl", 11_135_332_352),
    "mt5-small": Preset(_mt5(512, 1024, 8, 6), "google/mt5-small", 300_176_768),
    "mt5-base": Preset(_mt5(768, 2048, 12, 12), "google/mt5-base", 582_401_280),
    "mt5-large": Preset(_mt5(1024, 2816, 24, 16), "google/mt5-large", 1_229_581_312),
}  # fmt: skip

# One shape, other weights. -q4 is a 4-bit file of it, which is read into full precision; the pad token that Alpaca's code adds is not counted
SAME_SHAPE = {
    "llama-7b": ("llama-1-7b", "alpaca-7b", "vicuna-7b", "baize", "baize-7b", "koala-7b", "open_llama_7b"),
    "llama-13b": ("llama-1-13b", "vicuna-13b", "koala-13b", "baize-13b", "open_llama_13b"),
    "llama-30b": ("llama-33b", "llama-1-30b", "llama-1-33b", "baize-30b"),
    "llama-65b": ("llama-1-65b",),
    "llama-2-7b": ("llama-2-7b-hf", "llama-2-7b-chat", "llama-2-7b-chat-hf"),
    "llama-2-13b": ("llama-2-13b-hf", "llama-2-13b-chat", "llama-2-13b-chat-hf"),
    "llama-2-70b": ("llama-2-70b-hf", "llama-2-70b-chat", "llama-2-70b-chat-hf"),
    "llama-3-8b": ("meta-llama-3-8b", "llama-3-8b-instruct", "llama-3.1-8b", "llama-3.1-8b-instruct"),
    "llama-3-70b": ("meta-llama-3-70b", "llama-3-70b-instruct", "llama-3.1-70b", "llama-3.1-70b-instruct", "llama-3.3-70b-instruct"),
    "llama-3.1-405b": ("llama-3.1-405b-instruct",),
    "llama-3.2-1b": ("llama-3.2-1b-instruct",),
    "llama-3.2-3b": ("llama-3.2-3b-instruct",),
    "tinyllama-1.1b": ("tinyllama-1.1b-chat-v1.0",),
    "smollm2-135m": ("smollm2-135m-instruct", "smollm2-135m-instruct-q4", "smollm-135m"),
    "smollm2-360m": ("smollm2-360m-instruct", "smollm-360m"),
    "smollm2-1.7b": ("smollm2-1.7b-instruct", "smollm-1.7b"),
    "mistral-7b-v0.1": ("mistral-7b", "mistral-7b-instruct-v0.1", "mistral-7b-instruct-v0.2"),
    "mistral-7b-v0.3": ("mistral-7b-instruct-v0.3",),
    "mixtral-8x7b": ("mixtral-8x7b-v0.1", "mixtral-8x7b-instruct-v0.1"),
    "gemma-2b": ("gemma-2b-it",),
    "gemma-7b": ("gemma-7b-it",),
    "falcon-7b": ("falcon-7b-instruct",),
    "falcon-40b": ("falcon-40b-instruct",),
    "falcon-180b": ("falcon-180b-chat",),
    **{f"qwen2.5-{size}": (f"qwen2.5-{size}-instruct",) for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")},
    **{f"pythia-{size}": (f"pythia-{size}-deduped",) for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")},
    **{f"t5-v1_1-{size}": (f"flan-t5-{size}", f"t5-{size}-lm-adapt") for size in ("small", "base", "large", "xl")},
    "t5-v1_1-xxl": ("flan-t5-xxl", "t5-xxl-lm-adapt", "t0pp"),
}
PRESETS |= {alias: PRESETS[name] for name, aliases in SAME_SHAPE.items() for alias in aliases}
