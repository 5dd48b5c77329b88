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
import re
import warnings
from dataclasses import replace as replaced
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import activate
from .borrowed import borrowed_of, tensor_of
from .errors import LoraLabError, did_you_mean
from .files import saving, write_file, write_json
from .fused.parts import parts_in
from .injection import apply_plan, injection_of
from .kinds import kind_of
from .layers import LoRA, is_adaptable
from .merging import refuse_merged
from .parameters.layer import ParameterLoRA, parameter_path, part_at
from .parameters.targets import check_apart
from .peft_files.attention import attentions_for_file, attentions_from_file, with_its_attention
from .peft_files.borrowed import borrowed_for_file, of_this_model, own_tensors
from .peft_files.changed_base import FOUND_AGAIN, on_the_base_itself
from .peft_files.config import CONFIG, PREFIX, TENSORS, from_peft, initialisation, peft_config, read_config, warn_of_another_base, what_is_missing
from .peft_files.fused import parts_for_file, parts_from_file
from .peft_files.parameters import check_pair, parameters_for_file, parameters_from_file, parameters_in_metadata
from .peft_files.tokens import rows_for_config, rows_for_file, rows_from_file, rows_planned
from .plans import AdapterConfig, Plan, PlannedLayer
from .streaming.shards import NAMES
from .targets import adapter_names, check_adapter_name, lora_layers, plan_layer, plan_parameter
from .token_rows.rows import own_rows, words_of
from .wrapping import refuse_replaced, refuse_sharded, refuse_wrapped, whole

Model = TypeVar("Model", bound=nn.Module)
KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<which>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias)")
CONTAINERS = {  # name in a file -> container of the layer
    "lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector", "lora_B.bias": "lora_B_bias",
}  # fmt: skip


# Saving ---------------------------------------------------------------------------------------------------------------------


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
    adapter = _adapter_to_save(model, adapter)
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.lora_A}
    if "" in layers:
        raise LoraLabError("a layer alone has no name for a file to call it by: inject into a model that contains it, nn.Sequential(layer) will do")
    tensors = {f"{PREFIX}{path}.{name}": _finite(path, whole(tensor.detach()).to("cpu", dtype).contiguous())
               for path, layer in layers.items() for name, tensor in tensors_of(layer, adapter).items()}  # fmt: skip
    tensors |= {key: _finite(key, whole(tensor.detach()).to("cpu", dtype).contiguous()) for key, tensor in rows_for_file(model, adapter).items()}
    tensors, layers, ranks = attentions_for_file(model, adapter, tensors, layers)
    injection = injection_of(model)
    if injection is not None and adapter in injection.adapters:
        own = borrowed_for_file(model, injection.borrowed, adapter, injection.adapters[adapter], layers)
        tensors |= {key: _finite(key, _as(whole(tensor), dtype)) for key, tensor in own.items()}
    _warn_of_the_unsaved(model)
    config = peft_config(model, adapter, layers, ranks) | rows_for_config(model, adapter, layers)
    tensors = parameters_for_file(model, tensors, layers, PREFIX)
    metadata = {"format": "pt", "lora_lab_config": json.dumps(config, sort_keys=True), **parts_for_file(layers, adapter),
                **parameters_in_metadata(model, layers)}  # fmt: skip
    if base_sha256 := getattr(model, "base_sha256", None):
        metadata["base_sha256"] = base_sha256
    folder = Path(folder)
    with saving(f"adapter {adapter!r}", folder):
        write_file(folder / TENSORS, lambda path: save_file(tensors, path, metadata))
        write_json(folder / CONFIG, config)


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


def _adapter_to_save(model: nn.Module, adapter: str | None) -> str:
    names = adapter_names(model)
    if adapter is not None and adapter not in names:
        raise LoraLabError(f"adapter={adapter!r}: this model has {names or 'no adapters'}{did_you_mean(adapter, names)}")
    active = sorted({name for layer in lora_layers(model).values() for name in layer.lora_active})
    if adapter is None and len(active) != 1:
        raise LoraLabError(f"which adapter? {active or 'none'} of {names} active: name one with save(model, folder, adapter=...)")
    return adapter or active[0]


def _warn_of_the_unsaved(model: nn.Module) -> None:
    """What the caller unfroze by hand would be random, or the base's own, when the adapter is loaded."""
    own = {id(tensor_of(owner, name)) for owner, borrowed in borrowed_of(model) for names in borrowed.names.values() for name in names}
    left = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in f".{name}" and id(p) not in own]
    if left:
        warnings.warn(f"{', '.join(left[:3])}{' and others' if len(left) > 3 else ''} train, but are of no adapter and not in the file: with "
                      "modules_to_save (or bias) inject makes them part of the adapter", stacklevel=3)  # fmt: skip


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """For a file: on the CPU, in the dtype asked for unless it counts something."""
    return tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()


