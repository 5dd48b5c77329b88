"""What is in an adapter folder of PEFT's format, by layer, without a model and without reading the tensors' values into memory.

    <path>.lora_A.weight [r, in], .lora_B.weight [out, r]      a linear layer (convolutions have their kernel's dimensions, too)
    <path>.lora_embedding_A [r, numbers], .lora_embedding_B    an embedding
    <path>.lora_magnitude_vector [out]                         DoRA
    <path>.lora_B.bias [out]                                   lora_bias
    <path>.token_adapter.trainable_tokens_delta [n, dim]       trained token rows
    any other name                                             a tensor that replaces the base's: biases, modules_to_save
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base_parameters import PREFIX
from ..errors import LoraLabError
from ..plans import AdapterConfig
from ..streaming.shards import FLOATS, StoredTensor, read_shard
from .base_parameters import without_copies
from .config import CONFIG, TENSORS, from_peft, read_config, what_is_missing
from .parameters import described_in, without_wrappers, wrapped_pairs
from .tokens import check_all_there, rows_from_file, words_in_config

PART = re.compile(r"(?P<path>.+)\.lora_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector|B\.bias)")


@dataclass(frozen=True)
class Pair:
    """The tensors of one adapted layer."""

    A: StoredTensor
    B: StoredTensor
    magnitude: StoredTensor | None
    bias: StoredTensor | None
    embedding: bool


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that stand in the place of the base's: [n, dim], those of these words."""

    tensor: StoredTensor
    words: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder: how strong it is, the adapted layers by path, the tensors that replace the base's by name, token rows by path."""

    settings: AdapterConfig
    fan_in_fan_out: bool
    pairs: dict[str, Pair]
    replaced: dict[str, StoredTensor]
    base_sha256: str | None  # of the base it was trained on, where that is known
    rows: dict[str, Rows] = field(default_factory=dict)
    wrapped: dict[str, dict[int, dict[str, StoredTensor]]] = field(default_factory=dict)  # module -> depth -> "A", "B"; see streaming/parameters.py
    described: dict[str, Any] = field(default_factory=dict)


def read_adapter(folder: Path) -> AdapterFile:
    """Raises LoraLabError for what is missing, damaged, pickled, not finite, of a wrong rank, or a feature not read here."""
    if not (folder / TENSORS).is_file():
        raise LoraLabError(what_is_missing(folder))
    shard = read_shard(folder / TENSORS)
    config = read_config(folder, shard.metadata, stacklevel=4)
    settings = from_peft(config, folder / CONFIG)
    stored, found = rows_from_file(without_copies(shard.tensors))
    wrapped, stored = wrapped_pairs(stored, settings.target_parameters, PREFIX)
    rows = {path: _rows(path, tensor, settings, folder) for path, tensor in found.items()}
    parts, replaced = _sort(stored)
    pairs = {path: _pair(path, found, settings) for path, found in parts.items()}
    check_all_there(settings.trainable_token_indices, {path: row.words for path, row in rows.items()}, folder)
    if not pairs and not replaced and not rows and not wrapped:
        raise LoraLabError(f"{folder / TENSORS} holds no tensors")
    if settings.modules_to_save and not replaced:
        raise LoraLabError(f"{folder}: modules_to_save={settings.modules_to_save!r}, but the file holds none of them: it is incomplete")
    for tensor in shard.tensors.values():
        _check_finite(tensor)
    return AdapterFile(settings, bool(config.get("fan_in_fan_out")), pairs, replaced, shard.metadata.get("base_sha256"), rows, wrapped,
                       described_in(shard.metadata))  # fmt: skip


def _sort(tensors: dict[str, StoredTensor]) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """(the parts of each adapted layer by path, whole tensors by the name they have in the base)."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    replaced = {}
    for key, tensor in tensors.items():
        name = without_wrappers(key.removeprefix(PREFIX))
        match = PART.fullmatch(name)
        if not key.startswith(PREFIX) or tensor.dtype not in FLOATS or (match is None and re.search(r"\.lora_|token_adapter", name)):
            raise LoraLabError(f"unexpected tensor {key!r} ({tensor.dtype}, {list(tensor.shape)}): expected '{PREFIX}<path>.lora_A.weight' and the "
                               "like, or a floating-point tensor that replaces the base's")  # fmt: skip
        if match:
            parts.setdefault(match["path"], {})[match["part"]] = tensor
        else:
            replaced[name] = tensor
    return parts, replaced


def _rows(path: str, tensor: StoredTensor, settings: AdapterConfig, folder: Path) -> Rows:
    if tensor.dtype not in FLOATS:
        raise LoraLabError(f"unexpected tensor {tensor.key!r} ({tensor.dtype}, {list(tensor.shape)}): expected rows of floating-point numbers")
    return Rows(tensor, words_in_config(settings.trainable_token_indices, path, tensor.shape, folder))


def _pair(path: str, found: dict[str, StoredTensor], settings: AdapterConfig) -> Pair:
    dora = settings.variant == "dora"
    embedding = "embedding_A" in found or "embedding_B" in found
    names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    needed = {*names, *(["magnitude_vector"] if dora else [])}
    if set(found) - {"B.bias"} != needed or ("B.bias" in found and (dora or embedding)):
        raise LoraLabError(f"{path!r} has lora_{', lora_'.join(sorted(found))}, expected lora_{', lora_'.join(sorted(needed))} (use_dora={dora}): "
                           "the file is incomplete, or of a kind that is not merged here")  # fmt: skip
    A, B, rank = found[names[0]], found[names[1]], settings.rank_of(path)
    if len(A.shape) < 2 or len(A.shape) != len(B.shape) or A.shape[0] != rank or B.shape[1:] != (rank, *[1] * (len(B.shape) - 2)):
        raise LoraLabError(f"{path!r} has A {list(A.shape)} and B {list(B.shape)}, but its rank is {rank} ({CONFIG}): a wrong rank, or a grouped "
                           "convolution (not merged here)")  # fmt: skip
    magnitude = found.get("magnitude_vector")
    if magnitude is not None and math.prod(magnitude.shape) != B.shape[0]:
        raise LoraLabError(f"{path!r} has {math.prod(magnitude.shape)} magnitudes for {B.shape[0]} outputs")
    return Pair(A, B, magnitude, found.get("B.bias"), embedding)


def plain_pair(path: str, found: dict[str, StoredTensor], settings: AdapterConfig) -> Pair:
    """The A and B of a layer."""
    return _pair(path, {f"{which}.weight": tensor for which, tensor in found.items()}, settings)


def _check_finite(tensor: StoredTensor) -> None:
    if not all(torch.isfinite(block).all() for _, block in tensor.blocks()):
        raise LoraLabError(f"{tensor.file}: {tensor.key!r} holds NaN or infinity: take an earlier checkpoint, or train with a lower learning rate")
