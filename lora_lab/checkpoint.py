"""Adapter files in the format of Hugging Face PEFT, both ways; safetensors only, nothing pickled.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight [r, in], ....lora_B.weight [out, r]; of embeddings
                                lora_embedding_A, lora_embedding_B; of DoRA lora_magnitude_vector; with lora_bias lora_B.bias;
                                of token rows token_adapter.trainable_tokens_delta
    adapter_config.json         PEFT's keys: r, lora_alpha, target_modules, rank_pattern, ...

The adapter's name is not in the file. The tensors are renamed into place before the configuration, and carry a copy of it in
their metadata: whatever interrupts a save, the pair that loads is the old one or the new one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import activate
from .base_parameters import PREFIX, base_parameters_of, of_an_adapter, tensor_of
from .errors import LoraLabError
from .files import alone_in, saving, write_file, write_json
from .injection import apply_plan, injection_of
from .layers import LoRA
from .merging import refuse_merged
from .parameters.layer import part_at
from .peft_files.attention import attentions_for_file
from .peft_files.base_parameters import OwnTensors, base_parameters_for_file
from .peft_files.config import CONFIG, TENSORS, peft_config, warn_of_another_base
from .peft_files.contents import Contents
from .peft_files.fused import parts_for_file
from .peft_files.parameters import parameters_for_file, parameters_in_metadata
from .peft_files.reading import CONTAINERS, read_contents
from .peft_files.replacing import check_replaceable
from .peft_files.tokens import rows_for_config, rows_for_file
from .streaming.shards import NAMES
from .targets import adapter_names, check_adapter_name, lora_layers, one_adapter
from .token_rows.rows import own_rows
from .wrapping import on_base, refuse_replaced, refuse_sharded, refuse_wrapped, whole

Model = TypeVar("Model", bound=nn.Module)


# Saving ---------------------------------------------------------------------------------------------------------------------


@on_base
def save(model: nn.Module, folder: str | Path, adapter: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write one adapter straight into `folder`, so that `load` and PEFT's `PeftModel.from_pretrained(base, folder)` read it.

    adapter: its name; None means the one active adapter.  dtype: of the file (None keeps the adapter's, float32 as a rule).
    After fully_shard every process has to call it: each gathers the whole tensors, and the files they write are the same.
    Raises LoraLabError where there is no such adapter, more than one is active, a value is not finite, or the disk refuses;
    earlier files are untouched then.
    """
    refuse_merged(model, "save")
    refuse_replaced(model, "save")
    refuse_wrapped(model, "save")
    if dtype is not None and dtype not in NAMES:
        raise LoraLabError(f"dtype={dtype!r}: expected one of {', '.join(map(str, NAMES))}, or None to keep the adapter's")
    adapter = one_adapter(model, adapter, " with save(model, folder, adapter=...)")
    tensors, config, metadata = _for_file(model, adapter, dtype)
    folder = Path(folder)
    with saving(f"adapter {adapter!r}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            write_file(folder / TENSORS, lambda path: save_file(tensors, path, metadata))
            write_json(folder / CONFIG, config)


def _for_file(model: nn.Module, adapter: str, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """(tensors, configuration, metadata of the tensors)."""
    adapted = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.lora_variant}
    layers = {path: layer for path, layer in adapted.items() if adapter in layer.lora_A}
    if adapted and not any(layer.lora_parameters(adapter) for layer in adapted.values()):
        raise LoraLabError(f"save: the layers of {adapter!r} have no tensors any more: FullyShardedDataParallel has taken them. Divide the model "
                           "with fully_shard (FSDP2) instead, which lora_lab.training.shard does")  # fmt: skip
    if "" in layers:
        raise LoraLabError("a layer alone has no name for a file to call it by: inject into a model that contains it, nn.Sequential(layer) will do")
    pairs = {f"{PREFIX}{path}.{name}": tensor for path, layer in layers.items() for name, tensor in tensors_of(layer, adapter).items()}
    tensors = {key: _ready(key, tensor, dtype) for key, tensor in {**pairs, **rows_for_file(model, adapter)}.items()}
    tensors, layers, ranks = attentions_for_file(model, adapter, tensors, layers)
    config = peft_config(model, adapter, layers, ranks) | rows_for_config(model, adapter, layers)
    injection = injection_of(model)
    if injection is not None and adapter in injection.adapters:
        own = base_parameters_for_file(model, injection.base_parameters, adapter, config["modules_to_save"] or (), layers)
        tensors |= {key: _ready(key, tensor, dtype) for key, tensor in own.items()}
    _warn_of_the_unsaved(model)
    metadata = {"format": "pt", "lora_lab_config": json.dumps(config, sort_keys=True), **parts_for_file(layers, adapter),
                **parameters_in_metadata(model, layers)}  # fmt: skip
    if base_sha256 := getattr(model, "base_sha256", None):
        metadata["base_sha256"] = base_sha256
    return parameters_for_file(model, tensors, layers, PREFIX), config, metadata


def tensors_of(layer: LoRA, adapter: str) -> dict[str, Tensor]:
    """One layer's tensors as PEFT names and shapes them: the magnitude of a convolution is [1, out, 1, ...]."""
    names, found = layer.lora_kind.names, layer.lora_parameters(adapter)
    tensors: dict[str, Tensor] = dict(zip(names, layer.lora_variant[adapter].pair_for_file(layer, adapter), strict=True))
    if "lora_magnitude_vector" in found:
        magnitude = layer.lora_kind.spread(layer, layer.lora_variant[adapter].magnitude_for_file(layer, adapter))
        tensors["lora_magnitude_vector"] = magnitude[None] if magnitude.ndim > 1 else magnitude
    if "lora_B_bias" in found:
        tensors["lora_B.bias"] = found["lora_B_bias"]
    return tensors


def _warn_of_the_unsaved(model: nn.Module) -> None:
    """What the caller unfroze by hand would be random, or the base's own, when the adapter is loaded."""
    own = {id(tensor_of(owner, name)) for owner, record in base_parameters_of(model) for names in record.names.values() for name in names}
    left = [name for name, p in model.named_parameters() if p.requires_grad and not of_an_adapter(name) and id(p) not in own]
    if left:
        warnings.warn(f"{', '.join(left[:3])}{' and others' if len(left) > 3 else ''} train, but are of no adapter and not in the file: with "
                      "modules_to_save (or bias) inject makes them part of the adapter", stacklevel=5)  # fmt: skip


def _ready(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """For a file: whole, on the CPU, in the dtype asked for unless it counts something. Raises LoraLabError for NaN and infinity."""
    tensor = whole(tensor.detach())
    tensor = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
    if not torch.isfinite(tensor).all():
        path = key.removeprefix(PREFIX).partition(".lora_")[0]
        raise LoraLabError(f"the adapter of {path!r} holds NaN or infinity: nothing was written (train with a lower learning rate)")
    return tensor


# Loading --------------------------------------------------------------------------------------------------------------------


@on_base
def load(model: Model, folder: str | Path, adapter: str = "default", trainable: bool = False, replace: bool = False) -> Model:
    """Read an adapter folder, ours or PEFT's, into the model; it becomes the active one. Returns the same model.

    adapter: the name it gets here.  trainable: False freezes it (for inference), True goes on training it.
    replace: copy the values into the adapter of that name, keeping its Parameter objects.
    A file that PEFT trained from PiSSA or OLoRA, on a base it changed, becomes a plain adapter of twice the rank (changed_base.py). Whole
    embeddings in a file are the adapter's where they are not the base's own, and do not train.
    Raises LoraLabError, the model untouched, for a missing or damaged file, an adapter of another model, a wrong rank, an unknown or unexpected
    tensor, layers that the configuration names and the file lacks or the other way round, NaN, or a feature this version does not read; warns
    where the base's SHA-256 is another.
    """
    refuse_merged(model, "load")
    refuse_wrapped(model, "load")
    refuse_sharded(model, "load")
    check_adapter_name(adapter)
    folder = Path(folder)
    contents = read_contents(model, folder)
    if replace:
        check_replaceable(model, adapter, contents.plan)
    elif adapter in adapter_names(model):
        raise LoraLabError(f"adapter={adapter!r} is already in this model: choose another name, or replace=True to overwrite its values")
    if (trained_on := contents.base_sha256) and (here := getattr(model, "base_sha256", None)):  # hashing a large base takes seconds
        warn_of_another_base(trained_on, here, folder, stacklevel=4)
    if not replace:
        apply_plan(model, contents.plan, adapter, dtype=contents.dtype if contents.dtype.itemsize >= 4 else None, trainable=trainable)
    _copy_values(model, adapter, contents)
    activate(model, (adapter,), trainable)
    _put_in_place(model, contents.own)
    return model


@torch.no_grad()
def _copy_values(model: nn.Module, adapter: str, contents: Contents) -> None:
    for path, embedding in own_rows(model, adapter).items():
        embedding.lora_extra("lora_tokens")[adapter].copy_(contents.rows[path])
    for path, named in contents.layers.items():
        layer = part_at(model, path) or model.get_submodule(path)
        assert isinstance(layer, LoRA)
        own = layer.lora_parameters(adapter)
        for name, tensor in named.items():
            own[CONTAINERS[name]].copy_(tensor.view_as(own[CONTAINERS[name]]))


@torch.no_grad()
def _put_in_place(model: nn.Module, own: OwnTensors) -> None:
    """The values of the model's own tensors, while the adapter is active."""
    for name, tensor in own.values.items():
        tensor_of(model, name).copy_(tensor)
    for name in own.still:
        model.get_parameter(name).requires_grad_(False)