def _finite(path: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise LoraLabError(f"the adapter of {path!r} holds NaN or infinity: nothing was written (train with a lower learning rate)")
    return tensor


# Loading --------------------------------------------------------------------------------------------------------------------


def load(model: Model, folder: str | Path, adapter: str = "default", trainable: bool = False, replace: bool = False) -> Model:
    """Read an adapter folder, ours or PEFT's, into the model; it becomes the active one. Returns the same model.

    adapter: the name it gets here.  trainable: False freezes it (for inference), True goes on training it.
    replace: copy the values into the adapter of that name, keeping its Parameter objects.
    A file that PEFT trained from PiSSA or OLoRA, on a base it changed, becomes a plain adapter of twice the rank (changed_base.py). Whole
    embeddings in a file are the adapter's where they are not the base's own, and do not train.
    Raises LoraLabError, the model untouched, for a missing or damaged file, an adapter of another model, a wrong rank, an
    unknown or unexpected tensor, NaN, or a feature this version does not read; warns where the base's SHA-256 is another.
    """
    refuse_merged(model, "load")
    refuse_wrapped(model, "load")
    refuse_sharded(model, "load")
    check_adapter_name(adapter)
    folder = Path(folder)
    tensors, metadata = _read_tensors(folder)
    written = read_config(folder, metadata)
    config = of_this_model(model, from_peft(written, folder / CONFIG, found_again=FOUND_AGAIN))
    tensors = parameters_from_file(model, tensors, config.target_parameters, metadata, PREFIX, folder)
    tensors, rows = rows_from_file(tensors)
    tensors, own, still = own_tensors(model, attentions_from_file(tensors), config, folder)
    layers = _by_layer(tensors) if tensors or not rows else {}
    planned = [_planned(model, path, named, config, folder) for path, named in layers.items()]
    if (init := initialisation(written)) in FOUND_AGAIN:
        config, planned, layers = on_the_base_itself(model, init, config, planned, layers, folder)
    parameters = [layer.path for layer in planned if layer.stack]
    tokens = rows_planned(model, rows, config, layers, folder)
    check_apart(model, list(layers), [part.path for part in tokens], parameters)
    plan, layers = parts_from_file(Plan(config, tuple(planned), tuple(own)), layers, metadata, folder)
    plan = replaced(plan, tokens=tokens)
    _check_name_is_free(model, plan, adapter, replace)
    if (trained_on := metadata.get("base_sha256")) and (here := getattr(model, "base_sha256", None)):  # hashing a large base takes seconds
        warn_of_another_base(trained_on, here, folder)
    if not replace:
        dtype = next(iter((tensors or rows).values())).dtype
        apply_plan(model, plan, adapter, dtype=dtype if dtype.itemsize >= 4 else None, trainable=trainable)
    _copy_values(model, adapter, layers, rows)
    activate(model, (adapter,), trainable)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor_of(model, name).copy_(tensor)
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    return model


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        raise LoraLabError(what_is_missing(folder))
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraLabError(f"{path} is truncated or not a safetensors file ({error}): save or copy the adapter again") from None


def _by_layer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path -> name in the file -> tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise LoraLabError(f"unexpected tensor {key!r}: expected '{PREFIX}<path>.lora_A.weight' or '...lora_B.weight'")
        matrix = not match["which"].endswith(("vector", "bias"))
        if (matrix and tensor.ndim < 2) or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise LoraLabError(f"tensor {key!r} ({tensor.dtype}, {list(tensor.shape)}): expected a matrix of finite floating-point numbers")
        layers.setdefault(match["path"], {})[match["which"]] = tensor
    if not layers:
        raise LoraLabError("the file holds no tensors")
    for path, named in layers.items():
        if not {"lora_A", "lora_B"} <= {CONTAINERS[name] for name in named}:
            raise LoraLabError(f"{path!r} has {', '.join(named)} only: the file is incomplete")
    return layers


def _planned(model: nn.Module, path: str, named: dict[str, Tensor], config: AdapterConfig, folder: Path) -> PlannedLayer:
    """Check one layer's tensors against the layer they are for."""
    if config.target_parameters and (part := part_at(model, path)) is not None:
        check_pair(folder, planned := plan_parameter(model, path, config), part, named)
        return planned
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if is_adaptable(module)]
        raise LoraLabError(f"{folder} is an adapter for another model: it adapts {path!r}, which a {type(model).__name__} does not have"
                           f"{did_you_mean(path, names, 1)}") from None  # fmt: skip
    if (kind := kind_of(module)) is None:
        raise LoraLabError(f"{folder} adapts {path!r}, a {type(module).__name__}: this version reads adapters of linear layers, embeddings "
                           "and convolutions")  # fmt: skip
    planned = with_its_attention(plan_layer(path, module, config), module, config)
    wanted = dict(zip(kind.names, kind.pair_shapes(module, planned.rank), strict=True))
    found = {name: tuple(tensor.shape) for name, tensor in named.items() if CONTAINERS[name] in ("lora_A", "lora_B")}
    if found != wanted:
        (A, B), (want_A, want_B) = (([list(shape) for shape in shapes.values()] + [None])[:2] for shapes in (found, wanted))
        raise LoraLabError(f"{folder}: {path!r} has A {A} and B {B}, but with rank {planned.rank} (adapter_config.json) this "
                           f"model needs {want_A} and {want_B}: another model, or a wrong rank")  # fmt: skip
    _check_vectors(path, named, config, planned.fan_out, folder)
    return planned


