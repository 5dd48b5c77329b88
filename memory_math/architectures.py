"""The shape of a model, read from its config: how many parameters it has, part by part, and which linear layers.

    count_parameters("llama-2-7b")                    a preset
    count_parameters("path/to/model")                 a folder with config.json, or the file itself
    count_parameters({"model_type": "gpt2", ...})     the same as a dict, or as transformers' object
    count_parameters(model)                           any module: its own parameters, counted

The families are in families/, one file each; every preset's total is held by a test to its published integer or to the built model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import MemoryMathError
from .families import FAMILIES
from .families.base import PARTS, Architecture, LinearLayer, Tensor
from .presets import PRESETS

__all__ = ["SUPPORTED_TYPES", "Architecture", "LinearLayer", "ParameterCount", "Tensor", "architecture_of", "count_parameters"]

SUPPORTED_TYPES = tuple(FAMILIES)
FEW_PRESETS = "llama-3-8b, mistral-7b-v0.1, gpt2, opt-1.3b, pythia-1b, falcon-7b, bert-base-uncased, flan-t5-xl"

# What a parameter is of a model that is not known by its config: the first whose words are in the path, between dots.
PARTS_BY_NAME = tuple((part, re.compile(rf"(^|\.)({words})(\.|$)", re.IGNORECASE)) for part, words in (
    ("adapters", r"lora_\w+|soft_prompt|prompt_encoder|tasks"),
    ("norms", r"\w*norm\d?|ln|ln_\w+|\w+_ln"),
    ("relative positions", r"relative_attention_bias"),
    ("biases", r"\w*bias"),
    ("q", r"q|q_proj|q_lin|wq|query|to_q"),
    ("k", r"k|k_proj|k_lin|wk|key|to_k"),
    ("v", r"v|v_proj|v_lin|wv|value|to_v"),
    ("qkv", r"qkv|qkv_proj|c_attn|query_key_value|in_proj_weight|wqkv"),
    ("o", r"o|o_proj|out_lin|(attn|attention|self_attn|self_attention)\.(wo|out_proj|c_proj|dense|output\.dense)"),
    ("router", r"router|mlp\.gate|block_sparse_moe\.gate"),
    ("experts", r"experts"),
    ("gate", r"gate_proj|wi_0|w1"),
    ("up", r"up_proj|gate_up_proj|wi|wi_1|w3|c_fc|fc1|lin1|dense_h_to_4h|intermediate\.dense"),
    ("down", r"down_proj|w2|fc2|lin2|dense_4h_to_h|mlp\.c_proj|DenseReluDense\.wo|output\.dense"),
    ("pooler", r"pooler"),
    ("token types", r"token_type_embeddings|token_type"),
    ("positions", r"wpe|\w*position\w*"),
    ("head", r"lm_head|embed_out|predictions|output_projection"),
    ("classifier", r"score|classifier|classification_head|pre_classifier"),
    ("embedding", r"wte|shared|\w*embed\w*"),
))  # fmt: skip


class ParameterCount(int):
    """The number of parameters, which is what it is as an int, with `parts`: part -> count, each tensor once.

    >>> count = count_parameters("smollm2-135m")
    >>> count == 134_515_008, f"{count:,}", count.parts["embedding"]
    (True, '134,515,008', 28311552)
    """

    name: str
    parts: dict[str, int]

    def __new__(cls, name: str, parts: Mapping[str, int]) -> ParameterCount:
        count = super().__new__(cls, sum(parts.values()))
        count.name, count.parts = name, dict(parts)
        return count

    def __getnewargs__(self) -> tuple[str, dict[str, int]]:  # type: ignore[override]
        return self.name, self.parts

    @property
    def total(self) -> int:
        return int(self)

    def table(self) -> str:
        """A line for each part, and the total."""
        width = max(len(part) for part in [*self.parts, "total"])
        lines = [f"{part:<{width}} {count:>18,}" for part, count in self.parts.items()]
        return "\n".join([self.name, *lines, f"{'total':<{width}} {self.total:>18,}"])

    __str__ = table


def base_of(source: object) -> object:
    """The model that a model around another one (a prompted model) names as its `lora_base`; anything else is itself."""
    return getattr(source, "lora_base", source)


def count_parameters(source: object) -> ParameterCount:
    """The exact number of parameters, part by part, each shared tensor once.

    source: a preset name, a config dict, a path to a folder or a config.json, an Architecture, or a module, whose own parameters are
    counted, adapters and all; it needs no config. A file that says nothing of its class is taken to be its family's main one.
    Raises MemoryMathError for a model type that is not modelled, a field that is missing or of the wrong kind, quantised weights.

    >>> count_parameters("smollm2-135m").total
    134515008
    """
    parameters = getattr(source, "named_parameters", None)
    if callable(parameters):
        return _count_tensors(source, parameters())
    architecture = architecture_of(source)
    return ParameterCount(architecture.name, architecture.parts())


def _count_tensors(module: object, parameters: Iterable[tuple[str, Any]]) -> ParameterCount:
    """The parts by the architecture where the module's config is understood and has this tensor, otherwise by its name."""
    base: Any = base_of(module)
    known, paths = _known_tensors(base), {} if base is module else {id(parameter): path for path, parameter in base.named_parameters()}
    parts: dict[str, int] = {}
    for path, parameter in parameters:
        path = paths.get(id(parameter), path)
        if not parameter.is_floating_point():
            raise MemoryMathError(f"{path} holds {parameter.dtype}: packed weights cannot be counted; give the original's config")
        tensor = known.get(path)
        shares = tensor.parts if tensor and tensor.numel == parameter.numel() else ((_part_of(path), parameter.numel()),)
        for part, elements in shares:
            parts[part] = parts.get(part, 0) + elements
    order = [*PARTS, *(part for part in parts if part not in PARTS)]
    return ParameterCount(type(module).__name__, {part: parts[part] for part in order if part in parts})


