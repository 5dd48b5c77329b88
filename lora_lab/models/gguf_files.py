"""llama.cpp's GGUF files through the `gguf` package: config, tensors, tokenizer, as transformers would have them.

Two things differ on disk. llama.cpp stores the rows of q and k so that rotary pairs are neighbours, transformers so that they
are half a head apart: `unpermute` puts them back. And quantised tensors are blocks, which `gguf` dequantises to float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import LARGEST, is_number, is_size
from ..errors import LoraLabError
from .gguf_header import check_header
from .gguf_tokenizer import build_tokenizer
from .tokenizer import Tokenizer

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise LoraLabError("reading .gguf files needs the gguf package: pip install 'lora-lab[gguf]'") from None
    return gguf


class GGUFFile:
    """One opened .gguf file (metadata and tensors are mapped, not read). Raises LoraLabError for a damaged or foreign one."""

    def __init__(self, path: Path) -> None:
        self.gguf, self.path = import_gguf(), path
        try:
            check_header(path)
            self.reader = self.gguf.GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in self.reader.fields.items()}
        except LoraLabError:
            raise
        except Exception as error:  # a damaged file fails anywhere inside the reader
            raise LoraLabError(f"{path} is truncated or not a GGUF file ({error}): download or copy it again") from None
        if (family := self.metadata.get("general.architecture")) != "llama":
            raise LoraLabError(f"{path} holds a {family!r} model; this version reads 'llama'")

    def config(self) -> dict[str, Any]:
        """A transformers config.json as a dict."""
        names = {tensor.name for tensor in self.reader.tensors}
        heads, eos = self._whole("attention.head_count"), self.metadata.get("tokenizer.ggml.eos_token_id")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._vocabulary(),
            "hidden_size": self._whole("embedding_length"),
            "intermediate_size": self._whole("feed_forward_length"),
            "num_hidden_layers": self._whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("attention.head_count_kv", heads),
            "head_dim": self._head_dim(heads),
            "max_position_embeddings": self._whole("context_length"),
            "rms_norm_eps": float(f"{self._number('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": eos,
            "rope_theta": float(self._number("rope.freq_base", 10_000.0)),
            "rope_scaling": self._rope_scaling(),
        }

    def tensors(self, progress: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(transformers' name, float32 tensor) one at a time."""
        heads = self._whole("attention.head_count")
        kv_heads = self._whole("attention.head_count_kv", heads)
        for stored in tqdm(self.reader.tensors, desc="dequantise", unit="tensor", disable=not progress):
            if stored.name == "rope_freqs.weight":  # factors of the rotary frequencies: in the config
                continue
            name = transformers_name(stored.name)
            try:
                values = self._dequantise(stored).reshape([int(size) for size in reversed(stored.shape)]).float()
                if ".attn_q." in stored.name or ".attn_k." in stored.name:
                    values = unpermute(values, heads if ".attn_q." in stored.name else kv_heads)
            except (ValueError, RuntimeError, TypeError) as error:
                raise LoraLabError(f"{self.path}: tensor {stored.name!r} {stored.shape.tolist()} cannot be read: {error}") from None
            yield name, values

    def _dequantise(self, stored: Any) -> Tensor:
        try:
            return torch.from_numpy(self.gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise LoraLabError(f"{self.path}: the gguf package cannot dequantise {stored.name!r} ({kind}): take a Q4_0 or Q8_0 file") from None

    def tokenizer(self) -> Tokenizer | None:
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        try:
            return build_tokenizer(self.metadata)
        except LoraLabError:
            raise
        except Exception as error:  # ids without a token, merges of no tokens: what the library raises is plain Exception
            raise LoraLabError(f"{self.path}: its tokenizer cannot be rebuilt ({type(error).__name__}: {error}); put a tokenizer.json beside the "
                               "file") from None  # fmt: skip

    def _vocabulary(self) -> int:
        embedding = next((tensor for tensor in self.reader.tensors if tensor.name == "token_embd.weight"), None)
        if embedding is None or len(embedding.shape) != 2:
            raise LoraLabError(f"{self.path} lacks the tensor 'token_embd.weight': it is not a complete Llama model")
        return int(embedding.shape[1])

    def _head_dim(self, heads: int) -> int:
        head_dim = self._whole("attention.key_length", self._whole("embedding_length") // heads)
        if (rotated := self._number("rope.dimension_count", head_dim)) != head_dim:
            raise LoraLabError(f"{self.path} rotates {rotated} of each head's {head_dim} dimensions; this version reads models that rotate all")
        return head_dim

    def _number(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"llama.{key}", default)
        if value is None:
            raise LoraLabError(f"{self.path} lacks the field 'llama.{key}': it is not a complete Llama model")
        if not is_number(value):
            raise LoraLabError(f"{self.path}: llama.{key} is {value!r:.80}, expected a number")
        return value

    def _whole(self, key: str, default: Any = None) -> int:
        value = self._number(key, default)
        if not is_size(value):
            raise LoraLabError(f"{self.path}: llama.{key} is {value!r}, expected a whole number of at least 1, at most {LARGEST:,}")
        return value

    def _rope_scaling(self) -> dict[str, Any] | None:
        """Per-frequency factors (Llama 3.1 and later), or a named kind of scaling."""
        factors = next((tensor for tensor in self.reader.tensors if tensor.name == "rope_freqs.weight"), None)
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        if factors is not None:
            each = [float(factor) for factor in factors.data.reshape(-1)]
            return {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": float(self._number("rope.scaling.factor"))}
        original = self.metadata.get("llama.rope.scaling.original_context_length")
        return {**scaling, **({"original_max_position_embeddings": original} if original else {})}


def unpermute(values: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order of q and k. values: [heads * D, ...]; per head, row 2i + j goes to row j * D/2 + i."""
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)


def transformers_name(name: str) -> str:
    """"blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES:
        raise LoraLabError(f"unexpected tensor {name!r} in a Llama GGUF file")
    layer, part, kind = match.groups()
    return f"model.layers.{layer}.{NAMES[part]}.{kind}" if layer is not None else f"{NAMES[part]}.{kind}"