def _check_vectors(path: str, named: dict[str, Tensor], config: AdapterConfig, fan_out: int, folder: Path) -> None:
    for name, wanted, key in (("lora_magnitude_vector", config.variant == "dora", "use_dora"), ("lora_B.bias", config.lora_bias, "lora_bias")):
        if (name in named) != wanted:
            here = f"has {name}" if name in named else f"has no {name}"
            raise LoraLabError(f"{folder}: {path!r} {here}, but adapter_config.json says {key}={wanted}: the two files do not belong together")
        if name in named and named[name].numel() != fan_out:
            raise LoraLabError(f"{folder}: {path!r} has {name} {list(named[name].shape)}, this model needs {fan_out} numbers: another model")


def _check_name_is_free(model: nn.Module, plan: Plan, adapter: str, replace: bool) -> None:
    present = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.lora_variant}
    if not replace and present:
        raise LoraLabError(f"adapter={adapter!r} is already in this model: choose another name, or replace=True to overwrite its values")
    if not replace:
        return
    vectors = {"lora_magnitude_vector": plan.config.variant == "dora", "lora_B_bias": plan.config.lora_bias}
    tensors = ("lora_A", "lora_B", *(name for name, there in vectors.items() if there))
    wanted = {(p.path, p.pairs * p.rank, p.scaling, frozenset(tensors), p.parts) for p in plan.layers}
    ranks = {path: layer.lora_A[adapter].shape[-2 if isinstance(layer, ParameterLoRA) else 0] for path, layer in present.items()
             if adapter in layer.lora_A}  # fmt: skip
    if wanted != {
        (parameter_path(path), ranks[path], layer.lora_scaling[adapter], frozenset(layer.lora_parameters(adapter)), parts_in(layer, adapter))
        for path, layer in present.items()
        if adapter in layer.lora_A
    }:
        raise LoraLabError(f"replace=True needs an adapter {adapter!r} with the same layers, parts, ranks, scalings and variant in the model")
    tokens = {path: words_of(layer, adapter) for path, layer in own_rows(model, adapter).items()}
    if tokens != (in_file := {part.path: list(part.indices) for part in plan.tokens}):
        raise LoraLabError(f"replace=True: the adapter {adapter!r} here has rows for the words {tokens}, the one in the file for {in_file}")
    injection = injection_of(model)
    along = injection.borrowed.names.get(adapter, ()) if injection is not None else ()
    if set(along) != set(plan.along):
        here, there = list(along) or "nothing", list(plan.along) or "nothing"
        raise LoraLabError(f"replace=True: the adapter {adapter!r} here trains {here} of the model itself, the one in the file {there}")


@torch.no_grad()
def _copy_values(model: nn.Module, adapter: str, layers: dict[str, dict[str, Tensor]], rows: dict[str, Tensor]) -> None:
    for path, embedding in own_rows(model, adapter).items():
        embedding.lora_extra("lora_tokens")[adapter].copy_(rows[path])
    for path, named in layers.items():
        layer = part_at(model, path) or model.get_submodule(path)
        assert isinstance(layer, LoRA)
        own = layer.lora_parameters(adapter)
        for name, tensor in named.items():
            own[CONTAINERS[name]].copy_(tensor.view_as(own[CONTAINERS[name]]))
