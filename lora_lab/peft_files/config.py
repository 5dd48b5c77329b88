"""adapter_config.json, PEFT's description of an adapter, both ways: written from the layers themselves, read into an `AdapterConfig`.

    adapter_model.safetensors   the tensors; ours carry a copy of the configuration in their metadata
    adapter_config.json         PEFT's keys: r, lora_alpha, target_modules, rank_pattern, ...
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from ..base_parameters import check_modules_to_save, injections
from ..errors import LoraLabError
from ..files import json_object
from ..injection import injection_of
from ..kinds import is_conv1d
from ..layers import LoRA
from ..parameters.layer import ParameterLoRA, parameter_path
from ..parameters.targets import check_names
from ..paths import name_matches
from ..plans import AdapterConfig, first_match
from ..targets import check_config
from .parameters import short_names
from .ties import keeps_ties, whole_modules

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ files belong to a changed base (see changed_base.py).
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Which layers: the tensors say it themselves, and are compared with these (see request.py).
COMPARED = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LORA_LAB_PREFIX")  # files of another method
# Where an adapter came from, or what mattered while it was trained: the function is the same without.
PROVENANCE = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip


# Writing --------------------------------------------------------------------------------------------------------------------


def peft_config(model: nn.Module, adapter: str, layers: dict[str, LoRA], in_file: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
    """adapter_config.json as a dict: what PEFT needs to build the same function, derived from the layers themselves.

    in_file: ranks of layers whose tensors in the file have another rank than those in the model.
    """
    config = _request_of(model, adapter, layers)
    layers = {parameter_path(path): layer for path, layer in layers.items()}
    ranks = {path: rank_in_file(layer, adapter) for path, layer in layers.items()} | dict(in_file)
    alphas = {path: config.alpha_for(layer.lora_scaling[adapter], ranks[path], config.alpha_of(path)) for path, layer in layers.items()}
    rank, rank_pattern = compact(ranks, config.rank, config.rank_pattern)
    alpha, alpha_pattern = compact(alphas, config.rank if config.alpha is None else config.alpha, config.alpha_pattern)
    parameters = [path for path, layer in layers.items() if isinstance(layer, ParameterLoRA)]
    modules = [path for path in layers if path not in parameters]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": _base_name(model),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": compact_targets(model, modules),
        "target_parameters": short_names(model, parameters) if parameters else None,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.variant == "dora",
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": not parameters and all(is_conv1d(model.get_submodule(path)) for path in modules),
        "bias": config.bias,
        "modules_to_save": whole_modules(model, config.modules_to_save, layers) or None,
        "ensure_weight_tying": keeps_ties(model, adapter, config, layers),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def rank_in_file(layer: LoRA, adapter: str) -> int:
    """The rank that PEFT has to be told."""
    if isinstance(layer, ParameterLoRA):
        return layer.lora_variant[adapter].rank(layer, adapter)
    return layer.lora_variant[adapter].pair_for_file(layer, adapter)[0].shape[0]


def _request_of(model: nn.Module, adapter: str, layers: dict[str, LoRA]) -> AdapterConfig:
    """What `inject` was asked for; of a LoRALinear that was made by hand, what the layer itself says."""
    injection = injection_of(model)
    if injection is not None and adapter in injection.adapters:
        return injection.adapters[adapter]
    if any(adapter in below.adapters for _, below in injections(model)):
        raise LoraLabError(f"adapter {adapter!r} was injected into another level of this model: save the model that inject returned")
    first = next(iter(layers.values()))
    rank, scaling = first.lora_variant[adapter].rank(first, adapter), first.lora_scaling[adapter]
    return AdapterConfig(rank, scaling * rank, dropout=max(layer.lora_dropout[adapter] for layer in layers.values()))


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


def compact(values: dict[str, Any], default: Any, pattern: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(default, pattern) that give each path its value by PEFT's rule: the caller's own where right, else path by path.

    The first match wins, and a file is written with its keys in order: so they are tried in that order. Keys that match nothing are left out.
    """
    pattern = {key: value for key, value in sorted(pattern.items()) if any(first_match({key: True}, path, False) for path in values)}
    if all(first_match(pattern, path, default) == value for path, value in values.items()):
        return default, pattern
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}


