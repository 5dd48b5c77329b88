"""Adapter files in the format of Hugging Face PEFT, both ways; safetensors only, nothing pickled.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight [r, in], ....lora_B.weight [out, r]; of embeddings
                                lora_embedding_A, lora_embedding_B; of DoRA lora_magnitude_vector; with lora_bias lora_B.bias
    adapter_config.json         PEFT's keys: r, lora_alpha, target_modules, rank_pattern, ...

The adapter's name is not in the file. The tensors are renamed into place before the configuration, and carry a copy of it in
their metadata: whatever interrupts a save, the pair that loads is the old one or the new one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import activate
from .attention_files import attentions_for_file, attentions_from_file
from .borrowed_files import borrowed_for_file, of_this_model, own_tensors
from .errors import LoraLabError, did_you_mean
from .files import json_object, saving, write_file, write_json
from .injection import apply_plan, injection_of
from .kinds import is_conv1d, kind_of
from .layers import LoRA, is_adaptable
from .merging import refuse_merged
from .targets import (
    AdapterConfig,
    Plan,
    PlannedLayer,
    adapter_names,
    check_adapter_name,
    check_config,
    first_match,
    lora_layers,
    name_matches,
    plan_layer,
)

Model = TypeVar("Model", bound=nn.Module)
PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<which>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias)")
CONTAINERS = {  # name in a file -> container of the layer
    "lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector", "lora_B.bias": "lora_B_bias",
}  # fmt: skip

# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ files belong to a changed base.
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# Keys that say where an adapter came from, or repeat what the tensors say.
INFORMATION = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora", "use_dora", "lora_bias", "bias", "modules_to_save",
}  # fmt: skip


# Saving ---------------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, adapter: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write one adapter straight into `folder`, so that `load` and PEFT's `PeftModel.from_pretrained(base, folder)` read it.

    adapter: its name; None means the one active adapter.  dtype: of the file (None keeps the adapter's, float32 as a rule).
    Raises LoraLabError where there is no such adapter, more than one is active, a value is not finite, or the disk refuses;
    earlier files are untouched then.
    """
    refuse_merged(model, "save")
    adapter = _adapter_to_save(model, adapter)
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.lora_A}
    if "" in layers:
        raise LoraLabError("a layer alone has no name for a file to call it by: inject into a model that contains it, nn.Sequential(layer) will do")
    tensors = {f"{PREFIX}{path}.{name}": _finite(path, tensor.detach().to("cpu", dtype).contiguous())
               for path, layer in layers.items() for name, tensor in tensors_of(layer, adapter).items()}  # fmt: skip
    tensors, layers = attentions_for_file(model, adapter, tensors, layers)
    injection = injection_of(model)
    if injection is not None and adapter in injection.adapters:
        own = borrowed_for_file(model, injection.borrowed, adapter, injection.adapters[adapter], layers)
        tensors |= {key: _finite(key, tensor.to("cpu", dtype).contiguous()) for key, tensor in own.items()}
    config = peft_config(model, adapter, layers)
    metadata = {"format": "pt", "lora_lab_config": json.dumps(config, sort_keys=True)}
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
        magnitude = layer.lora_kind.spread(layer, found["lora_magnitude_vector"])
        tensors["lora_magnitude_vector"] = magnitude[None] if magnitude.ndim > 1 else magnitude
    if "lora_B_bias" in found:
        tensors["lora_B.bias"] = found["lora_B_bias"]
    return tensors


def peft_config(model: nn.Module, adapter: str, layers: dict[str, LoRA]) -> dict[str, Any]:
    """adapter_config.json as a dict: what PEFT needs to build the same function, derived from the layers themselves."""
    injection = injection_of(model)
    if injection is None or adapter not in injection.adapters:
        raise LoraLabError(f"adapter {adapter!r} was injected into another level of this model: save the model that inject returned")
    config = injection.adapters[adapter]
    ranks = {path: layer.lora_variant[adapter].pair_for_file(layer, adapter)[0].shape[0] for path, layer in layers.items()}
    alphas = {path: config.alpha_for(layer.lora_scaling[adapter], ranks[path], config.alpha_of(path)) for path, layer in layers.items()}
    rank, rank_pattern = _compact(ranks, config.rank, config.rank_pattern)
    alpha, alpha_pattern = _compact(alphas, config.rank if config.alpha is None else config.alpha, config.alpha_pattern)
    modules = [model.get_submodule(path) for path in layers]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": _base_name(model),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": compact_targets(model, layers),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.variant == "dora",
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": all(is_conv1d(module) for module in modules),
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def compact_targets(model: nn.Module, adapted: Iterable[str]) -> list[str] | str:
    """The shortest list of names that PEFT's matching resolves to exactly these layers; a regular expression if none does."""
    wanted = set(adapted)
    inside = tuple(f"{path}.lora_" for path in wanted)
    paths = [path for path, _ in model.named_modules() if path and not path.startswith(inside)]
    for parts in (1, 2, 1_000):
        names = sorted({".".join(path.split(".")[-parts:]) for path in wanted})
        if {path for path in paths if any(name_matches(name, path) for name in names)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))


