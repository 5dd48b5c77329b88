"""The configs that have a name here: lower-case hub names, and the fields that the arithmetic needs."""

from __future__ import annotations

from typing import Any


def _llama(vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
        "tie_word_embeddings": tied,
    }


_SMOLLM2_135M = _llama(49152, 576, 30, 9, 3, 1536, tied=True)

# -q4 is the same shape from a 4-bit file; the weights are read into full precision, so its bytes are those of the others
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-135m-instruct": _SMOLLM2_135M,
    "smollm2-135m-instruct-q4": _SMOLLM2_135M,
    "smollm2-360m": _llama(49152, 960, 32, 15, 5, 2560, tied=True),
    "smollm2-1.7b": _llama(49152, 2048, 24, 32, 32, 8192, tied=True),
    "tinyllama-1.1b": _llama(32000, 2048, 22, 32, 4, 5632),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 8, 28672),
    "llama-3.2-1b": _llama(128256, 2048, 16, 32, 8, 8192, tied=True),
    "llama-3.2-3b": _llama(128256, 3072, 28, 24, 8, 8192, tied=True),
}