def _task_type(model: nn.Module) -> str | None:
    """Only where it is certain: by it PEFT chooses a wrapper, which passes its own arguments on. None is the one that passes all on as they are."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    reads_text = getattr(config, "is_encoder_decoder", False) is True and getattr(model, "main_input_name", None) == "input_ids"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") and reads_text else None


def _base_name(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


# Reading --------------------------------------------------------------------------------------------------------------------


def what_is_missing(folder: Path) -> str:
    """Why a folder holds no adapter that could be read."""
    if not folder.is_dir():
        return f"adapter folder {str(folder)!r} does not exist"
    if (folder / "adapter_model.bin").is_file():
        return (f"{folder} holds a pickled adapter_model.bin, which can run code when read and is refused: load it with PEFT and "
                "call save_pretrained, which writes safetensors")  # fmt: skip
    inside = sorted(child.name for child in folder.iterdir() if (child / TENSORS).is_file())
    return f"{folder} holds no {TENSORS}" + (f"; the adapters {inside} are in folders of their own below it" if inside else "")


def read_config(folder: Path, metadata: dict[str, str], stacklevel: int = 3) -> dict[str, Any]:
    """The configuration saved with the tensors, where there is one (an interrupted save may leave an older file beside them)."""
    path = folder / CONFIG
    ours = json_object(metadata["lora_lab_config"], folder / TENSORS) if "lora_lab_config" in metadata else None
    beside = json_object(path.read_bytes(), path) if path.is_file() else None
    config = beside if ours is None else ours
    if config is None:
        raise LoraLabError(f"{path} is missing: it holds alpha, without which the adapter's strength is unknown")
    if beside is not None and beside != config:
        differ = sorted(key for key in {*config, *beside} if config.get(key) != beside.get(key))
        warnings.warn(f"{path} differs from the one saved with the tensors in {differ}; the tensors' own is used", stacklevel=stacklevel)
    return config


def from_peft(config: dict[str, Any], path: Path, not_here: Collection[str] = (), found_again: Collection[str] = ()) -> AdapterConfig:
    """Keep what says how the tensors are used; refuse, by name, what would change the function and is not read here.

    path: of the file, for messages.  not_here: further keys that the caller does not read.  found_again: initialisations that changed the
    base, and whose change the caller computes again.
    """
    if config.get("peft_type") != "LORA":
        prompt = ": prompt_tuning_lab.load reads it" if config.get("peft_type") in PROMPTS else ""
        raise LoraLabError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'{prompt}")
    if (init := initialisation(config)) not in (*HARMLESS_INITIALISATIONS, *found_again):
        raise LoraLabError(f"{path}: init_lora_weights={init!r} changed the base weights while training{_why_not(init)}; convert the adapter with "
                           "PEFT first (save_pretrained with path_initial_model_for_weight_conversion)")  # fmt: skip
    for key, value in config.items():
        if (key not in READ | COMPARED | PROVENANCE or key in not_here) and value not in (None, False, {}, [], "none"):
            raise LoraLabError(f"{path}: {key}={value!r} is a feature that is not read here; the result would compute something else")
    ours = AdapterConfig(rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), rank_pattern=config.get("rank_pattern") or {},
                         alpha_pattern=config.get("alpha_pattern") or {}, dropout=config.get("lora_dropout") or 0.0,
                         rslora=config.get("use_rslora") or False, target_modules=config.get("target_modules") or "all-linear",
                         variant="dora" if config.get("use_dora") else "lora", lora_bias=config.get("lora_bias") or False,
                         bias=config.get("bias") or "none", modules_to_save=config.get("modules_to_save"),
                         trainable_token_indices=config.get("trainable_token_indices") or None,
                         target_parameters=config.get("target_parameters") or None,
                         ensure_weight_tying=config.get("ensure_weight_tying") or False)  # fmt: skip
    try:
        check_config(ours)
        check_modules_to_save(ours.modules_to_save)
        check_names(ours.target_parameters)
        if not isinstance(ours.ensure_weight_tying, bool):
            raise LoraLabError(f"ensure_weight_tying={ours.ensure_weight_tying!r}: expected true or false")
    except LoraLabError as error:
        raise LoraLabError(f"{path}: {error}") from None
    if ours.alpha is None:
        raise LoraLabError(f"{path}: lora_alpha is null, so the adapter's strength is unknown")
    return ours


def initialisation(config: dict[str, Any]) -> Any:
    """How the adapter began: a word, or True or False."""
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else init


def _why_not(init: Any) -> str:
    if str(init).startswith("pissa_niter"):
        return ", by a randomised SVD that cannot be computed again"
    return ", which `load` computes again and `save` then writes as a plain adapter" if init in ("pissa", "olora") else ""


def warn_of_another_base(trained_on: str, here: str, folder: Path, stacklevel: int = 3) -> None:
    """The two are SHA-256 of the base's files."""
    if trained_on != here:
        warnings.warn(f"{folder} was trained on a base with SHA-256 {trained_on[:12]}..., this one has {here[:12]}...: "
                      "the shapes fit, the weights differ", stacklevel=stacklevel)  # fmt: skip