def _compact(values: dict[str, Any], default: Any, pattern: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(default, pattern) that give each path its value by PEFT's rule: the caller's own where right, else path by path."""
    if all(first_match(pattern, path, default) == value for path, value in values.items()):
        return default, dict(pattern)
    common = Counter(values.values()).most_common(1)[0][0]
    odd = sorted((path for path, value in values.items() if value != common), key=len, reverse=True)  # longest first: first match wins
    return common, {f"^{re.escape(path)}": values[path] for path in odd}


def _adapter_to_save(model: nn.Module, adapter: str | None) -> str:
    names = adapter_names(model)
    if adapter is not None and adapter not in names:
        raise LoraLabError(f"adapter={adapter!r}: this model has {names or 'no adapters'}{did_you_mean(adapter, names)}")
    active = sorted({name for layer in lora_layers(model).values() for name in layer.lora_active})
    if adapter is None and len(active) != 1:
        raise LoraLabError(f"which adapter? {active or 'none'} of {names} active: name one with save(model, folder, adapter=...)")
    return adapter or active[0]


def _finite(path: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise LoraLabError(f"the adapter of {path!r} holds NaN or infinity: nothing was written (train with a lower learning rate)")
    return tensor


def _task_type(model: nn.Module) -> str | None:
    endings = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)


def _base_name(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


# Loading --------------------------------------------------------------------------------------------------------------------


def load(model: Model, folder: str | Path, adapter: str = "default", trainable: bool = False, replace: bool = False) -> Model:
    """Read an adapter folder, ours or PEFT's, into the model; it becomes the active one. Returns the same model.

    adapter: the name it gets here.  trainable: False freezes it (for inference), True goes on training it.
    replace: copy the values into the adapter of that name, keeping its Parameter objects.
    Raises LoraLabError, the model untouched, for a missing or damaged file, an adapter of another model, a wrong rank, an
    unknown or unexpected tensor, NaN, or a feature this version does not read; warns where the base's SHA-256 is another.
    """
    refuse_merged(model, "load")
    check_adapter_name(adapter)
    folder = Path(folder)
    tensors, metadata = _read_tensors(folder)
    config = _read_config(folder, metadata)
    config = of_this_model(model, config)
    tensors, own = own_tensors(model, attentions_from_file(tensors), config, folder)
    layers = _by_layer(tensors)
    plan = Plan(config, tuple(_planned(model, path, named, config, folder) for path, named in layers.items()), tuple(own))
    _check_name_is_free(model, plan, adapter, replace)
    _warn_of_another_base(model, metadata, folder)
    if not replace:
        dtype = next(iter(tensors.values())).dtype
        apply_plan(model, plan, adapter, dtype=dtype if dtype.itemsize >= 4 else None, trainable=trainable)
    _copy_values(model, adapter, layers)
    activate(model, (adapter,), trainable)
    with torch.no_grad():
        for name, tensor in own.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        raise LoraLabError(_what_is_missing(folder))
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraLabError(f"{path} is truncated or not a safetensors file ({error}): save or copy the adapter again") from None


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"adapter folder {str(folder)!r} does not exist"
    if (folder / "adapter_model.bin").is_file():
        return (f"{folder} holds a pickled adapter_model.bin, which can run code when read and is refused: load it with PEFT and "
                "call save_pretrained, which writes safetensors")  # fmt: skip
    inside = sorted(child.name for child in folder.iterdir() if (child / TENSORS).is_file())
    return f"{folder} holds no {TENSORS}" + (f"; the adapters {inside} are in folders of their own below it" if inside else "")


def _read_config(folder: Path, metadata: dict[str, str]) -> AdapterConfig:
    path = folder / CONFIG
    ours = json_object(metadata["lora_lab_config"], folder / TENSORS) if "lora_lab_config" in metadata else None
    if not path.is_file() and ours is None:
        raise LoraLabError(f"{path} is missing: it holds alpha, without which the adapter's strength is unknown")
    config = json_object(path.read_bytes(), path) if path.is_file() else ours
    if ours is not None and config is not None and config != ours:
        differ = sorted(key for key in {*ours, *config} if ours.get(key) != config.get(key))
        warnings.warn(f"{path} differs from the one saved with the tensors in {differ}; the tensors' own is used", stacklevel=3)
        config = ours
    assert config is not None
    return _from_peft(config, path)


def _from_peft(config: dict[str, Any], path: Path) -> AdapterConfig:
    """Keep what says how the tensors are used; refuse what would change the function and is not read here."""
    if config.get("peft_type") != "LORA":
        raise LoraLabError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("init_lora_weights", True) not in HARMLESS_INITIALISATIONS:
        raise LoraLabError(f"{path}: init_lora_weights={config['init_lora_weights']!r} changed the base weights while training; convert the "
                           "adapter with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)")  # fmt: skip
    for key, value in config.items():
        if key not in INFORMATION and value not in (None, False, {}, [], "none"):
            raise LoraLabError(f"{path}: {key}={value!r} is a feature this version does not read; the adapter would compute something else")
    ours = AdapterConfig(rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), rank_pattern=config.get("rank_pattern") or {},
                         alpha_pattern=config.get("alpha_pattern") or {}, dropout=config.get("lora_dropout") or 0.0,
                         rslora=config.get("use_rslora") or False, target_modules=config.get("target_modules") or "all-linear",
                         variant="dora" if config.get("use_dora") else "lora", lora_bias=config.get("lora_bias") or False,
                         bias=config.get("bias") or "none", modules_to_save=config.get("modules_to_save"))  # fmt: skip
    try:
        check_config(ours)
    except LoraLabError as error:
        raise LoraLabError(f"{path}: {error}") from None
    if ours.alpha is None:
        raise LoraLabError(f"{path}: lora_alpha is null, so the adapter's strength is unknown")
    return ours


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
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if is_adaptable(module)]
        raise LoraLabError(f"{folder} is an adapter for another model: it adapts {path!r}, which a {type(model).__name__} does not have"
                           f"{did_you_mean(path, names, 1)}") from None  # fmt: skip
    if (kind := kind_of(module)) is None:
        raise LoraLabError(f"{folder} adapts {path!r}, a {type(module).__name__}: this version reads adapters of linear layers, embeddings "
                           "and convolutions")  # fmt: skip
    planned = plan_layer(path, module, config)
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
    present = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.lora_A}
    if not replace and present:
        raise LoraLabError(f"adapter={adapter!r} is already in this model: choose another name, or replace=True to overwrite its values")
    if not replace:
        return
    vectors = {"lora_magnitude_vector": plan.config.variant == "dora", "lora_B_bias": plan.config.lora_bias}
    tensors = ("lora_A", "lora_B", *(name for name, there in vectors.items() if there))
    wanted = {(p.path, p.rank, p.scaling, frozenset(tensors)) for p in plan.layers}
    if wanted != {
        (path, layer.lora_A[adapter].shape[0], layer.lora_scaling[adapter], frozenset(layer.lora_parameters(adapter)))
        for path, layer in present.items()
    }:
        raise LoraLabError(f"replace=True needs an adapter {adapter!r} with the same layers, ranks, scalings and variant in the model")
    injection = injection_of(model)
    along = injection.borrowed.names.get(adapter, ()) if injection is not None else ()
    if set(along) != set(plan.along):
        here, there = list(along) or "nothing", list(plan.along) or "nothing"
        raise LoraLabError(f"replace=True: the adapter {adapter!r} here trains {here} of the model itself, the one in the file {there}")


def _warn_of_another_base(model: nn.Module, metadata: dict[str, str], folder: Path) -> None:
    trained_on = metadata.get("base_sha256")
    here = getattr(model, "base_sha256", None) if trained_on else None  # hashing a large base takes seconds
    if trained_on and here and trained_on != here:
        warnings.warn(f"{folder} was trained on a base with SHA-256 {trained_on[:12]}..., this one has {here[:12]}...: "
                      "the shapes fit, the weights differ", stacklevel=3)  # fmt: skip


@torch.no_grad()
def _copy_values(model: nn.Module, adapter: str, layers: dict[str, dict[str, Tensor]]) -> None:
    for path, named in layers.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, LoRA)
        own = layer.lora_parameters(adapter)
        for name, tensor in named.items():
            own[CONTAINERS[name]].copy_(tensor.view_as(own[CONTAINERS[name]]))
