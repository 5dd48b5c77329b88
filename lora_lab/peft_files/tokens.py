"""Trained token rows in PEFT's files: the rows as one tensor, which words they are of in the configuration alone.

    base_model.model.<path>.token_adapter.trainable_tokens_delta [n, dim]     (not a difference, in spite of its name: the rows themselves)
    adapter_config.json   "trainable_token_indices": [ids], of the input embedding, or {end of a path: [ids]}

Layers that are tied to the embedding have nothing in the file. An adapter of rows alone names PEFT's own placeholder for "no layer".
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base_parameters import PREFIX
from ..checks import are_finite
from ..errors import LoraLabError, did_you_mean
from ..layers import LoRA
from ..plans import AdapterConfig
from ..token_rows.rows import TiedRows, own_rows, words_of
from ..token_rows.targets import Planned, input_embedding, plan_paths

Anything = TypeVar("Anything", bound=Any)
ROWS = ".token_adapter.trainable_tokens_delta"
BASE = ".token_adapter.base_layer."
NO_LAYER = "dummy-target-modules"  # PEFT refuses an empty target_modules


def rows_for_file(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's rows by their names in a file; warns where PEFT computes something else from them."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoRA) and isinstance(layer.lora_variant.get(adapter), TiedRows) and getattr(layer, "bias", None) is not None:
            warnings.warn(f"{path!r} has a bias, which PEFT (0.21 at least) leaves out where trained token rows are tied", stacklevel=5)
    return {f"{PREFIX}{path}{ROWS}": layer.lora_extra("lora_tokens")[adapter] for path, layer in own_rows(model, adapter).items()}


def rows_for_config(model: nn.Module, adapter: str, layers: Collection[str]) -> dict[str, Any]:
    """What adapter_config.json says of them; nothing where there are none. layers: those with a pair A and B."""
    words = {path: words_of(layer, adapter) for path, layer in own_rows(model, adapter).items()}
    if not words:
        return {}
    indices = next(iter(words.values())) if _is_input_embedding(model, words) else words
    return {"trainable_token_indices": indices, **({} if layers else {"target_modules": NO_LAYER, "fan_in_fan_out": False})}


def _is_input_embedding(model: nn.Module, words: Mapping[str, Any]) -> bool:
    try:
        return list(words) == [input_embedding(model)]
    except LoraLabError:
        return False


def rows_from_file(tensors: Mapping[str, Anything]) -> tuple[dict[str, Anything], dict[str, Anything]]:
    """The file in two: the rows by the path of their layer, and before them all else under its usual name. PEFT writes whole embeddings beside
    the rows, and tensors of no rows, too."""
    rows = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX) and key.endswith(ROWS)}
    others = {key.replace(BASE, "."): tensor for key, tensor in tensors.items() if key not in rows}
    return others, {key.removeprefix(PREFIX).removesuffix(ROWS): tensor for key, tensor in rows.items() if tensor.shape[:1] != (0,)}


def rows_planned(model: nn.Module, rows: Mapping[str, Tensor], config: AdapterConfig, targets: Collection[str], folder: Path) -> Planned:
    """Which words the rows of a file are of, checked against the model.

    Raises LoraLabError where tensors and configuration do not belong together, or not to this model.
    """
    wanted = {path: words_in_config(config.trainable_token_indices, path, tuple(tensor.shape), folder) for path, tensor in rows.items()}
    paths = dict(model.named_modules())
    for path, tensor in rows.items():
        if path not in paths:
            near = did_you_mean(path, [name for name, module in paths.items() if isinstance(module, nn.Embedding)])
            raise LoraLabError(f"{folder} is an adapter for another model: it has token rows for {path!r}, which is not in this one{near}")
        if not are_finite(tensor):
            raise LoraLabError(f"{folder}: the token rows of {path!r} ({tensor.dtype}) are not finite floating-point numbers")
    planned = plan_paths(model, wanted, targets, (), config.variant)
    for part in planned:
        if rows[part.path].shape != (len(part.indices), part.dim):
            raise LoraLabError(f"{folder}: the token rows of {part.path!r} are {list(rows[part.path].shape)}, this model needs "
                               f"{[len(part.indices), part.dim]}: another model")  # fmt: skip
    source = {path: part.path for part in planned for path in (part.path, *part.tied)}
    if lost := [path for path in rows if not torch.equal(rows[path], rows[source[path]])]:
        raise LoraLabError(f"{folder} has token rows for {lost[0]!r}, which in this model has those of the embedding (tie_word_embeddings)")
    check_all_there(config.trainable_token_indices, {path: wanted[first] for path, first in source.items()}, folder)
    if alone := [key for key in _keys(config) if not any(path.endswith(key) for path in source)]:
        raise LoraLabError(f"{folder} has no token rows for {alone[0]!r}: it is of a model whose embedding and head are tied, and this one's are not")
    return planned


def _keys(config: AdapterConfig) -> list[str]:
    return list(config.trainable_token_indices) if isinstance(config.trainable_token_indices, dict) else []


def words_in_config(request: Any, path: str, shape: tuple[int, ...], folder: Path) -> tuple[int, ...]:
    """The words whose rows a tensor of this shape holds. PEFT takes the first key that the path ends with."""
    words = next((ids for key, ids in request.items() if path.endswith(key)), None) if isinstance(request, dict) else request
    if not isinstance(words, list) or len(shape) != 2 or len(words) != shape[0]:
        raise LoraLabError(f"{folder} has token rows {list(shape)} for {path!r}, but adapter_config.json says trainable_token_indices={request!r}: "
                           "the two files do not belong together")  # fmt: skip
    if any(isinstance(word, bool) or not isinstance(word, int) for word in words) or len(set(words)) < len(words):
        raise LoraLabError(f"{folder}: trainable_token_indices={request!r}: expected different whole numbers")
    return tuple(words)


def check_all_there(request: Any, words: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise LoraLabError for rows that the configuration announces and the file does not have; a tied layer's are the embedding's.

    words: those of each path that has rows.
    """
    asked = request if isinstance(request, dict) else {"": request or []}
    missing = [key for key, ids in asked.items() if ids and not any(path.endswith(key) or tuple(ids) == words[path] for path in words)]
    if missing:
        raise LoraLabError(f"{folder}: adapter_config.json says trainable_token_indices={request!r}, but the file has no token rows"
                           f"{f' for {missing[0]!r}' if missing[0] else ''}: it is incomplete")  # fmt: skip
