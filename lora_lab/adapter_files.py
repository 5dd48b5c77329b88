"""What is in an adapter folder of PEFT's format, by layer, without a model and without reading the tensors' values into memory.

    <path>.lora_A.weight [r, in], .lora_B.weight [out, r]      a linear layer (convolutions have their kernel's dimensions, too)
    <path>.lora_embedding_A [r, numbers], .lora_embedding_B    an embedding
    <path>.lora_magnitude_vector [out]                         DoRA
    <path>.lora_B.bias [out]                                   lora_bias
    any other name                                             a tensor that replaces the base's: biases, modules_to_save
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import LoraLabError
from .files import json_object
from .shards import FLOATS, StoredTensor, read_shard
from .targets import AdapterConfig

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PART = re.compile(r"(?P<path>.+)\.lora_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector|B\.bias)")
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ files belong to a changed base.
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# What the tensors say themselves, where the adapter came from, and what matters in training only.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The tensors of one adapted layer."""

    A: StoredTensor
    B: StoredTensor
    magnitude: StoredTensor | None
    bias: StoredTensor | None
    embedding: bool


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder: how strong it is, the adapted layers by path, and the tensors that replace the base's by name."""

    settings: AdapterConfig
    fan_in_fan_out: bool
    pairs: dict[str, Pair]
    replaced: dict[str, StoredTensor]


def read_adapter(folder: Path) -> AdapterFile:
    """Raises LoraLabError for what is missing, damaged, pickled, not finite, of a wrong rank, or a feature not read here."""
    if not (folder / TENSORS).is_file():
        raise LoraLabError(_what_is_missing(folder))
    shard = read_shard(folder / TENSORS)
    config = _config(folder, shard.metadata)
    settings = _settings(config, folder / CONFIG)
    parts, replaced = _sort(shard.tensors)
    pairs = {path: _pair(path, found, settings, bool(config.get("use_dora"))) for path, found in parts.items()}
    if not pairs and not replaced:
        raise LoraLabError(f"{folder / TENSORS} holds no tensors")
    if config.get("modules_to_save") and not replaced:
        raise LoraLabError(f"{folder}: modules_to_save={config['modules_to_save']!r}, but the file holds none of them: it is incomplete")
    for tensor in shard.tensors.values():
        _check_finite(tensor)
    return AdapterFile(settings, bool(config.get("fan_in_fan_out")), pairs, replaced)


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"adapter folder {str(folder)!r} does not exist"
    if (folder / "adapter_model.bin").is_file():
        return (f"{folder} holds a pickled adapter_model.bin, which can run code when read and is refused: load it with PEFT and "
                "call save_pretrained, which writes safetensors")  # fmt: skip
    inside = sorted(child.name for child in folder.iterdir() if (child / TENSORS).is_file())
    return f"{folder} holds no {TENSORS}" + (f"; the adapters {inside} are in folders of their own below it" if inside else "")


def _config(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The configuration stored with the tensors, where there is one (an interrupted save may leave an older file beside them)."""
    path = folder / CONFIG
    beside = json_object(path.read_bytes(), path) if path.is_file() else None
    inside = json_object(metadata["lora_lab_config"], folder / TENSORS) if "lora_lab_config" in metadata else None
    config = beside if inside is None else inside
    if config is None:
        raise LoraLabError(f"{path} is missing: it holds alpha, without which the adapter's strength is unknown")
    if beside is not None and beside != config:
        warnings.warn(f"{path} differs from the one saved with the tensors; the tensors' own is used", stacklevel=4)
    return config


def _settings(config: dict[str, Any], path: Path) -> AdapterConfig:
    """Rank, alpha and scaling of every layer; whatever else would change the function is refused by name."""
    if config.get("peft_type") != "LORA":
        raise LoraLabError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if (init := config.get("init_lora_weights", True)) not in HARMLESS_INITIALISATIONS:
        raise LoraLabError(f"{path}: init_lora_weights={init!r} changed the base weights while training; convert the adapter with PEFT first "
                           "(save_pretrained with path_initial_model_for_weight_conversion)")  # fmt: skip
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (None, False, {}, [], "none"):
            raise LoraLabError(f"{path}: {key}={value!r} is a feature that is not merged here; the result would compute something else")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value in [("r", config.get("r", 8)), *ranks.items(), ("lora_alpha", config.get("lora_alpha", 8)), *alphas.items()]:
        _check_number(name, value, path, whole=name == "r" or name in ranks)
    return AdapterConfig(rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), rank_pattern=ranks, alpha_pattern=alphas,
                         rslora=bool(config.get("use_rslora")))  # fmt: skip


def _check_number(name: str, value: Any, path: Path, whole: bool) -> None:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or (whole and value < 1):
        raise LoraLabError(f"{path}: {name}={value!r}, expected {'a whole number of at least 1' if whole else 'a finite number'}")


def _sort(tensors: dict[str, StoredTensor]) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """(the parts of each adapted layer by path, whole tensors by the name they have in the base)."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    replaced = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        match = PART.fullmatch(name)
        if not key.startswith(PREFIX) or tensor.dtype not in FLOATS or (match is None and re.search(r"\.lora_|token_adapter", name)):
            raise LoraLabError(f"unexpected tensor {key!r} ({tensor.dtype}, {list(tensor.shape)}): expected '{PREFIX}<path>.lora_A.weight' and the "
                               "like, or a floating-point tensor that replaces the base's")  # fmt: skip
        if match:
            parts.setdefault(match["path"], {})[match["part"]] = tensor
        else:
            replaced[name] = tensor
    return parts, replaced


def _pair(path: str, found: dict[str, StoredTensor], settings: AdapterConfig, dora: bool) -> Pair:
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


def _check_finite(tensor: StoredTensor) -> None:
    if not all(torch.isfinite(block).all() for _, block in tensor.blocks()):
        raise LoraLabError(f"{tensor.file}: {tensor.key!r} holds NaN or infinity: take an earlier checkpoint, or train with a lower learning rate")