def _known_tensors(module: object) -> dict[str, Tensor]:
    config = fields_of(module)
    if config is None or config.get("model_type") not in SUPPORTED_TYPES:
        return {}
    _refuse_quantised(config, type(module).__name__)
    try:
        return {tensor.path: tensor for tensor in architecture_of(module).tensors()}
    except MemoryMathError:  # a class or a field that is not modelled: the names have to do
        return {}


def _part_of(path: str) -> str:
    return next((part for part, pattern in PARTS_BY_NAME if pattern.search(path)), "other")


def architecture_of(source: object) -> Architecture:
    """The architecture of a preset name, a config, its dict, a path, or an object with a .config, such as a model.

    A model is of the class that it has, whatever its config says, and tied if it is; a prompted model is the one that its prompts stand before.
    """
    source = base_of(source)
    if isinstance(source, Architecture):
        return source
    if isinstance(source, Mapping):
        return _from_config(source)
    if isinstance(source, (str, Path)):
        return _from_name(str(source))
    config, to_dict = fields_of(source), getattr(source, "to_dict", None)
    if config is None and callable(to_dict):
        return _from_config(to_dict(), type(source).__name__)
    if not config:
        expected = "a preset name, a config or its dict, a path, or a model with a .config"
        raise MemoryMathError(f"{type(source).__name__} has no config to read: expected {expected}")
    return _from_model(source, config)


def _from_config(config: Mapping[str, Any], name: str = "config") -> Architecture:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise MemoryMathError(f"{name}: model_type={kind!r} is not modelled yet; supported now: {', '.join(SUPPORTED_TYPES)}")
    _refuse_quantised(config, name)
    return FAMILIES[kind].from_config(config, name)


def _from_model(model: object, config: Mapping[str, Any]) -> Architecture:
    name, family = type(model).__name__, FAMILIES.get(str(config.get("model_type")))
    if family is not None and name.startswith(family.class_names):
        config = {**config, "architectures": [name]}
    architecture = _from_config(config, name)
    tied = _is_tied(model)
    return architecture if tied is None else replace(architecture, tied=tied)


def _is_tied(model: object) -> bool | None:
    """Whether the model's output embedding is its input embedding; None where it has none, or does not say."""
    getters = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    layers = [getter() if callable(getter) else None for getter in getters]
    if any(layer is None for layer in layers):
        return None
    inputs, outputs = (getattr(layer, "weight", None) for layer in layers)
    return inputs is outputs


def fields_of(model: object) -> Mapping[str, Any] | None:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    return to_dict() if callable(to_dict) else getattr(config, "__dict__", None)


def preset_of(name: str) -> str | None:
    """The preset that a name means, the owner of a Hub id left out; None where it means none."""
    asked = name.lower()
    short = asked.rpartition("/")[2] if asked.count("/") == 1 else ""
    return next((known for known in (asked, short) if known in PRESETS), None)


def config_file_of(name: str) -> Path | None:
    """The config.json that a path means: the file itself, or the one in this folder; None where there is none."""
    try:
        path = Path(name).expanduser()
        path = path / "config.json" if path.is_dir() else path
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, as JSON is; a folder that may not be read; ~nobody
        return None


def _from_name(name: str) -> Architecture:
    preset, path = preset_of(name), config_file_of(name)
    if preset is not None:
        return _from_config(PRESETS[preset], name.lower())
    if path is not None:
        return _from_config(read_config(path), path.parent.name or str(path))
    near = get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(PRESETS)} presets, such as {FEW_PRESETS}"
    raise MemoryMathError(f"{name!r} is neither a preset nor a folder with a config.json nor such a file: {hint}")


def read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise MemoryMathError(f"{path}: cannot be read as JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise MemoryMathError(f"{path}: expected a JSON object with the model's fields, found {type(content).__name__}")
    return content


def _refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    if config.get("quantization_config"):
        raise MemoryMathError(f"{name}: quantization_config is set; quantised weights are not modelled yet, give the original's config")
